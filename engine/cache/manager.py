"""Gives blocks to tables, has their KV brought to the device or computed, and lets it go again.

Life of a table's blocks:

    extend      tokens become known; full blocks are looked up by name, so equal prefixes share blocks
    expect      a turn was accepted and waits: what is on the host begins to come back (`load_early`)
    activate    the turn begins to run: its blocks can no longer be evicted
    schedule    what is on the host begins to be copied to the device; the missing positions before it,
                ascending, get slots and become runs of a step; what no window reaches stays as it is
    launch / settle   a step was planned / has ended: what it wrote or copied is valid, unless given up since
    deactivate  the turn ended: everything it holds can be evicted again

An idle conversation therefore never holds an unevictable block, and a block without KV is never an error:
it is computed again when a turn needs it.
"""

from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.cache.block import (
    LOADING,
    NO_BLOCK,
    NO_NAME,
    NO_SLOT,
    NOT_COPIED,
    BlockIds,
    BlockMove,
    Blocks,
    Copy,
    Residency,
    chain_names,
)
from engine.cache.block_index import BlockIndex
from engine.cache.block_pool import BlockPool
from engine.cache.block_table import BlockTable, BlockTables
from engine.cache.costs import CostTable
from engine.cache.eviction import Way
from engine.cache.needed import first_needed
from engine.cache.policy import Policy
from engine.cache.tiers import CacheStatistics, Tiers
from engine.errors import InvariantError


class Run(NamedTuple):
    """Positions `first` to `first + length` of one table, to be computed in one step."""

    first: int
    length: int


class Write(NamedTuple):
    """After the step, `block` holds `num_valid` tokens - if it is still of `generation`."""

    block: int
    generation: int
    num_valid: int


class Scheduled(NamedTuple):
    """The next part of a table's missing KV."""

    runs: list[Run]  # ascending
    writes: list[Write]
    out_of_slots: bool = False
    waits: bool = False  # what comes behind the runs needs a copy that has not ended


