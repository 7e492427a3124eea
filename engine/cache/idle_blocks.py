"""Which blocks may be evicted, and how many they are.

A block is idle when neither a running turn nor a step that has not ended needs it.  How many idle blocks hold
a slot is asked at every step, so it is kept rather than found: whatever changes a block counts it out before
and in again afterwards.
"""

import numpy as np
from numpy.typing import NDArray

from engine.cache.block import NO_SLOT, BlockIds, Blocks
from engine.cache.eviction import Way, may_go
from engine.errors import InvariantError


class IdleBlocks:
    def __init__(self, blocks: Blocks) -> None:
        self.settled = 0  # number of the last step that has ended
        self.num_evictable = 0  # with a device slot
        self.num_clean = 0  # those of them that are on the host as well: making room costs nothing
        self.num_on_host = 0
        self._blocks = blocks

    def are(self, ids: BlockIds) -> NDArray[np.bool_]:
        """Which of `ids` are idle."""
        idle: NDArray[np.bool_] = self._blocks.num_active[ids] == 0
        return idle & (self._blocks.last_step[ids] <= self.settled)

    def is_one(self, block: int) -> bool:
        return not self._blocks.num_active.item(block) and self._blocks.last_step.item(block) <= self.settled

    def count(self, ids: BlockIds, by: int) -> None:
        """Around every change to `ids`, which must all differ: first with -1, then with +1."""
        idle = ids[self.are(ids)]
        if not len(idle):
            return
        blocks = self._blocks
        on_device = blocks.slot[idle] != NO_SLOT
        is_clean = blocks.host_valid[idle] >= blocks.num_valid[idle]
        self.num_evictable += by * int(np.count_nonzero(on_device))
        self.num_clean += by * int(np.count_nonzero(on_device & is_clean))
        self.num_on_host += by * int(np.count_nonzero(blocks.host_slot[idle] != NO_SLOT))

    def count_one(self, block: int, by: int) -> None:
        if not self.is_one(block):
            return
        blocks = self._blocks
        if blocks.slot.item(block) != NO_SLOT:
            self.num_evictable += by
            if blocks.host_valid.item(block) >= blocks.num_valid.item(block):
                self.num_clean += by
        if blocks.host_slot.item(block) != NO_SLOT:
            self.num_on_host += by

    def num_that_may_go(self, way: Way) -> int:
        return {
            Way.OFF_DEVICE: self.num_evictable,
            Way.OFF_DEVICE_AT_NO_COST: self.num_clean,
            Way.TO_HOST: self.num_evictable - self.num_clean,
            Way.OFF_HOST: self.num_on_host,
        }[way]

    def check(self, ids: BlockIds) -> None:
        """`ids` are all blocks that tables name.  Raises InvariantError."""
        for way in Way:
            found = int(np.count_nonzero(may_go(self._blocks, ids, way, self.settled)))
            if self.num_that_may_go(way) != found:
                raise InvariantError(
                    f"{self.num_that_may_go(way)} blocks may go {way.name}: there are {found}"
                )
