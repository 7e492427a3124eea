"""Who has what and who owes whom, as heartbeats tell it (DistKV-LLM's global debt ledger, Infinite-LLM's
request placement map)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from engine.dist.entries import PlacementEntry, RankId, RankState, Tier

NUM_CANDIDATES = 3

Debts = Mapping[tuple[RankId, RankId], int]
"""Blocks by (debtor, creditor)."""

Holding = tuple[str, RankId, Tier]
"""A conversation, its home, and the tier at the holder."""


class Ledger:
    """As true as the last heartbeats: what a creditor answers is what counts."""

    def __init__(self) -> None:
        self.states: dict[RankId, RankState] = {}
        self._held: dict[RankId, dict[Holding, int]] = {}
        self._debts: Counter[tuple[RankId, RankId]] = Counter()
        self._named: dict[tuple[RankId, Tier], int] = defaultdict(int)  # blocks that were sent there to ask

    def hear(self, state: RankState, entries: Iterable[PlacementEntry], is_full: bool) -> None:
        rank = state.rank
        if is_full:
            self._clear(rank)
        self.states[rank] = state
        held = self._held.setdefault(rank, {})
        for entry in entries:
            key = (entry.conversation, entry.home, entry.tier)
            self._owe(entry.home, rank, entry.num_blocks - held.pop(key, 0))
            if entry.num_blocks:
                held[key] = entry.num_blocks
        for tier in Tier:
            self._named.pop((rank, tier), None)

    def lose(self, rank: RankId) -> None:
        """Its blocks, and those that others keep for it, count as dropped."""
        self._clear(rank)
        self.states.pop(rank, None)
        for holder, held in self._held.items():
            for key in [key for key in held if key[1] == rank]:
                self._owe(rank, holder, -held.pop(key))

    @property
    def debts(self) -> Debts:
        return dict(self._debts)

    def held(self, rank: RankId) -> Mapping[Holding, int]:
        """Blocks that lie at a rank."""
        return self._held.get(rank, {})

    def placement(self) -> set[PlacementEntry]:
        """The whole map."""
        return {
            PlacementEntry(conversation, rank, home, num_blocks, tier)
            for rank, held in self._held.items()
            for (conversation, home, tier), num_blocks in held.items()
        }

    def candidates(self, debtor: RankId, num_blocks: int, tier: Tier) -> tuple[RankId, ...]:
        """Ranks that have so much room as far as is known: those of the debtor's node first, then those with
        most room.  Whoever is named first is taken to be asked, so that not all are sent to one rank.
        """
        own = self.states.get(debtor)
        room = {
            rank: state.lendable(tier) - self._named[rank, tier]
            for rank, state in self.states.items()
            if rank != debtor
        }
        fitting = sorted(
            (rank for rank, free in room.items() if free >= num_blocks),
            key=lambda rank: (own is not None and self.states[rank].node != own.node, -room[rank], rank),
        )[:NUM_CANDIDATES]
        if fitting:
            self._named[fitting[0], tier] += num_blocks
        return tuple(fitting)

    def _clear(self, rank: RankId) -> None:
        for (_, home, _), num_blocks in self._held.pop(rank, {}).items():
            self._owe(home, rank, -num_blocks)

    def _owe(self, debtor: RankId, creditor: RankId, change: int) -> None:
        if debtor != creditor and change:
            self._debts[debtor, creditor] += change
            if not self._debts[debtor, creditor]:
                del self._debts[debtor, creditor]
