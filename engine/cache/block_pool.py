"""The blocks of one tier, as integers: who has which slot is the manager's business, what is free is
known here.
"""

import heapq

from engine.errors import InvariantError


class BlockPool:
    """`num_slots` slots, lowest free first, so that neighbours tend to be handed out together."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))  # a heap
        self._is_free = bytearray(b"\1" * num_slots)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A free slot, or None."""
        if not self._free:
            return None
        slot = heapq.heappop(self._free)
        self._is_free[slot] = 0
        return slot

    def give_back(self, slot: int) -> None:
        if self._is_free[slot]:
            raise InvariantError(f"slot {slot} was given back twice")
        self._is_free[slot] = 1
        heapq.heappush(self._free, slot)
