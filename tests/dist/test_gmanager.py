"""What the gManager knows, and how it comes to know it again."""

from dataclasses import replace

import pytest

from engine.dist.entries import (
    Candidates,
    CandidatesWanted,
    Heartbeat,
    HeartbeatSeen,
    Message,
    Over,
    PlacementEntry,
    Plan,
    RankId,
    RankState,
    RequestId,
    Tier,
)
from engine.dist.gmanager import GManager
from engine.dist.ledger import Ledger
from engine.dist.performance import Performance
from tests.dist.ranks import PERFORMANCE, ROUNDS, Ranks, lent

DEVICE, HOST = Tier.DEVICE, Tier.HOST


def state(rank: int, free: int, *, node: int = 0, epoch: int = 1, host_free: int = 0) -> RankState:
    return RankState(RankId(rank), node, 100, free, free, 100, host_free, host_free, 0, 0, 8, epoch)


def heartbeat(
    rank: int, number: int, *entries: PlacementEntry, full: bool = False, epoch: int = 1, free: int = 50
) -> Message:
    about = state(rank, free, epoch=epoch)
    return Message(RankId(rank), epoch, None, Heartbeat(RankId(rank), epoch, number, about, entries, full))


def entry(name: str, rank: int, home: int, num_blocks: int) -> PlacementEntry:
    return PlacementEntry(name, RankId(rank), RankId(home), num_blocks, DEVICE)


def gmanager() -> GManager:
    return GManager(1, PERFORMANCE, ROUNDS, 0, 0.0)


def wants_full(manager: GManager, message: Message) -> bool:
    manager.receive(message, 0.0)
    (seen,) = manager.collect()
    assert isinstance(seen, Message) and isinstance(seen.body, HeartbeatSeen)
    return seen.body.full_wanted


# -- the ledger


def test_candidates_are_near_first_and_then_roomy():
    ledger = Ledger()
    ledger.hear(state(0, 0), [], True)
    for rank, free, node in ((1, 20, 0), (2, 30, 0), (3, 90, 1), (4, 5, 0), (5, 80, 1)):
        ledger.hear(state(rank, free, node=node), [], True)
    assert ledger.candidates(RankId(0), 10, DEVICE) == (2, 1, 3)
    assert ledger.candidates(RankId(0), 10, HOST) == ()


def test_who_has_lent_what_it_may_is_no_candidate():
    ledger = Ledger()
    ledger.hear(replace(state(1, 50), device_lendable=9), [], True)
    assert ledger.candidates(RankId(0), 10, DEVICE) == ()
    assert ledger.candidates(RankId(0), 9, DEVICE) == (1,)


def test_those_who_ask_at_once_are_sent_to_different_ranks():
    ledger = Ledger()
    for rank, free in ((0, 0), (1, 0), (2, 30), (3, 25)):
        ledger.hear(state(rank, free), [], True)
    assert ledger.candidates(RankId(0), 20, DEVICE) == (2, 3)
    assert ledger.candidates(RankId(1), 20, DEVICE) == (3,)
    ledger.hear(state(2, 30), [], False)  # it still has room, after all
    assert ledger.candidates(RankId(1), 20, DEVICE) == (2,)


def test_debts_follow_the_entries():
    ledger = Ledger()
    ledger.hear(state(1, 50), [entry("a", 1, 0, 7), entry("b", 1, 2, 3), entry("c", 1, 1, 9)], True)
    assert ledger.debts == {(0, 1): 7, (2, 1): 3}
    ledger.hear(state(1, 50), [entry("a", 1, 0, 4), entry("b", 1, 2, 0)], False)
    assert ledger.debts == {(0, 1): 4}
    ledger.lose(RankId(0))
    assert ledger.debts == {} and ledger.placement() == {entry("c", 1, 1, 9)}


# -- heartbeats


def test_a_missing_heartbeat_is_noticed():
    manager = gmanager()
    assert wants_full(manager, heartbeat(0, 5, entry("a", 0, 0, 1)))  # who knows what was before
    assert not wants_full(manager, heartbeat(0, 6, entry("a", 0, 0, 2), full=True))
    assert not wants_full(manager, heartbeat(0, 7, entry("a", 0, 0, 3)))
    assert not wants_full(
        manager, heartbeat(0, 6, entry("a", 0, 0, 2), full=True)
    )  # late: it changes nothing
    assert manager.ledger.placement() == {entry("a", 0, 0, 3)}
    assert wants_full(manager, heartbeat(0, 9))


def test_a_new_life_begins_with_nothing():
    manager = gmanager()
    manager.receive(heartbeat(0, 1, entry("a", 0, 0, 1), full=True), 0.0)
    manager.receive(heartbeat(1, 1, entry("a", 1, 0, 1), full=True), 0.0)
    manager.receive(heartbeat(0, 1, full=True, epoch=2), 0.0)
    assert manager.ledger.placement() == set()
    manager.collect()
    manager.receive(heartbeat(0, 9, entry("a", 0, 0, 1), full=True), 0.0)  # of the life before
    assert manager.ledger.placement() == set()
    (seen,) = manager.collect()
    assert seen.body.over == Over(((RankId(0), 2), (RankId(1), 1)))