class KVCacheManager:
    """`host` is the pool of the host tier, of no slots if there is none.  Without `costs`, loading counts as
    cheaper than computing.  `pipelined`: a step may attend to what it loads itself, because every layer waits
    for its part of the copies; otherwise it is for later steps.  `window`: the most positions that a row sees
    in any layer, itself included; None if some layer sees all that come before.
    """

    def __init__(
        self,
        device: BlockPool,
        block_size: int,
        policy: Policy,
        host: BlockPool | None = None,
        costs: CostTable | None = None,
        *,
        pipelined: bool = False,
        window: int | None = None,
    ) -> None:
        self.block_size = block_size
        self.is_pipelined = pipelined
        self._window = window
        self.blocks = Blocks()
        self._tables = BlockTables(len(Way))
        self._index = BlockIndex(self.blocks)
        self._twins: set[int] = set()  # blocks whose name finds another block, that holds more
        self.tiers = Tiers(
            self._tables,
            self.blocks,
            device,
            host or BlockPool(0),
            block_size,
            policy,
            costs,
            pipelined=pipelined,
        )

    @property
    def pool(self) -> BlockPool:
        """The device tier's."""
        return self.tiers.device

    # -- tables and tokens

    def new_table(self, tenant: str, now: float) -> BlockTable:
        return self._tables.new(tenant, now)

    def extend(self, table: BlockTable, tokens: "array[int]") -> None:
        """`tokens` [num_known] is the whole history; what is new beyond `table.num_tokens` gets its
        blocks.
        """
        size, num_tokens = self.block_size, len(tokens)
        first, num_full = table.num_tokens // size, num_tokens // size
        table.num_tokens = num_tokens
        if num_full > first:
            parent = self.blocks.name_of(table[first - 1]) if first else None
            full = tokens[first * size : num_full * size]
            for i, name in enumerate(chain_names(table.tenant, parent, full, size), first):
                if i < len(table):
                    self._name(table, i, name)
                else:
                    self._append(table, self._named(name))
        if len(table) * size < num_tokens:
            self._append(table, self.blocks.new())

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Forget what is at `num_tokens` and after.  A shared or full block that is cut is left to its
        other owners and its remaining tokens are computed again; an exclusively owned partial one is kept."""
        size, blocks = self.block_size, self.blocks
        while len(table) * size > num_tokens:
            kept = num_tokens - (len(table) - 1) * size
            block = table[len(table) - 1]
            if kept > 0 and blocks.name_of(block) == NO_NAME:
                if self.tiers.reach(block) > kept:
                    self.tiers.idle.count_one(block, -1)
                    blocks.generation[block] += 1
                    valid = min(blocks.num_valid.item(block), kept)
                    blocks.num_valid[block] = blocks.num_scheduled[block] = valid
                    blocks.host_valid[block] = min(blocks.host_valid.item(block), kept)
                    self.tiers.idle.count_one(block, +1)
                break
            self._drop_last(table)
            if kept > 0:
                self._append(table, blocks.new())
                break
        table.num_tokens = num_tokens
        table.cursor = min(table.cursor, num_tokens // size)
        table.passed[:] = 0

    def release(self, table: BlockTable) -> None:
        """The conversation leaves memory: its blocks go, except those that others share."""
        while len(table):
            self._drop_last(table)
        self._tables.remove(table)

    def drop(self, table: BlockTable) -> None:
        """Give up all KV of an idle table that nothing else needs now."""
        ids = table.blocks
        for block in ids[self.tiers.idle.are(ids)].tolist():
            self.tiers.free(block)

    # -- turns

    def expect(self, table: BlockTable, now: float) -> None:
        """A turn was accepted: until it runs nothing is worth more than its blocks."""
        table.fetched = ()  # for one that was cancelled while it waited
        self._tables.last_active[table.row] = now
        self.blocks.last_used[table.blocks] = now
        self.tiers.became_idle(table)

    def load_early(self, table: BlockTable, num_tokens: int, at_most: int, now: float) -> int:
        """Begin to load what is on the host of the first `num_tokens` tokens of a turn that waits, up to
        `at_most` blocks.  Returns how many.
        """
        first = self.needed_from(table, num_tokens)
        wanted = np.flatnonzero(self._to_load(table, first, num_tokens))[:at_most]
        found = table.blocks[first + wanted].tolist()
        num_begun = 0
        for block in found:
            if not self._is_on_host(block):
                continue  # any more: room was made for one before it
            if not self.tiers.begin_load(block, now):
                break
            table.fetched += (block,)
            num_begun += 1
        if num_begun:
            table.passed[:] = 0
        return num_begun

    def activate(self, table: BlockTable) -> None:
        if table.is_active:
            raise InvariantError("the table is active already")
        if self._twins:
            self._join_twins(table)
        ids = table.blocks
        self.tiers.idle.count(ids, -1)
        self.blocks.num_active[ids] += 1
        self._tables.is_active[table.row] = True
        self.tiers.became_active(table)
        table.cursor, table.passed[:] = 0, 0

    def deactivate(self, table: BlockTable, now: float) -> None:
        ids = table.blocks
        self._tables.is_active[table.row] = False
        self._tables.last_active[table.row] = now
        self.blocks.last_used[ids] = now
        self.blocks.num_active[ids] -= 1
        self.tiers.idle.count(ids, +1)
        table.fetched = ()
        self.tiers.became_idle(table)

    def is_loading(self, table: BlockTable) -> bool:
        """Some of it is on its way from the host."""
        return bool((self.blocks.copying[table.blocks] == LOADING).any())

    def needed_from(self, table: BlockTable, num_tokens: int) -> int:
        """The number of the first block that computing the last of `num_tokens` tokens needs now."""
        if self._window is None or num_tokens <= self._window:
            return 0
        size = self.block_size
        num_blocks = -(-num_tokens // size)
        ids = table.blocks[:num_blocks]
        held = np.zeros(num_blocks, np.int64)  # of the last one the tokens may not be known yet
        loaded = np.where(self._worth_loading(ids, 0), self.tiers.reloadable(ids), 0)
        held[: len(ids)] = np.maximum(self.blocks.num_scheduled[ids], loaded)
        return first_needed(held, num_tokens, size, self._window)

    def num_missing(self, table: BlockTable, num_tokens: int) -> int:
        """Slots that `table` lacks to hold what computing the last of `num_tokens` tokens needs."""
        first = self.needed_from(table, num_tokens)
        have = int(np.count_nonzero(self.blocks.slot[table.blocks[first:]] != NO_SLOT))
        return -(-num_tokens // self.block_size) - first - have

    def num_own(self, table: BlockTable) -> int:
        """Device slots of an idle `table` that could be made free."""
        ids = table.blocks
        return int(np.count_nonzero(self.tiers.idle.are(ids) & (self.blocks.slot[ids] != NO_SLOT)))

    def num_scheduled(self, table: BlockTable, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens have KV on the device, or will when every planned step
        has ended, or need none.
        """
        first = self.needed_from(table, num_tokens)
        ids = table.blocks[: -(-num_tokens // self.block_size)]
        tokens = np.minimum(self.blocks.num_scheduled[ids], self._shares(len(ids), num_tokens))
        return first * self.block_size + int(tokens[first:].sum())

    def num_cached(self, table: BlockTable, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens need neither be computed nor be copied: as
        `num_scheduled`, without what is on its way from the host or came from there for the turn that waits.
        """
        ids = table.blocks[: -(-num_tokens // self.block_size)]
        tokens = np.minimum(self.blocks.num_scheduled[ids], self._shares(len(ids), num_tokens))
        return int(tokens[~self._from_host(table, ids)].sum())

    def num_reloadable(self, table: BlockTable, num_tokens: int, first: int = 0) -> int:
        """How many of the first `num_tokens` tokens need not be computed because they are, or were when the
        turn was accepted, on the host.  Nothing before block `first` begins to be loaded any more.
        """
        ids = table.blocks[: -(-num_tokens // self.block_size)]
        shares = self._shares(len(ids), num_tokens)
        came = np.where(self._from_host(table, ids), np.minimum(self.blocks.num_scheduled[ids], shares), 0)
        there = np.minimum(self.tiers.reloadable(ids), shares)
        there[~self._worth_loading(ids, 0)] = 0
        there[:first][self.blocks.copying[ids[:first]] != LOADING] = 0
        return int(np.maximum(came, there).sum())

    def num_unseen(self, table: BlockTable, num_tokens: int, first: int) -> int:
        """How many of the first `num_tokens` tokens have no KV on the device and need none, because they are
        before block `first`, where all that is needed begins.
        """
        if not first:
            return 0
        end = min(num_tokens, first * self.block_size)
        return end - self.num_cached(table, end) - self.num_reloadable(table, end, first)

    @property
    def num_available(self) -> int:
        """Slots that are free or can be made free."""
        return self.tiers.num_available

    # -- steps

    def schedule(self, table: BlockTable, num_tokens: int, budget: int, now: float) -> Scheduled:
        """Give slots to the first missing positions below `num_tokens`, at most `budget` of them.

        `num_tokens` may exceed `table.num_tokens` by tokens that a launched step is about to sample.
        Everything before each run that it attends to is resident or scheduled no later, which is what makes
        recomputed prefixes exact (Pensieve, section 4.3.4).
        """
        size, blocks = self.block_size, self.blocks
        if table.cursor == len(table) - 1 and num_tokens - table.cursor * size <= size:
            block = table[table.cursor]
            scheduled, end = blocks.num_scheduled.item(block), num_tokens - table.cursor * size
            if (
                0 < scheduled < end <= scheduled + budget
            ):  # a turn that decodes, mostly: nothing else is missing
                blocks.num_scheduled[block] = end
                write = Write(block, blocks.generation.item(block), end)
                run = Run(table.cursor * size + scheduled, end - scheduled)
                table.cursor += end == size
                return Scheduled([run], [write])
        runs: list[Run] = []
        writes: list[Write] = []
        if self._window is not None and not self._is_nearly_done(table):
            table.cursor = self.needed_from(table, num_tokens)
        if not self._fetch(table, num_tokens, now):
            return Scheduled(runs, writes, out_of_slots=True)
        while budget > 0:
            start = table.cursor * size
            want = min(size, num_tokens - start)
            if want <= 0:
                break
            if table.cursor == len(table):
                self._append(table, blocks.new())
            block = table[table.cursor]
            scheduled = blocks.num_scheduled.item(block)
            if not scheduled and blocks.copying.item(block) != NOT_COPIED:
                return Scheduled(runs, writes, waits=True)
            if scheduled < want:
                if blocks.slot.item(block) == NO_SLOT and not self.tiers.give_slot(block, now):
                    return Scheduled(runs, writes, out_of_slots=True)
                first, take = start + scheduled, min(budget, want - scheduled)
                scheduled += take
                blocks.num_scheduled[block] = scheduled
                budget -= take
                writes.append(Write(block, blocks.generation.item(block), scheduled))
                if runs and runs[-1].first + runs[-1].length == first:
                    runs[-1] = Run(runs[-1].first, runs[-1].length + take)
                else:
                    runs.append(Run(first, take))
            if scheduled < size:
                break
            table.cursor += 1
        return Scheduled(runs, writes)

    def slots(self, table: BlockTable, num_tokens: int) -> NDArray[np.int32]:
        """[num_blocks]: the device slot of each block of the first `num_tokens` tokens."""
        return self.blocks.slot[table.blocks[: -(-num_tokens // self.block_size)]]

    def store_ahead(self, now: float) -> None:
        """Begin to copy idle blocks to the host if slots are about to run out."""
        self.tiers.store_ahead(now)

    @property
    def has_begun_copies(self) -> bool:
        """The next step must make some."""
        return self.tiers.has_begun

    def launch(self, ids: BlockIds) -> tuple[int, tuple[Copy, ...]]:
        """A step is planned that touches `ids`, which may repeat.  Returns its number, by which it is to be
        settled, and the copies that it must make.  Steps are settled in the order of planning.
        """
        return self.tiers.launch(ids)

    def settle(
        self,
        number: int,
        ids: BlockIds,
        writes: Iterable[Write],
        copies: Sequence[Copy] = (),
        failed: Collection[BlockMove] = (),
    ) -> list[Copy]:
        """A step has ended: what it wrote and copied is valid, but for the moves that `failed`.  Returns the
        copies with which KV was lost.
        """
        blocks = self.blocks
        for block, generation, num_valid in writes:
            if blocks.generation.item(block) == generation and blocks.num_valid.item(block) < num_valid:
                blocks.num_valid[block] = (
                    num_valid  # the step still touches it: it is not counted as idle yet
                )
        return self.tiers.settle(number, ids, copies, failed)

    def void(self, writes: Iterable[Write]) -> None:
        """What a launched step was to write is worth nothing: it read KV that a copy had not brought."""
        blocks = self.blocks
        for block, generation, _ in writes:
            if blocks.generation.item(block) == generation:
                blocks.num_scheduled[block] = blocks.num_valid[block]

    # -- looking in

    def statistics(self) -> CacheStatistics:
        return self.tiers.statistics()

    def residency(self, table: BlockTable) -> list[Residency]:
        """Of each block."""
        return [self.blocks.residency(block) for block in table.blocks.tolist()]

    def check(self) -> None:
        """Every slot is free or owned by exactly one block, and every count is what the tables say.  Raises
        InvariantError.
        """
        blocks, count = self.blocks, len(self.blocks.slot)
        refs, active = np.zeros(count, np.int64), np.zeros(count, np.int64)
        wrong: NDArray[np.bool_]
        for table in self._tables:
            if len(table) * self.block_size < table.num_tokens:
                raise InvariantError(f"{table.num_tokens} tokens do not fit {len(table)} blocks")
            refs[table.blocks] += 1
            active[table.blocks] += table.is_active
        named = np.flatnonzero(refs).astype(np.int32)
        for wrong, what in (
            ((blocks.num_refs != refs) | (blocks.num_active != active), "is counted wrongly by its tables"),
            (
                (blocks.num_valid < 0)
                | (blocks.num_scheduled < blocks.num_valid)
                | (blocks.num_scheduled > self.block_size),
                "has impossible lengths",
            ),
        ):
            for block in np.flatnonzero(wrong).tolist():
                raise InvariantError(
                    f"{blocks.describe(block)} {what}: {refs[block]} name it, {active[block]} of them active"
                )
        for block in self._index.named():
            if not refs[block] or self._index.find(blocks.name_of(block)) != block:
                raise InvariantError(f"the index knows {blocks.describe(block)}, which no table names")
        self.tiers.check(named)

    # -- private

    def _shares(self, num_blocks: int, num_tokens: int) -> NDArray[np.int64]:
        """Of the first `num_tokens` tokens, how many are in each block."""
        return np.minimum(num_tokens - np.arange(num_blocks) * self.block_size, self.block_size)

    def _from_host(self, table: BlockTable, ids: BlockIds) -> NDArray[np.bool_]:
        """Which of `ids` are on their way from the host, or were loaded for the turn that waits."""
        loading: NDArray[np.bool_] = self.blocks.copying[ids] == LOADING
        return loading | np.isin(ids, table.fetched) if table.fetched else loading

    def _worth_loading(self, ids: BlockIds, first: int) -> NDArray[np.bool_]:
        """Of consecutive blocks from number `first` on, which come from the host when they are needed."""
        ends = (np.arange(first, first + len(ids)) + 1) * self.block_size
        return self.tiers.worth_loading(self.tiers.reloadable(ids), ends)

    def _to_load(self, table: BlockTable, first: int, num_tokens: int) -> NDArray[np.bool_]:
        """Of the blocks from number `first` on, which are to be loaded now."""
        ids = table.blocks[first : -(-num_tokens // self.block_size)]
        there: NDArray[np.bool_] = (self.blocks.host_valid[ids] > 0) & (
            self.blocks.copying[ids] == NOT_COPIED
        )
        there &= self.blocks.num_scheduled[ids] == 0
        return there & self._worth_loading(ids, first) if there.any() else there

    def _fetch(self, table: BlockTable, num_tokens: int, now: float) -> bool:
        """Begin to load what is on the host of the first `num_tokens` tokens; False if slots ran out."""
        first, last = table.cursor, len(table) - 1
        if not self.tiers.host.num_slots or first > last:
            return True
        if first == last and (
            self.blocks.num_scheduled.item(table[last]) or not self._is_on_host(table[last])
        ):
            return True  # as it mostly is: scans cost more than this look
        for i in np.flatnonzero(self._to_load(table, first, num_tokens)).tolist():
            if not self.tiers.begin_load(table[first + i], now):
                return False
        return True

    def _is_nearly_done(self, table: BlockTable) -> bool:
        """At most a part of the last block is missing, as it mostly is."""
        left = len(table) - table.cursor
        return left < 1 or left == 1 and self.blocks.num_scheduled.item(table[table.cursor]) > 0

    def _is_on_host(self, block: int) -> bool:
        return self.blocks.host_valid.item(block) > 0

    def _named(self, name: bytes) -> int:
        """The block of that name, which may be new."""
        block = self._index.find(name)
        if block == NO_BLOCK:
            block = self.blocks.new()
            self._set_name(block, name)
        return block

    def _set_name(self, block: int, name: bytes) -> None:
        self.blocks.set_name(block, name)
        self._index.put(name, block)

    def _append(self, table: BlockTable, block: int) -> None:
        table.append(block)
        blocks = self.blocks
        blocks.num_refs[block] += 1
        blocks.last_used[block] = max(blocks.last_used.item(block), table.last_active)
        if table.is_active:
            self._set_active(block, +1)

    def _drop_last(self, table: BlockTable) -> None:
        block = table.pop()
        if table.is_active:
            self._set_active(block, -1)
        self._unref(block)

    def _unref(self, block: int) -> None:
        self.blocks.num_refs[block] -= 1
        if self.blocks.num_refs.item(block):
            return
        name = self.blocks.name_of(block)
        if name != NO_NAME and self._index.find(name) == block:
            self._index.remove(name)
        self._twins.discard(block)
        self.blocks.last_used[block] = 0.0
        self.tiers.retire(block)

    def _name(self, table: BlockTable, i: int, name: bytes) -> None:
        """The block at `i` has become full of known tokens: share it, or take the one that another table
        has.
        """
        mine, known = table[i], self._index.find(name)
        if self.blocks.name_of(mine) != NO_NAME:
            raise InvariantError(f"block {i} was named before")
        if known == NO_BLOCK:
            self._set_name(mine, name)
        elif self.blocks.num_scheduled[known] >= self.blocks.num_scheduled[mine]:
            self._replace(table, i, known)
        else:  # theirs holds less than mine: mine is the one to find, and `activate` lets them change over
            self._twins.add(known)
            self._set_name(mine, name)

    def _join_twins(self, table: BlockTable) -> None:
        for i, block in enumerate(table.blocks.tolist()):
            if block in self._twins:
                twin = self._index.find(self.blocks.name_of(block))
                if twin != NO_BLOCK and self._holds(twin) > self._holds(block):
                    self._replace(table, i, twin)

    def _holds(self, block: int) -> tuple[int, int]:
        return self.tiers.reach(block), self.blocks.num_scheduled.item(block)

    def _replace(self, table: BlockTable, i: int, by: int) -> None:
        """Go on with block `by`, which has the same tokens, in the place of the one at `i`."""
        mine = table[i]
        table[i] = by
        self.blocks.num_refs[by] += 1
        if table.is_active:
            self._set_active(by, +1)
            self._set_active(mine, -1)
        self._unref(mine)

    def _set_active(self, block: int, by: int) -> None:
        self.tiers.idle.count_one(block, -1)
        self.blocks.num_active[block] += by
        self.tiers.idle.count_one(block, +1)
