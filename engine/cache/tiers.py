"""The slots of two tiers and who is in them: the one writer of residency.

A block's copy between the tiers is begun here, belongs to the step that is planned next, and is committed or
rolled back when that step has ended; until then nothing may evict the block.  A stored block stays valid on
the device until its slot is handed out (lazy reclamation).  With a host tier of no slots, leaving the device
is leaving altogether.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.cache.block import LOADING, NO_SLOT, NOT_COPIED, STORING, BlockIds, BlockMove, Blocks, Copy
from engine.cache.block_pool import BlockPool
from engine.cache.block_table import BlockTable, BlockTables
from engine.cache.costs import CostTable, reload_is_cheaper
from engine.cache.eviction import Candidate, Ranking, Way
from engine.cache.idle_blocks import IdleBlocks
from engine.cache.policy import Policy
from engine.errors import InvariantError

STORE_BELOW = 0.25
"""Share of the device slots: blocks are copied to the host ahead of time while fewer are free or clean."""
STORE_ALWAYS = 1.0
"""Eagerly: an idle block is clean soon, and leaves the device at no cost when a crowd comes at once."""
STORE_ANYWAY_BELOW = 0.1
"""While blocks are loaded, none are stored, unless fewer than this are free or clean."""
MADE_ROOM_FOR = 4
"""Slots that are emptied at once."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Of the device tier unless a name says host; the last four since the start."""

    num_slots: int
    num_free: int
    num_evictable: int
    num_host_slots: int
    num_host_free: int
    num_host_evictable: int
    num_evicted: int  # blocks whose KV was given up on both tiers
    num_stored: int
    num_loaded: int
    num_failed_copies: int