def test_a_rank_that_is_silent_is_over_and_all_are_told():
    manager = gmanager()
    manager.receive(heartbeat(0, 1, full=True), 0.0)
    manager.receive(heartbeat(1, 1, entry("a", 1, 0, 4), full=True), 0.0)
    manager.receive(heartbeat(1, 2), ROUNDS.lost_after_s - 1)
    manager.collect()
    manager.tick(ROUNDS.lost_after_s)
    told = [message for message in manager.collect() if isinstance(message.body, Over)]
    assert [(message.to, message.body) for message in told] == [(1, Over(((RankId(0), 2), (RankId(1), 1))))]
    assert manager.ledger.debts == {}


def test_another_gmanager_has_the_same_map_from_full_heartbeats():
    ranks = Ranks(3)
    lent(ranks, rank=0, to=1)
    lent(ranks, rank=1, to=2)
    ranks.advance(0.1)
    ranks.flow()
    before = ranks.gmanager.ledger
    assert before.debts == {(0, 1): 3, (1, 2): 3}
    ranks.crash_gmanager()
    for _ in range(4):
        ranks.advance(0.25)
        ranks.flow()
    after = ranks.gmanager.ledger
    assert ranks.gmanager.is_whole and after is not before
    assert (after.placement(), after.debts) == (before.placement(), before.debts)


def test_a_rank_that_died_with_the_gmanager_is_missed_by_the_next_one():
    """It has never been heard there; those who owe it and those whom it owes name it."""
    ranks = Ranks(3)
    lent(ranks, rank=0, to=1)
    lent(ranks, rank=1, to=2)
    ranks.crash_gmanager()
    ranks.cut.add(RankId(1))
    for _ in range(30):
        ranks.advance(0.25)
        ranks.flow()
    assert ranks.ranks[RankId(0)].num_lost == 3
    assert ranks.ranks[RankId(2)].manager.granted() == {}
    assert ranks.gmanager.is_whole and ranks.gmanager.ledger.debts == {}


def test_nothing_is_planned_before_the_map_is_whole():
    manager = gmanager()
    manager.receive(heartbeat(0, 1, entry("a", 0, 1, 9), full=True), 0.0)
    manager.receive(heartbeat(1, 4, entry("b", 1, 0, 9)), 0.0)
    manager.collect()
    manager.tick(ROUNDS.round_s)
    assert manager.collect() == []


# -- orders


def test_who_wants_to_borrow_hears_of_candidates():
    manager = gmanager()
    manager.receive(heartbeat(0, 1, full=True), 0.0)
    manager.receive(heartbeat(1, 1, full=True), 0.0)
    manager.collect()
    request = RequestId(RankId(0), 1, 1)
    manager.receive(Message(RankId(0), 1, None, CandidatesWanted(request, 9, DEVICE)), 0.0)
    assert manager.collect() == [Message(None, 1, RankId(0), Candidates(request, (RankId(1),)))]


def test_mutual_debts_are_settled_once():
    manager = gmanager()
    manager.receive(heartbeat(0, 1, entry("b", 0, 1, 9), full=True), 0.0)
    manager.receive(heartbeat(1, 1, entry("a", 1, 0, 6), full=True), 0.0)
    manager.collect()
    manager.tick(ROUNDS.round_s)
    plans = [message.body for message in manager.collect() if isinstance(message.body, Plan)]
    assert [(order.debtor, order.num_blocks) for plan in plans for order in plan.settlements] == [
        (0, 6),
        (1, 6),
    ]
    manager.tick(2 * ROUNDS.round_s)  # they are at it
    assert not [message for message in manager.collect() if isinstance(message.body, Plan)]


def test_blocks_come_home_when_there_is_room_again():
    manager = gmanager()
    manager.receive(heartbeat(0, 1, full=True, free=60), 0.0)
    manager.receive(heartbeat(1, 1, entry("a", 1, 0, 30), full=True), 0.0)
    manager.collect()
    manager.tick(ROUNDS.round_s)
    (message,) = manager.collect()
    (order,) = message.body.settlements
    assert (order.debtor, order.creditor, order.num_blocks) == (0, 1, 10)  # half of the device stays free


# -- the performance model


def test_rates_are_interpolated_and_hold_beyond_what_was_measured():
    model = Performance(2, 3.0, {1: 10.0, 3: 30.0}, {100: 1e3, 300: 3e3}, 1e-3, 1e-2)
    assert model.linear_s(2) == pytest.approx(2 * 3.0 / 20.0)
    assert model.linear_s(6) == pytest.approx(6 * 3.0 / 30.0)
    assert model.attention_s(200) == pytest.approx(200 / 2e3)
    assert model.attention_s(600) == pytest.approx(600 / 3e3)
    assert model.tokens_per_s(2, 0.1, 0.2) == pytest.approx(2 / (2 * (0.3 + 0.2)))
    assert model.tokens_per_s(0, 0.0) == 0.0


def test_rates_must_be_measured():
    with pytest.raises(ValueError):
        Performance(2, 3.0, {}, {100: 1e3}, 0.0, 0.0)
