"""How blocks go to another rank, or do not, case by case; tests/dist/test_protocol.py has the rest."""

import pytest

from engine.dist.entries import (
    BlocksMoved,
    CandidatesWanted,
    Commit,
    LoanId,
    Message,
    MoveOrder,
    Plan,
    RankId,
    Release,
    Reserve,
    Reserved,
    SendBlocks,
    SettleOrder,
    Tier,
)
from engine.errors import InvariantError
from tests.dist.ranks import LENDING, Ranks, ask, bodies, free_of, lender, lent

DEVICE, HOST = Tier.DEVICE, Tier.HOST


def test_the_last_block_goes_to_who_asks_first():
    manager = lender()
    manager.allocate("near", 7, DEVICE)
    assert ask(manager, 1, 1, 1) is not None
    assert ask(manager, 2, 1, 1) is None


def test_asking_twice_reserves_once():
    manager = lender()
    assert ask(manager, 1, 1, 2) == ask(manager, 1, 1, 2)
    assert manager.table.num_lent[DEVICE] == 2


def test_no_more_is_lent_than_the_cap():
    manager = lender()
    assert manager.state().device_lendable == 6  # three quarters of 8
    assert ask(manager, 1, 1, 6) is not None
    assert (manager.state().device_lendable, manager.state().device_free) == (0, 2)
    assert ask(manager, 1, 2, 1) is None
    assert manager.allocate("near", 2, DEVICE) is not None


def test_a_rank_without_room_refuses_and_asks_nobody_else():
    """`ask` sees to it that the refusal is all that is said, now and later."""
    manager = lender()
    manager.allocate("near", 8, DEVICE)
    assert ask(manager, 1, 1, 1) is None
    manager.tick(100.0)
    assert not [
        e for e in manager.collect() if isinstance(e, Message) and isinstance(e.body, CandidatesWanted)
    ]


def test_nothing_is_reserved_for_no_blocks():
    manager = lender()
    assert ask(manager, 1, 1, 0) is None
    assert ask(manager, 1, 2, -3) is None


def test_a_reservation_expires():
    manager = lender()
    loan = ask(manager, 1, 1, 3)
    manager.tick(LENDING.reservation_s)
    assert manager.table.pools[DEVICE].num_free == 8
    manager.collect()
    manager.receive(Message(RankId(1), 1, RankId(0), Commit(loan)), LENDING.reservation_s)
    (answer,) = manager.collect()
    assert answer.body.ok is False


def test_local_callers_get_all_or_nothing():
    manager = lender()
    assert manager.allocate("near", 9, DEVICE) is None
    assert len(manager.allocate("near", 8, DEVICE) or ()) == 8
    with pytest.raises(InvariantError):
        manager.free("other", DEVICE, [0], 0.0)


def test_a_move_frees_the_leading_blocks_at_home_and_keeps_the_newest():
    ranks = Ranks(2)
    ranks.grow(0, "a", 4)
    assert ranks.ranks[RankId(0)].manager.move("a", 9, DEVICE, RankId(1), DEVICE, 0.0) == 3
    ranks.collect()
    ranks.flow()
    assert free_of(ranks, 0) == 7 and free_of(ranks, 1) == 5
    ranks.check()
    ranks.settle()
    ranks.check_agreement()


def test_a_stale_plan_is_refused_nothing_is_sent_and_nothing_leaks():
    ranks = Ranks(2)
    ranks.grow(0, "a", 5)
    ranks.grow(1, "b", 8)  # since the gManager has heard of it
    order = MoveOrder("a", 3, RankId(0), RankId(1), DEVICE)
    ranks.messages.append(Message(None, 1, RankId(0), Plan(1, 1, (order,), ())))
    ranks.flow()
    assert ranks.ranks[RankId(0)].num_failed == 1
    assert (free_of(ranks, 0), free_of(ranks, 1)) == (3, 0)
    assert not ranks.copies and not ranks.ranks[RankId(0)].manager.owed()


def test_a_plan_for_what_is_gone_does_nothing():
    ranks = Ranks(2)
    order = MoveOrder("gone", 3, RankId(0), RankId(1), DEVICE)
    ranks.messages.append(Message(None, 1, RankId(0), Plan(1, 1, (order,), ())))
    ranks.flow()
    assert not ranks.messages and not ranks.copies


def test_an_older_plan_is_ignored():
    ranks = Ranks(2)
    lent(ranks)
    for number in (2, 1, 2):
        settle = SettleOrder(RankId(0), RankId(1), 1)
        ranks.messages.append(Message(None, 1, RankId(0), Plan(1, number, (), (settle,))))
    for _ in range(4):
        ranks.flow()
        ranks.advance(0.1)
    assert sum(ranks.ranks[RankId(0)].manager.owed().values()) == 2


def test_a_copy_that_is_cut_leaves_all_blocks_at_home():
    ranks = Ranks(2)
    ranks.grow(0, "a", 4)
    ranks.ranks[RankId(0)].manager.move("a", 3, DEVICE, RankId(1), DEVICE, 0.0)
    ranks.collect()
    while not ranks.copies:
        ranks.deliver(0)
    ranks.begin_copy(ranks.copies[0])
    ranks.end_copy(ranks.copies[0], False)
    ranks.flow()
    assert (free_of(ranks, 0), free_of(ranks, 1)) == (4, 8)
    ranks.check()


