"""Gives blocks to tables, has their KV brought to the device or computed, and lets it go again.

Life of a table's blocks:

    extend      tokens become known; full blocks are looked up by hash, so equal prefixes share blocks
    activate    a turn begins to run: its blocks can no longer be evicted
    schedule    what is on the host begins to be copied to the device; the missing positions before it,
                ascending, get slots and become runs of a step
    pin / settle   a step was launched / has ended: what it wrote or copied is valid, unless given up since
    deactivate  the turn ended: everything it holds can be evicted again

An idle conversation therefore never holds an unevictable block, and a block without KV is never an error:
it is computed again when a turn needs it.
"""

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.cache.block import NO_SLOT, Block, BlockMove, BlockTable, Copy, chain_hashes
from engine.cache.block_pool import BlockPool
from engine.cache.costs import CostTable
from engine.cache.policy import Policy
from engine.cache.tiers import CacheStatistics, Tiers
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
class Scheduled:
    """The next part of a table's missing KV."""

    runs: list[Run]  # ascending
    writes: list[Write]
    out_of_slots: bool = False
    waits: bool = False  # what comes behind the runs needs a copy that has not ended


class KVCacheManager:
    """`host` is the pool of the host tier, of no slots if there is none.  Without `costs`, loading counts as
    cheaper than computing.
    """

    def __init__(
        self,
        device: BlockPool,
        block_size: int,
        policy: Policy,
        host: BlockPool | None = None,
        costs: CostTable | None = None,
    ) -> None:
        self.block_size = block_size
        self._tables: dict[BlockTable, None] = {}
        self._index: dict[bytes, Block] = {}
        self.tiers = Tiers(self._tables, device, host or BlockPool(0), block_size, policy, costs)

    @property
    def pool(self) -> BlockPool:
        """The device tier's."""
        return self.tiers.device

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
                if block.reach > kept:
                    self.tiers.count(block, -1)
                    block.generation += 1
                    block.num_valid = block.num_scheduled = min(block.num_valid, kept)
                    block.host_valid = min(block.host_valid, kept)
                    self.tiers.count(block, +1)
                break
            self._drop_last(table)
            if kept > 0:
                self._append(table, Block())
                break
        table.num_tokens = num_tokens
        table.cursor = min(table.cursor, num_tokens // size)
        table.passed = [0, 0, 0]

    def release(self, table: BlockTable) -> None:
        """The conversation leaves memory: its blocks go, except those that others share."""
        while table.blocks:
            self._drop_last(table)
        del self._tables[table]

    def drop(self, table: BlockTable) -> None:
        """Give up all KV of an idle table that nothing else needs now."""
        for block in table.blocks:
            if not block.num_active and not block.num_pins:
                self.tiers.free(block)

    # -- turns

    def activate(self, table: BlockTable) -> None:
        if table.is_active:
            raise InvariantError("the table is active already")
        table.is_active = True
        table.cursor, table.passed = 0, [0, 0, 0]
        for i, block in enumerate(table.blocks):
            twin = self._index.get(block.hash) if block.hash is not None else None
            if twin is not None and (twin.reach, twin.num_scheduled) > (block.reach, block.num_scheduled):
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
        self.tiers.became_idle()

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

    def num_reloadable(self, table: BlockTable, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens need not be computed because they are on the host."""
        size = self.block_size
        return sum(
            min(block.num_reloadable, num_tokens - i * size)
            for i, block in enumerate(table.blocks[: -(-num_tokens // size)])
            if self.tiers.can_reload(block, (i + 1) * size)
        )

    @property
    def num_available(self) -> int:
        """Slots that are free or can be made free."""
        return self.tiers.num_available

    # -- steps

    def schedule(self, table: BlockTable, num_tokens: int, budget: int, now: float) -> Scheduled:
        """Give slots to the first missing positions below `num_tokens`, at most `budget` of them.

        `num_tokens` may exceed `table.num_tokens` by tokens that a launched step is about to sample.
        Everything before each run is resident or scheduled no later, which is what makes recomputed prefixes
        exact.
        """
        size = self.block_size
        runs: list[Run] = []
        writes: list[Write] = []
        if not self._fetch(table, num_tokens, now):
            return Scheduled(runs, writes, out_of_slots=True)
        while budget > 0:
            start = table.cursor * size
            want = min(size, num_tokens - start)
            if want <= 0:
                break
            if table.cursor == len(table.blocks):
                self._append(table, Block())
            block = table.blocks[table.cursor]
            if block.copy is not None and not block.num_scheduled:
                return Scheduled(runs, writes, waits=True)
            if block.num_scheduled < want:
                if block.slot == NO_SLOT and not self.tiers.give_slot(block, now):
                    return Scheduled(runs, writes, out_of_slots=True)
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
        return Scheduled(runs, writes)

    def slots(self, table: BlockTable, num_tokens: int) -> list[int]:
        """The device block of each block of the first `num_tokens` tokens."""
        return [block.slot for block in table.blocks[: -(-num_tokens // self.block_size)]]

    def store_ahead(self, now: float) -> None:
        """Begin to copy idle blocks to the host if slots are about to run out."""
        self.tiers.store_ahead(now)

    def take_copies(self) -> tuple[Copy, ...]:
        """The copies that the step which is planned now must make before it computes: stores, then loads."""
        return self.tiers.take_begun()

    def pin(self, blocks: Sequence[Block]) -> None:
        self.tiers.pin(blocks)

    def settle(
        self,
        blocks: Sequence[Block],
        writes: Sequence[Write],
        copies: Sequence[Copy] = (),
        failed: Collection[BlockMove] = (),
    ) -> list[Copy]:
        """A step has ended well: what it wrote and copied is valid, but for the moves that `failed`.  Returns
        the copies with which KV was lost.
        """
        for write in writes:
            if write.block.generation == write.generation:
                write.block.num_valid = max(write.block.num_valid, write.num_valid)
        self.tiers.unpin(blocks)
        return self.tiers.settle(copies, failed)

    # -- looking in

    def statistics(self) -> CacheStatistics:
        return self.tiers.statistics()

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
        for block_hash, block in self._index.items():
            if block.hash != block_hash or block not in refs:
                raise InvariantError(f"the index knows {block!r}, which no table names")
        self.tiers.check(refs)

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
        self.tiers.free(block)

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
        self.tiers.count(block, -1)
        block.num_active += by
        self.tiers.count(block, +1)

    def _fetch(self, table: BlockTable, num_tokens: int, now: float) -> bool:
        """Begin to load what is on the host of the first `num_tokens` tokens; False if slots ran out."""
        size = self.block_size
        for i in range(table.cursor, min(len(table.blocks), -(-num_tokens // size))):
            block = table.blocks[i]
            if block.host_valid and block.copy is None and self.tiers.can_reload(block, (i + 1) * size):
                if not self.tiers.begin_load(block, now):
                    return False
        return True
