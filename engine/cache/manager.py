"""The one writer of residency: gives blocks to tables, slots to blocks, and takes them away again.

Life of a table's blocks:

    extend      tokens become known; full blocks are looked up by hash, so equal prefixes share blocks
    activate    a turn begins to run: its blocks can no longer be evicted
    schedule    the missing positions, ascending, get slots and become runs of a step
    pin / settle   a step was launched / has ended: what it wrote is valid, unless the block was given up
    meanwhile deactivate  the turn ended: everything it holds can be evicted again

An idle conversation therefore never holds an unevictable block, and a block without KV is never an error:
it is computed again when a turn needs it.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from engine.cache.block import NO_SLOT, Block, BlockTable, chain_hashes
from engine.cache.block_pool import BlockPool
from engine.cache.policy import Rank
from engine.errors import InvariantError


@dataclass(frozen=True, slots=True)
class Run:
    """Positions `first` to `first + length` of one table, to be computed in one step."""

    first: int
    length: int


@dataclass(frozen=True, slots=True)
class Write:
    """After the step, `block` holds `num_valid` tokens - if it is still of `generation`."""

    block: Block
    generation: int
    num_valid: int


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    num_slots: int
    num_free: int
    num_evictable: int
    num_evicted: int  # since start


class KVCacheManager:
    def __init__(self, pool: BlockPool, block_size: int, rank: Rank) -> None:
        self.pool = pool
        self.block_size = block_size
        self._rank = rank
        self._tables: dict[BlockTable, None] = {}
        self._index: dict[bytes, Block] = {}
        self._leaving: set[Block] = set()  # named by no table, but a launched step still touches them
        self._num_evictable = 0
        self._num_evicted = 0

    # -- tables and tokens

    def new_table(self, tenant: str, now: float) -> BlockTable:
        table = BlockTable(tenant)
        table.last_active = now
        self._tables[table] = None
        return table

    def extend(self, table: BlockTable, tokens: "array[int]") -> None:
        """`tokens` [num_known] is the whole history; what is new beyond `table.num_tokens` gets its
        blocks.
        """
        size = self.block_size
        first, num_full = table.num_tokens // size, len(tokens) // size
        parent = table.blocks[first - 1].hash if first else None
        table.num_tokens = len(tokens)
        full = tokens[first * size : num_full * size]
        for i, block_hash in enumerate(chain_hashes(table.tenant, parent, full, size), first):
            if i < len(table.blocks):
                self._name(table, i, block_hash)
                continue
            block = self._index.get(block_hash)
            if block is None:
                block = self._index[block_hash] = Block(block_hash)
            self._append(table, block)
        if len(table.blocks) * size < len(tokens):
            self._append(table, Block())

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Forget what is at `num_tokens` and after.  A shared or full block that is cut is left to its
        other owners and its remaining tokens are computed again; an exclusively owned partial one is kept."""
        size = self.block_size
        while len(table.blocks) * size > num_tokens:
            kept = num_tokens - (len(table.blocks) - 1) * size
            block = table.blocks[-1]
            if kept > 0 and block.hash is None:
                if block.num_scheduled > kept:
                    block.generation += 1
                    block.num_valid = block.num_scheduled = min(block.num_valid, kept)
                break
            self._drop_last(table)
            if kept > 0:
                self._append(table, Block())
                break
        table.num_tokens = num_tokens
        table.cursor = min(table.cursor, num_tokens // size)
        table.num_dropped = min(table.num_dropped, len(table.blocks))

    def release(self, table: BlockTable) -> None:
        """The conversation leaves memory: its blocks go, except those that others share."""
        while table.blocks:
            self._drop_last(table)
        del self._tables[table]

    def drop(self, table: BlockTable) -> None:
        """Give up all KV of an idle table that nothing else needs now."""
        for block in table.blocks:
            if block.evictable:
                self._free_slot(block)

    # -- turns

    def activate(self, table: BlockTable) -> None:
        if table.is_active:
            raise InvariantError("the table is active already")
        table.is_active = True
        table.cursor = table.num_dropped = 0
        for i, block in enumerate(table.blocks):
            twin = self._index.get(block.hash) if block.hash is not None else None
            if twin is not None and twin.num_scheduled > block.num_scheduled:
                table.blocks[i] = twin
                twin.num_refs += 1
                self._set_active(twin, +1)
                self._unref(block)
            else:
                self._set_active(block, +1)

    def deactivate(self, table: BlockTable, now: float) -> None:
        table.is_active = False
        table.last_active = now
        for block in table.blocks:
            block.last_used = now
            self._set_active(block, -1)

    def num_missing(self, table: BlockTable, num_tokens: int) -> int:
        """Slots that `table` lacks to hold `num_tokens`."""
        have = sum(block.slot != NO_SLOT for block in table.blocks)
        return -(-num_tokens // self.block_size) - have

    def num_cached(self, table: BlockTable, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens need not be computed: their KV is here, or a planned step
        writes it.
        """
        size = self.block_size
        num_full, rest = divmod(num_tokens, size)
        blocks = table.blocks[: num_full + 1]
        num_whole = sum([block.num_scheduled for block in blocks[:num_full]])
        return num_whole + sum([min(block.num_scheduled, rest) for block in blocks[num_full:]])

    @property
    def num_available(self) -> int:
        """Slots that are free or can be made free."""
        return self.pool.num_free + self._num_evictable

    # -- steps

    def schedule(
        self, table: BlockTable, num_tokens: int, budget: int, now: float
    ) -> tuple[list[Run], list[Write], bool]:
        """Give slots to the first missing positions below `num_tokens`, at most `budget` of them.

        Returns the runs, what they will write, and whether slots ran out.  `num_tokens` may exceed
        `table.num_tokens` by tokens that a launched step is about to sample.  Runs are ascending and
        everything before each is resident or scheduled no later, which is what makes recomputed prefixes
        exact.
        """
        size = self.block_size
        runs: list[Run] = []
        writes: list[Write] = []
        while budget > 0:
            start = table.cursor * size
            want = min(size, num_tokens - start)
            if want <= 0:
                break
            if table.cursor == len(table.blocks):
                self._append(table, Block())
            block = table.blocks[table.cursor]
            if block.num_scheduled < want:
                if block.slot == NO_SLOT and not self._give_slot(block, now):
                    return runs, writes, True
                first, take = start + block.num_scheduled, min(budget, want - block.num_scheduled)
                block.num_scheduled += take
                budget -= take
                writes.append(Write(block, block.generation, block.num_scheduled))
                if runs and runs[-1].first + runs[-1].length == first:
                    runs[-1] = Run(runs[-1].first, runs[-1].length + take)
                else:
                    runs.append(Run(first, take))
            if block.num_scheduled < size:
                break
            table.cursor += 1
        return runs, writes, False

    def slots(self, table: BlockTable, num_tokens: int) -> list[int]:
        """The device block of each block of the first `num_tokens` tokens."""
        return [block.slot for block in table.blocks[: -(-num_tokens // self.block_size)]]

    def pin(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            if block.evictable:
                self._num_evictable -= 1
            block.num_pins += 1

    def settle(self, blocks: Sequence[Block], writes: Sequence[Write]) -> None:
        """A step has ended well: what it wrote is valid."""
        for write in writes:
            if write.block.generation == write.generation:
                write.block.num_valid = max(write.block.num_valid, write.num_valid)
        for block in blocks:
            block.num_pins -= 1
            self._num_evictable += block.evictable
            if not block.num_pins and block in self._leaving:
                self._leaving.remove(block)
                self._free_slot(block)

    # -- looking in

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            self.pool.num_slots, self.pool.num_free, self._num_evictable, self._num_evicted
        )

    def check(self) -> None:
        """Every slot is free or owned by exactly one block, and every count is what the tables say.  Raises
        InvariantError.
        """
        refs: dict[Block, int] = {}
        active: dict[Block, int] = {}
        for table in self._tables:
            if len(table.blocks) * self.block_size < table.num_tokens:
                raise InvariantError(f"{table.num_tokens} tokens do not fit {len(table.blocks)} blocks")
            for block in table.blocks:
                refs[block] = refs.get(block, 0) + 1
                active[block] = active.get(block, 0) + table.is_active
        for block, count in refs.items():
            if (block.num_refs, block.num_active) != (count, active[block]):
                raise InvariantError(f"{block!r} is named by {count} tables, {active[block]} of them active")
            if not 0 <= block.num_valid <= block.num_scheduled <= self.block_size:
                raise InvariantError(f"{block!r} has impossible lengths")
            if block.slot == NO_SLOT and block.num_scheduled:
                raise InvariantError(f"{block!r} claims KV without a slot")
        for block_hash, block in self._index.items():
            if block.hash != block_hash or block not in refs:
                raise InvariantError(f"the index knows {block!r}, which no table names")
        owned = [block.slot for block in (*refs, *self._leaving) if block.slot != NO_SLOT]
        if len(set(owned)) != len(owned) or len(owned) + self.pool.num_free != self.pool.num_slots:
            raise InvariantError(
                f"{len(owned)} slots owned, {self.pool.num_free} free, {self.pool.num_slots} in all"
            )
        if self._num_evictable != sum(block.evictable for block in refs):
            raise InvariantError(f"evictable blocks counted as {self._num_evictable}")

    # -- private

    def _append(self, table: BlockTable, block: Block) -> None:
        table.blocks.append(block)
        block.num_refs += 1
        block.last_used = max(block.last_used, table.last_active)
        if table.is_active:
            self._set_active(block, +1)

    def _drop_last(self, table: BlockTable) -> None:
        block = table.blocks.pop()
        if table.is_active:
            self._set_active(block, -1)
        self._unref(block)

    def _unref(self, block: Block) -> None:
        block.num_refs -= 1
        if block.num_refs:
            return
        if block.hash is not None and self._index.get(block.hash) is block:
            del self._index[block.hash]
        if block.num_pins:
            self._leaving.add(block)
        else:
            self._free_slot(block)

    def _name(self, table: BlockTable, i: int, block_hash: bytes) -> None:
        """The block at `i` has become full of known tokens: share it, or take the one that another table
        has.
        """
        mine, known = table.blocks[i], self._index.get(block_hash)
        if mine.hash is not None:
            raise InvariantError(f"block {i} was named before")
        if known is None:
            mine.hash = block_hash
            self._index[block_hash] = mine
        elif known.num_scheduled >= mine.num_scheduled:
            table.blocks[i] = known
            known.num_refs += 1
            if table.is_active:
                self._set_active(known, +1)
                self._set_active(mine, -1)
            self._unref(mine)
        else:  # theirs holds less than mine: mine is the one to find, and `activate` lets them change over
            mine.hash = block_hash
            self._index[block_hash] = mine

    def _set_active(self, block: Block, by: int) -> None:
        was = block.evictable
        block.num_active += by
        self._num_evictable += block.evictable - was

    def _give_slot(self, block: Block, now: float) -> bool:
        slot = self.pool.take()
        if slot is None and self._evict_some(now):
            slot = self.pool.take()
        if slot is None:
            return False
        block.slot = slot
        self._num_evictable += block.evictable
        return True

    def _free_slot(self, block: Block) -> None:
        if block.slot == NO_SLOT:
            return
        self._num_evictable -= block.evictable
        self.pool.give_back(block.slot)
        block.slot = NO_SLOT
        block.num_valid = block.num_scheduled = 0
        block.generation += 1

    def _evict_some(self, now: float) -> int:
        """Drop the lowest-ranked evictable blocks: a small share of the pool at once, so that ranking costs
        little per block.
        """
        wanted = min(self._num_evictable, max(1, self.pool.num_slots // 64))
        if not wanted:
            return 0
        num_freed = 0
        # A block that somebody more recent shares, or that came back through somebody else, goes only when
        # nothing else can; until then tables are looked at no further than what they have left.
        for everywhere in (False, True):
            idle = [
                t for t in self._tables if not t.is_active and (everywhere or t.num_dropped < len(t.blocks))
            ]
            for table in sorted(idle, key=lambda table: self._rank(table, now)):
                for block in islice(table.blocks, 0 if everywhere else table.num_dropped, None):
                    if block.evictable and (everywhere or block.last_used <= table.last_active):
                        self._free_slot(block)
                        self._num_evicted += 1
                        num_freed += 1
                    if not everywhere and block.slot == NO_SLOT and block is table.blocks[table.num_dropped]:
                        table.num_dropped += 1
                    if num_freed == wanted:
                        return num_freed
        raise InvariantError(f"{wanted} evictable blocks were counted, {num_freed} found")