def test_the_slots_of_a_copy_serve_nobody_else_until_it_ends():
    ranks = Ranks(2)
    ranks.grow(0, "a", 4)
    ranks.ranks[RankId(0)].manager.move("a", 3, DEVICE, RankId(1), DEVICE, 0.0)
    ranks.collect()
    while not ranks.copies:
        ranks.deliver(0)
    (copy,) = ranks.copies
    ranks.begin_copy(copy)
    ranks.advance(LENDING.reservation_s)
    assert free_of(ranks, 1) == 5  # the reservation is over, the copy is not
    assert ranks.ranks[RankId(1)].manager.hold(copy.action.loan) is None
    ranks.end_copy(copy, True)
    assert free_of(ranks, 1) == 8
    ranks.flow()
    assert not ranks.ranks[RankId(0)].manager.owed()
    ranks.check()


def test_borrowing_asks_the_candidates_in_turn():
    ranks = Ranks(4, per_node=4)
    for rank in range(4):
        ranks.grow(rank, "a", 4)
    ranks.advance(0.1)
    ranks.flow()
    ranks.grow(1, "b", 4)  # the first candidate, full by the time that it is asked
    assert ranks.ranks[RankId(0)].manager.borrow("a", 3, DEVICE, DEVICE, ranks.now) == 3
    ranks.collect()
    ranks.flow()
    assert {loan.creditor for loan in ranks.ranks[RankId(0)].manager.owed()} == {2}


def test_a_grant_that_comes_too_late_is_given_back():
    ranks = Ranks(2)
    ranks.grow(0, "a", 4)
    ranks.ranks[RankId(0)].manager.move("a", 3, DEVICE, RankId(1), DEVICE, 0.0)
    ranks.collect()
    (reserve,) = bodies(ranks, Reserve)
    ranks.messages.clear()
    for _ in range(LENDING.max_tries):
        ranks.advance(LENDING.reply_s)
        ranks.messages.clear()
    assert ranks.ranks[RankId(0)].num_failed == 1
    ranks.messages.append(reserve)
    ranks.deliver(0)
    assert free_of(ranks, 1) == 5
    ranks.flow()
    assert free_of(ranks, 1) == 8


def test_a_creditor_that_dies_while_blocks_are_sent_costs_only_the_copy():
    ranks = Ranks(2)
    ranks.grow(0, "a", 4)
    manager = ranks.ranks[RankId(0)].manager
    manager.move("a", 3, DEVICE, RankId(1), DEVICE, 0.0)
    ranks.collect()
    while not ranks.copies:
        ranks.deliver(0)
    ranks.crash(1)
    manager.lose(RankId(1), 0.0)
    ranks.collect()
    assert ranks.ranks[RankId(0)].num_failed == 1 and manager.num_moving == 0
    ranks.flow()
    lent(ranks)  # they can be moved again
    ranks.check()


def test_borrowing_ends_without_a_gmanager():
    ranks = Ranks(1)
    ranks.grow(0, "a", 4)
    ranks.ranks[RankId(0)].manager.borrow("a", 3, DEVICE, DEVICE, ranks.now)
    for _ in range(8):
        ranks.advance(0.5)
        ranks.messages.clear()
    assert ranks.ranks[RankId(0)].num_failed == 1


def test_freeing_what_is_being_sent_stops_the_move():
    ranks = Ranks(2)
    ranks.grow(0, "a", 4)
    manager = ranks.ranks[RankId(0)].manager
    manager.move("a", 3, DEVICE, RankId(1), DEVICE, 0.0)
    ranks.collect()
    while not ranks.copies:
        ranks.deliver(0)
    ranks.forget(0, "a")
    ranks.flow()
    assert (free_of(ranks, 0), free_of(ranks, 1)) == (8, 8)
    assert ranks.ranks[RankId(0)].num_failed == 1


def test_only_who_was_asked_can_grant():
    ranks = Ranks(3)
    ranks.grow(0, "a", 4)
    manager = ranks.ranks[RankId(0)].manager
    manager.move("a", 3, DEVICE, RankId(1), DEVICE, 0.0)
    (reserve,) = manager.collect()
    stray = LoanId(RankId(2), 1, 1)
    manager.receive(Message(RankId(2), 1, RankId(0), Reserved(reserve.body.request, stray)), 0.0)
    assert manager.collect() == [Message(RankId(0), 1, RankId(2), Release(stray, 0))]


def test_what_is_moved_is_told_with_its_slots():
    ranks = Ranks(2)
    ranks.grow(0, "a", 3)
    manager = ranks.ranks[RankId(0)].manager
    manager.move("a", 2, DEVICE, RankId(1), HOST, 0.0)
    (reserve,) = manager.collect()
    loan = LoanId(RankId(1), 1, 1)
    manager.receive(Message(RankId(1), 1, RankId(0), Reserved(reserve.body.request, loan)), 0.0)
    assert manager.collect() == [SendBlocks(loan, "a", DEVICE, (0, 1))]
    manager.sent(loan, True, 0.0)
    (commit,) = manager.collect()
    assert commit.body == Commit(loan)
    assert manager.owed() == {}
    assert BlocksMoved not in map(type, manager.collect())
