import random
from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.dist.entries import RankId
from engine.dist.settlement import settle

EDGES = st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda edge: edge[0] != edge[1])
DEBTS = st.dictionaries(EDGES.map(lambda edge: (RankId(edge[0]), RankId(edge[1]))), st.integers(1, 60))


def net(debts: dict[tuple[RankId, RankId], int]) -> Counter[RankId]:
    """What each rank owes less what it is owed: the blocks by which its conversations exceed its memory."""
    owed: Counter[RankId] = Counter()
    for (debtor, creditor), num_blocks in debts.items():
        owed[debtor] += num_blocks
        owed[creditor] -= num_blocks
    return owed


@given(DEBTS, st.integers(1, 20), st.integers(0, 99))
def test_settling_keeps_totals_and_lowers_what_is_remote(debts, minimum, seed):
    """With every ring; it ends, respects the minimum, and leaves no ring that is worth it."""
    left = dict(debts)
    rings = settle(debts, minimum, random.Random(seed))
    assert len(rings) <= len(debts)
    remote = [sum(left.values())]
    for ring in rings:
        assert len(set(ring.ranks)) == len(ring.ranks) >= 2
        assert ring.num_blocks >= minimum
        assert ring.num_blocks == min(left[edge] for edge in ring.edges)
        for edge in ring.edges:
            left[edge] -= ring.num_blocks
        assert net(left) == net(debts)
        remote.append(sum(left.values()))
    assert all(after < before for before, after in pairwise(remote))
    assert all(num_blocks >= 0 for num_blocks in left.values())
    assert not has_ring({edge for edge, num_blocks in left.items() if num_blocks >= minimum})


def has_ring(edges: set[tuple[RankId, RankId]]) -> bool:
    """By taking away ranks that owe nobody, over and over."""
    while edges:
        debtors = {debtor for debtor, _ in edges}
        fewer = {(debtor, creditor) for debtor, creditor in edges if creditor in debtors}
        if fewer == edges:
            return True
        edges = fewer
    return False


def test_two_ranks_that_owe_one_another_are_a_ring():
    debts = {(RankId(0), RankId(1)): 9, (RankId(1), RankId(0)): 12}
    (ring,) = settle(debts, 4, random.Random(0))
    assert set(ring.ranks) == {0, 1} and ring.num_blocks == 9
    assert settle(debts, 10, random.Random(0)) == []


def test_what_a_ring_leaves_of_a_debt_is_not_settled_below_the_minimum():
    zero, one, two = RankId(0), RankId(1), RankId(2)
    debts = {(zero, one): 12, (one, zero): 9, (one, two): 9, (two, zero): 9}
    for seed in range(8):
        (ring,) = settle(debts, 4, random.Random(seed))
        assert ring.num_blocks == 9


def test_a_chain_is_not_settled():
    assert settle({(RankId(0), RankId(1)): 9, (RankId(1), RankId(2)): 9}, 1, random.Random(0)) == []
