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

from engine.cache.block import NO_SLOT, NOT_COPIED, BlockIds, BlockMove, Blocks, Copy, Residency
from engine.cache.block_pool import BlockPool
from engine.cache.block_table import BlockTable, BlockTables
from engine.cache.costs import CostTable
from engine.cache.eviction import Way
from engine.cache.holdings import Holdings
from engine.cache.policy import Policy
from engine.cache.sharing import Sharing
from engine.cache.tiers import STORE_BELOW, CacheStatistics, Tiers
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
    in any layer, itself included; None if some layer sees all that come before.  `store_below`: idle blocks
    are copied to the host ahead of time while a smaller share of the device's slots is free or clean.
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
        store_below: float = STORE_BELOW,
    ) -> None:
        self.block_size = block_size
        self.is_pipelined = pipelined
        self._window = window
        self.blocks = Blocks()
        self._tables = BlockTables(len(Way))
        self.tiers = Tiers(
            self._tables,
            self.blocks,
            device,
            host or BlockPool(0),
            block_size,
            policy,
            costs,
            pipelined=pipelined,
            store_below=store_below,
        )
        self.held = Holdings(self.blocks, self.tiers, block_size, window)
        self._sharing = Sharing(self._tables, self.blocks, self.tiers, block_size)

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
        self._sharing.extend(table, tokens)

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Forget what is at `num_tokens` and after."""
        self._sharing.truncate(table, num_tokens)

    def release(self, table: BlockTable) -> None:
        """The conversation leaves memory: its blocks go, except those that others share."""
        self._sharing.release(table)

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
        first = self.held.needed_from(table, num_tokens)
        wanted = np.flatnonzero(self.held.to_load(table, first, num_tokens))[:at_most]
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
        self._sharing.join_twins(table)
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
        if (last := self._schedule_last(table, num_tokens, budget)) is not None:
            return last
        size, blocks = self.block_size, self.blocks
        runs: list[Run] = []
        writes: list[Write] = []
        if self._window is not None and not self._is_nearly_done(table):
            table.cursor = self.held.needed_from(table, num_tokens)
        if not self._fetch(table, num_tokens, now):
            return Scheduled(runs, writes, out_of_slots=True)
        while budget > 0:
            start = table.cursor * size
            want = min(size, num_tokens - start)
            if want <= 0:
                break
            if table.cursor == len(table):
                self._sharing.append(table)
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
                blocks.num_valid[block] = num_valid  # not idle before its step is settled, so not counted
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
        self.tiers.check(self._sharing.check())

    # -- private

    def _schedule_last(self, table: BlockTable, num_tokens: int, budget: int) -> Scheduled | None:
        """As `schedule`, where only the end of a block that has begun is missing: mostly a turn decodes."""
        blocks, start = self.blocks, table.cursor * self.block_size
        end = num_tokens - start
        if table.cursor != len(table) - 1 or end > self.block_size:
            return None
        block = table[table.cursor]
        scheduled = blocks.num_scheduled.item(block)
        if not 0 < scheduled < end <= scheduled + budget:
            return None
        blocks.num_scheduled[block] = end
        table.cursor += end == self.block_size
        write = Write(block, blocks.generation.item(block), end)
        return Scheduled([Run(start + scheduled, end - scheduled)], [write])

    def _fetch(self, table: BlockTable, num_tokens: int, now: float) -> bool:
        """Begin to load what is on the host of the first `num_tokens` tokens; False if slots ran out."""
        first = table.cursor
        if not self.tiers.host.num_slots or first >= len(table):
            return True
        for i in np.flatnonzero(self.held.to_load(table, first, num_tokens)).tolist():
            if not self.tiers.begin_load(table[first + i], now):
                return False
        return True

    def _is_nearly_done(self, table: BlockTable) -> bool:
        """At most a part of the last block is missing, as it mostly is."""
        left = len(table) - table.cursor
        return left < 1 or left == 1 and self.blocks.num_scheduled.item(table[table.cursor]) > 0

    def _is_on_host(self, block: int) -> bool:
        return self.blocks.host_valid.item(block) > 0
