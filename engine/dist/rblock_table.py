"""The physical rBlocks of one rank: whose KV each of them holds (DistKV-LLM, rManager).

One table and one pool per tier serve callers of this rank and of others alike.
"""

from collections.abc import Iterable, KeysView
from typing import Protocol

from engine.dist.entries import PlacementEntry, RankId, Tier
from engine.errors import InvariantError


class Pool(Protocol):
    """What is asked of a tier's `engine.cache.block_pool.BlockPool`."""

    num_slots: int

    @property
    def num_free(self) -> int: ...

    def take(self) -> int | None: ...

    def give_back(self, slot: int) -> None: ...


Owner = tuple[str, RankId, Tier]
"""A conversation, its home, and the tier here."""


class RBlockTable:
    def __init__(self, rank: RankId, device: Pool, host: Pool) -> None:
        self.pools = {Tier.DEVICE: device, Tier.HOST: host}
        self.num_lent = {Tier.DEVICE: 0, Tier.HOST: 0}  # slots that callers of other ranks have
        self._rank = rank
        self._slots: dict[Owner, dict[int, None]] = {}  # in the order of the conversation
        self._changed: dict[Owner, None] = {}

    def allocate(
        self, home: RankId, conversation: str, num_blocks: int, tier: Tier, *, leading: bool = False
    ) -> tuple[int, ...] | None:
        """All of the slots, or None and nothing has changed.  `leading`: for blocks that come before those
        which the conversation has here.
        """
        pool = self.pools[tier]
        if num_blocks > pool.num_free:
            return None
        taken = [pool.take() for _ in range(num_blocks)]
        slots = tuple(slot for slot in taken if slot is not None)
        if len(slots) != num_blocks:
            raise InvariantError(f"a pool with {num_blocks} free slots gave {len(slots)}")
        owner = (conversation, home, tier)
        new = dict.fromkeys(slots)
        if leading:
            self._slots[owner] = new | self._slots.get(owner, {})
        else:
            self._slots.setdefault(owner, {}).update(new)
        self._count(owner, len(slots))
        return slots

    def free(self, home: RankId, conversation: str, tier: Tier, slots: Iterable[int]) -> None:
        owner = (conversation, home, tier)
        held, pool, num_freed = self._slots.get(owner, {}), self.pools[tier], 0
        for slot in slots:
            if slot not in held:
                raise InvariantError(f"{tier.name} slot {slot} of rank {self._rank} is not {owner}'s")
            del held[slot]
            pool.give_back(slot)
            num_freed += 1
        if not held:
            self._slots.pop(owner, None)
        self._count(owner, -num_freed)

    def slots(self, home: RankId, conversation: str, tier: Tier) -> KeysView[int]:
        """In the order of the conversation, as far as this rank knows it."""
        return self._slots.get((conversation, home, tier), {}).keys()

    def newest(self, home: RankId, conversation: str, tier: Tier) -> int | None:
        """The last of `slots`."""
        return next(reversed(self._slots.get((conversation, home, tier), {})), None)

    def take_changes(self) -> tuple[PlacementEntry, ...]:
        """The entries that have changed since the last call."""
        changed, self._changed = self._changed, {}
        return tuple(self._entry(owner) for owner in changed)

    def entries(self) -> tuple[PlacementEntry, ...]:
        """All of them."""
        return tuple(self._entry(owner) for owner in self._slots)

    def owners(self) -> dict[tuple[Tier, int], Owner]:
        """Of every slot that has one, for checks."""
        return {(owner[2], slot): owner for owner, slots in self._slots.items() for slot in slots}

    def _entry(self, owner: Owner) -> PlacementEntry:
        conversation, home, tier = owner
        return PlacementEntry(conversation, self._rank, home, len(self._slots.get(owner, ())), tier)

    def _count(self, owner: Owner, change: int) -> None:
        if change:
            self._changed[owner] = None
            if owner[1] != self._rank:
                self.num_lent[owner[2]] += change
