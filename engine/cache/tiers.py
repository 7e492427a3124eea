"""The slots of two tiers and who is in them: the one writer of residency.

A block's copy between the tiers is begun here, belongs to the step that is planned next, and is committed or
rolled back when that step has ended; until then the block is pinned.  A stored block stays valid on the
device until its slot is handed out (lazy reclamation).  With a host tier of no slots, leaving the device is
leaving altogether.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from engine.cache.block import NO_SLOT, Block, BlockMove, BlockTable, Copy
from engine.cache.block_pool import BlockPool
from engine.cache.costs import CostTable, reload_is_cheaper
from engine.cache.eviction import Way, lowest_first, may_go
from engine.cache.policy import Policy
from engine.errors import InvariantError

STORE_BELOW = 0.25
"""Share of the device slots: blocks are copied to the host ahead of time while fewer are free or clean."""
STORE_ANYWAY_BELOW = 0.1
"""While blocks are loaded, none are stored, unless fewer than this are free or clean."""


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
        tables: Iterable[BlockTable],
        device: BlockPool,
        host: BlockPool,
        block_size: int,
        policy: Policy,
        costs: CostTable | None,
    ) -> None:
        self.device, self.host = device, host
        self.policy = policy
        self._tables = tables  # of all conversations in memory, as they are when it is iterated over
        self._block_size = block_size
        self._costs = costs  # None: loading is always cheaper
        self._begun: list[Copy] = []  # for the next step
        self._leaving: set[Block] = set()  # named by no table, but a launched step still touches them
        self._num_evictable = self._num_clean = self._num_host_evictable = self._num_storing = 0
        self._num_evicted = self._num_stored = self._num_loaded = self._num_failed = 0
        self._to_store: deque[tuple[float, Block]] = deque()  # ranked once for several steps
        self._ranked_at = 0.0
        self._may_store = True  # False: the host refused or a copy failed, and nothing has become idle since

    # -- counts

    @property
    def num_available(self) -> int:
        """Device slots that are free or can be made free."""
        return self.device.num_free + self._num_evictable

    @property
    def num_clean(self) -> int:
        """Device slots that can be made free at no cost: their blocks are on the host as well."""
        return self._num_clean

    def count(self, block: Block, by: int) -> None:
        """Around every change to a block: first with -1, then with +1."""
        if block.num_active or block.num_pins:
            return
        if block.slot != NO_SLOT:
            self._num_evictable += by
            if block.host_valid >= block.num_valid:
                self._num_clean += by
        if block.host_slot != NO_SLOT:
            self._num_host_evictable += by

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            self.device.num_slots,
            self.device.num_free,
            self._num_evictable,
            self.host.num_slots,
            self.host.num_free,
            self._num_host_evictable,
            self._num_evicted,
            self._num_stored,
            self._num_loaded,
            self._num_failed,
        )

    # -- pins

    def pin(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if not block.num_active:
                self.count(block, -1)
            block.num_pins += 1

    def unpin(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            block.num_pins -= 1
            if not block.num_active:
                self.count(block, +1)
            if not block.num_pins and block in self._leaving:
                self._leaving.remove(block)
                self.free(block)

    # -- slots

    def give_slot(self, block: Block, now: float) -> bool:
        """A device slot for `block`, at the expense of idle ones; False if there is none."""
        slot = self.device.take()
        if slot is None and self._make_room(now):
            slot = self.device.take()
        if slot is None:
            return False
        self.count(block, -1)
        block.slot = slot
        self.count(block, +1)
        return True

    def free(self, block: Block) -> None:
        """Nobody needs what `block` holds, on any tier, or nobody will once the step has ended."""
        if block.num_pins:
            self._leaving.add(block)
        else:
            self._free_slot(block)
            self._free_host_slot(block)

    def became_idle(self) -> None:
        self._may_store = True

    # -- copies

    def can_reload(self, block: Block, end: int) -> bool:
        """Whether the KV of a block that ends at token `end` comes from the host when it is needed."""
        num_tokens = block.num_reloadable
        if not num_tokens:
            return False
        share = num_tokens / self._block_size
        return self._costs is None or reload_is_cheaper(self._costs, end, share)

    def begin_load(self, block: Block, now: float) -> bool:
        """Copy the block to the device in the next step; False if there is no slot for it."""
        if block.slot == NO_SLOT and not self.give_slot(block, now):
            return False
        self._begin(block, block.host_valid, BlockMove(block.slot, block.host_slot), is_load=True)
        return True

    def store_ahead(self, now: float) -> None:
        """Begin to copy the least valuable idle blocks to the host if few slots are free or clean."""
        num_slots = self.device.num_slots
        free = self.device.num_free + self._num_clean + self._num_storing
        loads = any(copy.is_load for copy in self._begun)
        threshold = STORE_ANYWAY_BELOW if loads else STORE_BELOW
        if not self._may_store or not self.host.num_slots or free >= threshold * num_slots:
            return
        left = min(int(STORE_BELOW * num_slots) + 1 - free, max(1, num_slots // 32))
        while left:
            if not self._to_store:
                ranked = lowest_first(self._tables, Way.TO_HOST, self.policy, self._block_size, now)
                self._to_store.extend(islice(ranked, max(1, num_slots // 64)))
                self._ranked_at = now
            if not self._to_store:
                self._may_store = False
                return
            value, block = self._to_store.popleft()
            if may_go(block, Way.TO_HOST) and block.last_used <= self._ranked_at:
                if not self._begin_store(block, value, now):
                    self._may_store = False
                    return
                left -= 1

    def take_begun(self) -> tuple[Copy, ...]:
        """The copies that have begun since the last call: the step that is planned now must make them."""
        begun, self._begun = tuple(self._begun), []
        return begun

    def settle(self, copies: Sequence[Copy], failed: Collection[BlockMove]) -> list[Copy]:
        """Commit copies whose step has ended, or roll them back.  Returns those with which KV was lost."""
        lost = []
        for copy in copies:
            block, ok = copy.block, copy.move not in failed
            block.copy = None
            if not ok:
                self._num_failed += 1
                self._may_store = False  # not over and over
            current = block.generation == copy.generation
            if copy.is_load and ok and current:
                block.num_valid = block.num_scheduled = copy.num_tokens
                self._num_loaded += 1
            elif copy.is_load and not ok:
                block.host_valid = 0
                self._give_back_host_slot(block)
                lost.append(copy)
            elif not copy.is_load:
                self._num_storing -= 1
                if ok and current:
                    block.host_valid = copy.num_tokens
                    self._num_stored += 1
                else:
                    self._give_back_host_slot(block)
                    if block.slot == NO_SLOT:
                        lost.append(copy)
            self.unpin([block])
        self._num_evicted += len(lost)
        return lost

    # -- looking in

    def check(self, named: Collection[Block]) -> None:
        """`named` are the blocks that tables name.  Raises InvariantError."""
        blocks = [*named, *self._leaving]
        for tier, pool, owned in (
            ("device", self.device, [block.slot for block in blocks if block.slot != NO_SLOT]),
            ("host", self.host, [block.host_slot for block in blocks if block.host_slot != NO_SLOT]),
        ):
            if len(set(owned)) != len(owned) or len(owned) + pool.num_free != pool.num_slots:
                raise InvariantError(
                    f"{len(owned)} {tier} slots owned, {pool.num_free} free, {pool.num_slots} in all"
                )
        for block in blocks:
            if (block.slot == NO_SLOT and block.num_scheduled) or (
                block.host_slot == NO_SLOT and block.host_valid
            ):
                raise InvariantError(f"{block!r} claims KV without a slot")
            if block.copy is not None and not block.num_pins:
                raise InvariantError(f"{block!r} is copied without a pin")
        counted = (self._num_evictable, self._num_clean, self._num_host_evictable)
        found = (
            sum(block.evictable for block in named),
            sum(block.evictable and block.clean for block in named),
            sum(block.evictable_from_host for block in named),
        )
        if counted != found:
            raise InvariantError(f"evictable, clean, evictable from host: counted {counted}, found {found}")

    # -- private

    def _make_room(self, now: float) -> bool:
        """Empty a few device slots at once, so that ranking costs little per block: clean ones as long as
        there are any, else those of the least valuable blocks, which go to the host if it takes them.
        """
        left = max(1, self.device.num_slots // 64)
        only_clean = self._num_clean > 0
        left = min(left, self._num_clean if only_clean else self._num_evictable)
        if not left:
            return False
        for value, block in lowest_first(self._tables, Way.OFF_DEVICE, self.policy, self._block_size, now):
            if not may_go(block, Way.OFF_DEVICE) or (only_clean and not block.clean):
                continue
            if block.clean:
                self._free_slot(block)
            elif not self._begin_store(block, value, now, leaves=True):
                self._num_evicted += 1
                self._free_slot(block)
                self._free_host_slot(block)  # at most a part of it
            left -= 1
            if not left:
                return True
        raise InvariantError(f"{left} more blocks were counted as evictable than were found")

    def _begin_store(self, block: Block, value: float, now: float, leaves: bool = False) -> bool:
        """Copy the block to the host in the next step, in which its device slot serves another if it
        `leaves`: a step stores before it does anything else.  False if what the host holds is worth more.
        """
        if block.host_slot == NO_SLOT and not self._take_host_slot(block, value, now):
            return False
        self.count(block, -1)
        block.host_valid = 0
        self.count(block, +1)
        move, num_tokens = BlockMove(block.slot, block.host_slot), block.num_valid
        if leaves:
            self._free_slot(block)
        self._num_storing += 1
        self._begin(block, num_tokens, move, is_load=False)
        return True

    def _begin(self, block: Block, num_tokens: int, move: BlockMove, *, is_load: bool) -> None:
        self.pin([block])
        block.copy = Copy(block, block.generation, num_tokens, move, is_load)
        self._begun.append(block.copy)

    def _take_host_slot(self, block: Block, value: float, now: float) -> bool:
        slot = self.host.take()
        if slot is None:
            self._make_host_room(value, now)
            slot = self.host.take()
        if slot is None:
            return False
        self.count(block, -1)
        block.host_slot = slot
        self.count(block, +1)
        return True

    def _make_host_room(self, value: float, now: float) -> None:
        """Empty a few host slots: second copies of what running turns hold on the device, then idle blocks
        that are worth less than `value`.
        """
        left = max(1, self.host.num_slots // 64)
        for table in self._tables:
            for block in table.blocks if table.is_active else ():
                if block.host_slot != NO_SLOT and block.num_scheduled and block.copy is None:
                    self._free_host_slot(block)
                    left -= 1
                    if not left:
                        return
        for other, block in lowest_first(self._tables, Way.OFF_HOST, self.policy, self._block_size, now):
            if other >= value:
                return
            if may_go(block, Way.OFF_HOST):
                self._num_evicted += block.slot == NO_SLOT
                self._free_host_slot(block)
                left -= 1
                if not left:
                    return

    def _free_slot(self, block: Block) -> None:
        if block.slot == NO_SLOT:
            return
        self.count(block, -1)
        self.device.give_back(block.slot)
        block.slot = NO_SLOT
        block.num_valid = block.num_scheduled = 0
        block.generation += 1
        self.count(block, +1)

    def _free_host_slot(self, block: Block) -> None:
        if block.host_slot == NO_SLOT:
            return
        self.count(block, -1)
        block.host_valid = 0
        self._give_back_host_slot(block)
        self.count(block, +1)

    def _give_back_host_slot(self, block: Block) -> None:
        """Of a block that nothing counts now."""
        self.host.give_back(block.host_slot)
        block.host_slot = NO_SLOT