class Tiers:
    def __init__(
        self,
        tables: BlockTables,
        blocks: Blocks,
        device: BlockPool,
        host: BlockPool,
        block_size: int,
        policy: Policy,
        costs: CostTable | None,
        *,
        pipelined: bool,
        store_below: float = STORE_BELOW,
    ) -> None:
        """`pipelined`: what is loaded may be attended to in the same step."""
        self.device, self.host = device, host
        self.policy = policy
        self.idle = IdleBlocks(blocks)
        self._launched = 0  # number of the last step that was planned
        self._tables, self._blocks = tables, blocks
        self._block_size = block_size
        self._costs = costs  # None: loading is always cheaper
        self._pipelined = pipelined
        self._store_below = store_below
        self._copies: dict[int, Copy] = {}  # by block, begun and not yet ended
        self._begun: list[Copy] = []  # those of them for the next step
        self._twice: dict[int, None] = {}  # rows of running conversations with copies on the host
        self._leaving: set[int] = set()  # named by no table, but a launched step still touches them
        self._num_storing = self._num_evicted = self._num_stored = self._num_loaded = self._num_failed = 0
        self._ranking = Ranking(tables, blocks, policy, block_size)
        self._may_store = True  # False: the host refused or a copy failed, and nothing has become idle since

    @property
    def num_available(self) -> int:
        """Device slots that are free or can be made free."""
        return self.device.num_free + self.idle.num_evictable

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            self.device.num_slots,
            self.device.num_free,
            self.idle.num_evictable,
            self.host.num_slots,
            self.host.num_free,
            self.idle.num_on_host,
            self._num_evicted,
            self._num_stored,
            self._num_loaded,
            self._num_failed,
        )

    @property
    def num_per_step(self) -> int:
        """Blocks that a step stores ahead of time, or loads early, at most: its computing waits for them."""
        return max(8, self.device.num_slots // 256)

    # -- steps

    def launch(self, ids: BlockIds) -> tuple[int, tuple[Copy, ...]]:
        """A step is planned that touches `ids`, which may repeat: until it is settled nothing evicts them.
        Returns its number and the copies that it must make: those that have begun since the last one.
        """
        idle = ids[self.idle.are(ids)]
        if len(idle):
            self.idle.count(np.unique(idle), -1)
        self._launched += 1
        self._blocks.last_step[ids] = self._launched
        begun, self._begun = tuple(self._begun), []
        return self._launched, begun

    def settle(
        self, number: int, ids: BlockIds, copies: Sequence[Copy], failed: Collection[BlockMove]
    ) -> list[Copy]:
        """The step has ended: its copies are committed, or rolled back.  Returns those with which KV was
        lost.
        """
        lost = [copy for copy in copies if not self._end(copy, copy.move not in failed)]
        self._num_evicted += len(lost)
        touched = np.concatenate((ids, np.array([copy.block for copy in copies], np.int32)))
        touched = touched[
            (self._blocks.num_active[touched] == 0) & (self._blocks.last_step[touched] == number)
        ]
        self.idle.settled = number
        if len(touched):
            self.idle.count(np.unique(touched), +1)
        for block in [block for block in self._leaving if self._blocks.last_step.item(block) <= number]:
            self._leaving.remove(block)
            self.free(block)
            self._blocks.retire(block)
        return lost

    def _end(self, copy: Copy, ok: bool) -> bool:
        """Returns whether the KV is where the copy brought it, or still where it was."""
        blocks, block = self._blocks, copy.block
        del self._copies[block]
        blocks.copying[block] = NOT_COPIED
        if not ok:
            self._num_failed += 1
            self._may_store = False  # not over and over
        current = blocks.generation.item(block) == copy.generation
        if copy.is_load:
            if ok and current:
                blocks.num_valid[block] = max(blocks.num_valid.item(block), copy.num_tokens)
                blocks.num_scheduled[block] = max(blocks.num_scheduled.item(block), copy.num_tokens)
                self._num_loaded += 1
            elif not ok:
                blocks.num_valid[block] = blocks.num_scheduled[block] = blocks.host_valid[block] = 0
                blocks.generation[block] += 1
                self._give_back_host_slot(block)
            return ok
        self._num_storing -= 1
        if ok and current:
            blocks.host_valid[block] = copy.num_tokens
            self._num_stored += 1
            return True
        self._give_back_host_slot(block)
        return blocks.slot.item(block) != NO_SLOT

    # -- slots

    def give_slot(self, block: int, now: float) -> bool:
        """A device slot for `block`, at the expense of idle ones; False if there is none."""
        slot = self.device.take()
        if slot is None and self._make_room(now):
            slot = self.device.take()
        if slot is None:
            return False
        self.idle.count_one(block, -1)
        self._blocks.slot[block] = slot
        self.idle.count_one(block, +1)
        return True

    def free(self, block: int) -> None:
        """Nobody needs what `block` holds, on any tier."""
        self._free_slot(block)
        self._free_host_slot(block)

    def retire(self, block: int) -> None:
        """No table names `block` any more: free it now, or when the steps that touch it have ended."""
        if self._blocks.last_step.item(block) > self.idle.settled:
            self._leaving.add(block)
        else:
            self.free(block)
            self._blocks.retire(block)

    def became_active(self, table: BlockTable) -> None:
        """Nobody may evict its blocks from now on.  What the host has of them is there twice, or will be."""
        if (self._blocks.host_slot[table.blocks] != NO_SLOT).any():
            self._twice[table.row] = None

    def became_idle(self, table: BlockTable) -> None:
        """A conversation's blocks can be evicted from now on, or are worth more than before."""
        self._twice.pop(table.row, None)
        self._may_store = True

    # -- copies

    def reloadable(self, ids: BlockIds) -> NDArray[np.int64]:
        """Tokens of each block that are on the host, or on their way, and not on the device."""
        blocks = self._blocks
        copying = blocks.copying[ids]
        tokens = np.where(blocks.num_scheduled[ids] == 0, blocks.host_valid[ids], 0).astype(np.int64)
        for at in np.flatnonzero(copying):
            if copying[at] == LOADING or not blocks.num_scheduled.item(ids[at]):
                tokens[at] = self._copies[ids.item(at)].num_tokens
        return tokens

    def reach(self, block: int) -> int:
        """Tokens that hold KV somewhere, or will."""
        copy = self._copies.get(block)
        on_device, on_host = self._blocks.num_scheduled.item(block), self._blocks.host_valid.item(block)
        return max(on_device, on_host, 0 if copy is None else copy.num_tokens)

    def worth_loading(self, tokens: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether blocks of which `tokens` are on the host, and which end at `ends`, come from there."""
        if self._costs is None:
            return tokens > 0
        cheaper: NDArray[np.bool_] = reload_is_cheaper(self._costs, ends, tokens / self._block_size)
        return cheaper & (tokens > 0)

    @property
    def has_begun(self) -> bool:
        """There are copies that the next step must make."""
        return bool(self._begun)

    def begin_load(self, block: int, now: float) -> bool:
        """Copy the block to the device in the next step; False if there is no slot for it."""
        blocks, touched = self._blocks, self._blocks.last_step.item(block)
        self._pin(block)  # before room is made for it, at the expense of what else is on the host
        if blocks.slot.item(block) == NO_SLOT and not self.give_slot(block, now):
            blocks.last_step[block] = touched
            self.idle.count_one(block, +1)
            return False
        num_tokens = blocks.host_valid.item(block)
        move = BlockMove(blocks.slot.item(block), blocks.host_slot.item(block))
        self._begin(block, num_tokens, move, LOADING)
        if self._pipelined:
            blocks.num_scheduled[block] = num_tokens
        return True

    def store_ahead(self, now: float) -> None:
        """Begin to copy the least valuable idle blocks to the host if few slots are free or clean."""
        num_slots = self.device.num_slots
        free = self.device.num_free + self.idle.num_clean + self._num_storing
        if not self._may_store or not self.host.num_slots or free >= self._store_below * num_slots:
            return
        if free >= STORE_ANYWAY_BELOW * num_slots and any(copy.is_load for copy in self._copies.values()):
            return
        left = min(int(self._store_below * num_slots) + 1 - free, self.num_per_step)
        for candidate in self._lowest(Way.TO_HOST, now):
            if not self._begin_store(candidate, now):
                break
            left -= 1
            if not left:
                return
        self._may_store = False

    # -- looking in

    def check(self, named: BlockIds) -> None:
        """`named` are the blocks that tables name, each once.  Raises InvariantError."""
        blocks = self._blocks
        every = np.concatenate((named, np.array(sorted(self._leaving), np.int32)))
        for tier, pool, slots in (
            ("device", self.device, blocks.slot[every]),
            ("host", self.host, blocks.host_slot[every]),
        ):
            owned = slots[slots != NO_SLOT]
            if len(np.unique(owned)) != len(owned) or len(owned) + pool.num_free != pool.num_slots:
                raise InvariantError(
                    f"{len(owned)} {tier} slots owned, {pool.num_free} free, {pool.num_slots} in all"
                )
        no_slot = (blocks.slot[every] == NO_SLOT) & (blocks.num_scheduled[every] > 0)
        no_slot |= (blocks.host_slot[every] == NO_SLOT) & (blocks.host_valid[every] > 0)
        for block in every[no_slot]:
            raise InvariantError(f"{blocks.describe(block)} claims KV without a slot")
        for block in every[
            (blocks.copying[every] != NOT_COPIED) & (blocks.last_step[every] <= self.idle.settled)
        ]:
            raise InvariantError(f"{blocks.describe(block)} is copied by no step")
        if set(every[blocks.copying[every] != NOT_COPIED].tolist()) != set(self._copies):
            raise InvariantError(f"copies are on their way of {sorted(self._copies)}, blocks know of others")
        self.idle.check(named)

    # -- private

    def _lowest(self, way: Way, now: float) -> Iterator[Candidate]:
        return self._ranking.lowest(way, now, self.idle.settled, self.idle.num_that_may_go(way))

    def _make_room(self, now: float) -> bool:
        """Empty a few device slots: clean ones as long as there are any, else those of the least
        valuable blocks, which go to the host if it takes them.
        """
        way = Way.OFF_DEVICE_AT_NO_COST if self.idle.num_clean else Way.OFF_DEVICE
        left = min(MADE_ROOM_FOR, self.idle.num_clean or self.idle.num_evictable)
        if not left:
            return False
        for candidate in self._lowest(way, now):
            if way is Way.OFF_DEVICE_AT_NO_COST:
                self._free_slot(candidate.block)
            elif not self._begin_store(candidate, now, leaves=True):
                self._num_evicted += 1
                self.free(candidate.block)  # on the host there is at most a part of it
            left -= 1
            if not left:
                return True
        raise InvariantError(f"{left} more blocks were counted as evictable than were found")

    def _begin_store(self, candidate: Candidate, now: float, leaves: bool = False) -> bool:
        """Copy the block to the host in the next step, in which its device slot serves another if it
        `leaves`: a step stores before it does anything else.  False if what the host holds is worth more.
        """
        blocks, block = self._blocks, candidate.block
        slot, host_slot = blocks.slot.item(block), blocks.host_slot.item(block)
        if host_slot == NO_SLOT:
            taken = self._take_host_slot(candidate.value, now)
            if taken is None:
                return False
            host_slot = taken
        num_tokens = blocks.num_valid.item(block)
        self._pin(block)
        if leaves:
            self._free_slot(block)
        blocks.host_slot[block], blocks.host_valid[block] = host_slot, 0
        self._begin(block, num_tokens, BlockMove(slot, host_slot), STORING)
        self._num_storing += 1
        for way in (Way.OFF_HOST, Way.OFF_DEVICE_AT_NO_COST):
            self._ranking.may_go_again(way, candidate)
        return True

    def _pin(self, block: int) -> None:
        """The next step touches the block."""
        self.idle.count_one(block, -1)
        self._blocks.last_step[block] = self._launched + 1

    def _begin(self, block: int, num_tokens: int, move: BlockMove, copying: int) -> None:
        self._blocks.copying[block] = copying
        generation = self._blocks.generation.item(block)
        self._copies[block] = copy = Copy(block, generation, num_tokens, move, copying == LOADING)
        self._begun.append(copy)

    def _take_host_slot(self, value: float, now: float) -> int | None:
        slot = self.host.take()
        if slot is None:
            self._make_host_room(value, now)
            slot = self.host.take()
        return slot

    def _make_host_room(self, value: float, now: float) -> None:
        """Empty a few host slots: second copies of what running turns hold on the device, then idle blocks
        that are worth less than `value`.
        """
        left, blocks = MADE_ROOM_FOR, self._blocks
        for row in list(self._twice):
            ids = self._tables[row].blocks
            twice = (blocks.host_slot[ids] != NO_SLOT) & (blocks.num_scheduled[ids] > 0)
            for block in ids[twice & (blocks.copying[ids] == NOT_COPIED)].tolist():
                self._free_host_slot(block)
                left -= 1
                if not left:
                    return
            if not blocks.copying[ids].any():
                del self._twice[row]
        for other in self._lowest(Way.OFF_HOST, now):
            if other.value >= value:
                self._ranking.put_back(Way.OFF_HOST, other)
                return
            self._num_evicted += blocks.slot.item(other.block) == NO_SLOT
            self._free_host_slot(other.block)
            left -= 1
            if not left:
                return

    def _free_slot(self, block: int) -> None:
        blocks = self._blocks
        slot = blocks.slot.item(block)
        if slot == NO_SLOT:
            return
        self.idle.count_one(block, -1)
        self.device.give_back(slot)
        blocks.slot[block] = NO_SLOT
        blocks.num_valid[block] = blocks.num_scheduled[block] = 0
        blocks.generation[block] += 1
        self.idle.count_one(block, +1)

    def _free_host_slot(self, block: int) -> None:
        if self._blocks.host_slot.item(block) == NO_SLOT:
            return
        self.idle.count_one(block, -1)
        self._blocks.host_valid[block] = 0
        self._give_back_host_slot(block)
        self.idle.count_one(block, +1)

    def _give_back_host_slot(self, block: int) -> None:
        """Of a block that nothing counts now."""
        self.host.give_back(self._blocks.host_slot.item(block))
        self._blocks.host_slot[block] = NO_SLOT
