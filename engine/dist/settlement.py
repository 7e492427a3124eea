"""Debts that cancel out (DistKV-LLM, DGFM: debt-graph-based fragmented memory management).

Ranks that lend while they are empty and borrow while they are full end up with everybody's blocks at
everybody else's.  Where debts form a ring, each rank on it can have the same number of blocks back, in the
room that the next one gives up, and as many fewer are remote.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from engine.dist.entries import RankId
from engine.dist.ledger import Debts


@dataclass(frozen=True, slots=True)
class Ring:
    """Each rank owes the next one, and the last one the first, at least `num_blocks`."""

    ranks: tuple[RankId, ...]
    num_blocks: int

    @property
    def edges(self) -> tuple[tuple[RankId, RankId], ...]:
        return tuple(zip(self.ranks, self.ranks[1:] + self.ranks[:1], strict=True))


def settle(debts: Debts, minimum: int, rng: random.Random) -> list[Ring]:
    """Rings to be settled, one after the other, until none is left in which all owe `minimum` blocks or more:
    fewer are not worth the exchange.  Every ring ends at least one debt, so there are no more than debts.
    """
    owed = {edge: num_blocks for edge, num_blocks in debts.items() if num_blocks >= max(1, minimum)}
    rings = []
    while ranks := _find_ring(owed, rng):
        ring = Ring(ranks, 0)
        ring = Ring(ranks, min(owed[edge] for edge in ring.edges))
        rings.append(ring)
        for edge in ring.edges:
            owed[edge] -= ring.num_blocks
            if owed[edge] < max(1, minimum):
                del owed[edge]
    return rings


def _find_ring(edges: Iterable[tuple[RankId, RankId]], rng: random.Random) -> tuple[RankId, ...]:
    """Some directed cycle, met first on a walk from a random rank; empty if there is none."""
    creditors: dict[RankId, list[RankId]] = {}
    for debtor, creditor in edges:
        creditors.setdefault(debtor, []).append(creditor)
    starts = sorted(creditors)
    rng.shuffle(starts)
    left = set()  # no ring goes through these
    for start in starts:
        path, ways = [start], [iter(creditors[start])]
        while path:
            following = next((rank for rank in ways[-1] if rank not in left), None)
            if following is None:
                left.add(path.pop())
                ways.pop()
            elif following in path:
                return tuple(path[path.index(following) :])
            else:
                path.append(following)
                ways.append(iter(creditors.get(following, ())))
    return ()
