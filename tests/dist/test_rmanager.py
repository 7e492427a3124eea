"""What two or three ranks say to one another, case by case; tests/dist/test_protocol.py has the rest."""

import pytest

from engine.cache.block_pool import BlockPool
from engine.dist.entries import (
    BlocksMoved,
    CandidatesWanted,
    Commit,
    Committed,
    LoanId,
    Message,
    MoveOrder,
    Over,
    Plan,
    RankId,
    Release,
    RequestId,
    Reserve,
    Reserved,
    Revoked,
    SendBlocks,
    SettleOrder,
    Tier,
)
from engine.dist.rmanager import RManager
from engine.errors import InvariantError
from tests.dist.ranks import LENDING, Ranks

DEVICE, HOST = Tier.DEVICE, Tier.HOST


def lender(num_device: int = 8) -> RManager:
    manager = RManager(RankId(0), 0, 1, BlockPool(num_device), BlockPool(4), LENDING)
    manager.tick(0.0)
    manager.collect()
    return manager


def ask(manager: RManager, debtor: int, number: int, num_blocks: int, now: float = 0.0) -> LoanId | None:
    """What it answers; it must say nothing else."""
    reserve = Reserve(RequestId(RankId(debtor), 1, number), "far", num_blocks, DEVICE)
    manager.receive(Message(RankId(debtor), 1, RankId(0), reserve), now)
    (answer,) = manager.collect()
    assert isinstance(answer, Message) and isinstance(answer.body, Reserved)
    assert answer.to == debtor and answer.body.request == reserve.request
    return answer.body.loan


def free_of(ranks: Ranks, rank: int, tier: Tier = DEVICE) -> int:
    return ranks.ranks[RankId(rank)].manager.table.pools[tier].num_free


def lent(ranks: Ranks, num_blocks: int = 3, rank: int = 0, to: int = 1) -> None:
    """Rank `rank` keeps so many blocks of its conversation "a" at `to`."""
    ranks.grow(rank, "a", num_blocks + 1)
    ranks.ranks[RankId(rank)].manager.move("a", num_blocks, DEVICE, RankId(to), DEVICE, ranks.now)
    ranks.collect()
    ranks.flow()
    assert sum(ranks.ranks[RankId(rank)].manager.owed().values()) == num_blocks


def bodies(ranks: Ranks, kind: type) -> list[Message]:
    return [message for message in ranks.messages if isinstance(message.body, kind)]


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


def test_blocks_that_came_home_lead_again():
    """The newest block, which is written to, is never the one that moves."""
    ranks = Ranks(2)
    lent(ranks)
    manager = ranks.ranks[RankId(0)].manager
    newest = manager.table.newest(RankId(0), "a", DEVICE)
    manager.bring_home("a", 2, ranks.now)
    ranks.collect()
    ranks.flow()
    assert manager.table.newest(RankId(0), "a", DEVICE) == newest
    assert manager.move("a", 9, DEVICE, RankId(1), DEVICE, ranks.now) == 2
    ranks.collect()
    ranks.flow()
    assert list(manager.table.slots(RankId(0), "a", DEVICE)) == [newest]
    ranks.check()


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


def test_a_recall_that_overtakes_the_commitment_ends_the_move():
    ranks = Ranks(2)
    ranks.grow(0, "a", 4)
    manager = ranks.ranks[RankId(0)].manager
    manager.move("a", 3, DEVICE, RankId(1), DEVICE, 0.0)
    ranks.collect()
    while not bodies(ranks, Committed):
        if ranks.messages:
            ranks.deliver(0)
        else:
            ranks.end_copy(ranks.copies[0], True)
    late = ranks.messages.pop()
    ranks.ranks[RankId(1)].manager.recall(1, DEVICE, 0.0)
    ranks.collect()
    ranks.flow()
    ranks.messages.append(late)
    ranks.flow()
    assert (free_of(ranks, 0), free_of(ranks, 1)) == (4, 8) and not manager.owed()


def test_what_comes_home_for_a_forgotten_conversation_is_freed():
    ranks = Ranks(2)
    lent(ranks)
    ranks.ranks[RankId(0)].manager.bring_home("a", 3, ranks.now)
    ranks.collect()
    ranks.begin_copy(ranks.copies[0])
    ranks.forget(0, "a")
    assert (free_of(ranks, 0), free_of(ranks, 1)) == (5, 5)  # the copy reads and writes them still
    ranks.flow()
    assert (free_of(ranks, 0), free_of(ranks, 1)) == (8, 8)


def test_borrowing_ends_without_a_gmanager():
    ranks = Ranks(1)
    ranks.grow(0, "a", 4)
    ranks.ranks[RankId(0)].manager.borrow("a", 3, DEVICE, DEVICE, ranks.now)
    for _ in range(8):
        ranks.advance(0.5)
        ranks.messages.clear()
    assert ranks.ranks[RankId(0)].num_failed == 1


def test_recalled_blocks_come_home():
    ranks = Ranks(2)
    lent(ranks)
    assert ranks.ranks[RankId(1)].manager.recall(2, DEVICE, ranks.now) == 2
    ranks.collect()
    ranks.flow()
    assert sum(ranks.ranks[RankId(0)].manager.owed().values()) == 1
    assert free_of(ranks, 1) == 7
    ranks.check()


def test_a_rank_that_recalls_lends_nothing_meanwhile():
    manager = lender()
    loan = ask(manager, 1, 1, 2)
    manager.receive(Message(RankId(1), 1, RankId(0), Commit(loan)), 0.0)
    manager.collect()
    assert manager.recall(1, DEVICE, 0.0) == 1
    manager.collect()
    assert ask(manager, 2, 1, 1) is None


def test_blocks_that_do_not_come_home_in_time_are_taken_back():
    """The debtor has no room; what it had there counts as dropped, and it is not used again."""
    ranks = Ranks(2)
    lent(ranks)
    ranks.grow(0, "b", 7)
    ranks.grow(0, "c", 4, HOST)
    ranks.ranks[RankId(1)].manager.recall(2, DEVICE, ranks.now)
    ranks.settle(LENDING.recall_s + 1)
    assert ranks.ranks[RankId(0)].num_lost == 2
    assert free_of(ranks, 1) == 7
    ranks.check_agreement()


def test_a_debtor_hears_of_what_was_taken_back_though_messages_are_lost():
    ranks = Ranks(2)
    lent(ranks)
    ranks.ranks[RankId(1)].manager.recall(3, DEVICE, ranks.now)
    ranks.collect()
    ranks.messages.clear()
    ranks.advance(LENDING.recall_s)
    assert bodies(ranks, Revoked)
    ranks.messages.clear()
    assert ranks.ranks[RankId(0)].manager.owed()
    ranks.advance(LENDING.reply_s)
    ranks.flow()
    assert not ranks.ranks[RankId(0)].manager.owed() and ranks.ranks[RankId(0)].num_lost == 3
    ranks.advance(LENDING.reply_s)
    assert not bodies(ranks, Revoked)  # it was answered


def test_a_lost_creditor_costs_its_blocks_and_a_lost_debtor_frees_them():
    ranks = Ranks(3)
    lent(ranks, rank=0, to=1)
    lent(ranks, rank=1, to=2)
    ranks.crash(1)
    ranks.settle()
    assert ranks.ranks[RankId(0)].num_lost == 3
    assert free_of(ranks, 2) == 8
    ranks.check()
    ranks.check_agreement()


def test_a_rank_that_was_taken_for_lost_goes_on_under_a_new_epoch():
    ranks = Ranks(3)
    lent(ranks, rank=0, to=1)
    lent(ranks, rank=1, to=2)
    ranks.advance(0.1)
    ranks.flow()
    ranks.cut.add(RankId(1))
    for _ in range(30):
        ranks.advance(0.25)
        ranks.flow()
    assert ranks.ranks[RankId(0)].num_lost == 3 and free_of(ranks, 2) == 8
    assert ranks.ranks[RankId(1)].manager.epoch == 1
    ranks.settle()
    assert ranks.ranks[RankId(1)].manager.epoch == 2
    assert ranks.ranks[RankId(1)].num_lost == 3
    ranks.check_agreement()


def test_forgetting_a_conversation_frees_it_everywhere():
    ranks = Ranks(2)
    lent(ranks)
    ranks.forget(0, "a")
    ranks.flow()
    assert (free_of(ranks, 0), free_of(ranks, 1)) == (8, 8)


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


def test_debts_around_a_ring_are_settled_though_one_block_is_free():
    """Each rank brings home what the one before it has made room for."""
    ranks = Ranks(3)
    for rank in range(3):
        lent(ranks, rank=rank, to=(rank + 1) % 3)
    for rank in range(3):
        ranks.grow(rank, "b", free_of(ranks, rank) - (rank == 0))
        ranks.grow(rank, "c", 4, HOST)
        settle = SettleOrder(RankId(rank), RankId((rank + 1) % 3), 3)
        ranks.messages.append(Message(None, 1, RankId(rank), Plan(1, 1, (), (settle,))))
    for _ in range(12):
        ranks.flow()
        ranks.advance(0.25)
    assert all(not life.manager.owed() for life in ranks.ranks.values())
    ranks.check()


def test_a_settlement_that_finds_no_room_is_given_up():
    ranks = Ranks(2)
    lent(ranks)
    ranks.grow(0, "b", 7)
    ranks.grow(0, "c", 4, HOST)
    assert ranks.ranks[RankId(0)].manager.bring_home("a", 2, ranks.now) == 2
    ranks.advance(LENDING.settle_s)
    ranks.forget(0, "b")
    ranks.advance(0.1)
    ranks.flow()
    assert sum(ranks.ranks[RankId(0)].manager.owed().values()) == 3


def test_blocks_that_are_on_their_way_home_are_not_sent_away():
    ranks = Ranks(2)
    lent(ranks)
    manager = ranks.ranks[RankId(0)].manager
    assert manager.bring_home("a", 3, ranks.now) == 3
    assert manager.move("a", 9, DEVICE, RankId(1), DEVICE, ranks.now) == 0
    ranks.collect()
    ranks.flow()
    ranks.check()


@pytest.mark.parametrize(("ok", "num_lost"), [(True, 0), (False, 2)])
def test_what_is_taken_back_while_it_is_copied_home_may_still_arrive(ok, num_lost):
    ranks = Ranks(2)
    lent(ranks)
    ranks.ranks[RankId(1)].manager.recall(2, DEVICE, ranks.now)
    ranks.collect()
    while not ranks.copies:
        ranks.deliver(0)
    ranks.begin_copy(ranks.copies[0])
    ranks.advance(LENDING.recall_s)
    while ranks.messages:
        ranks.deliver(0)
    assert ranks.ranks[RankId(0)].num_lost == 0
    ranks.end_copy(ranks.copies[0], ok)
    ranks.flow()
    assert ranks.ranks[RankId(0)].num_lost == num_lost
    assert list(ranks.ranks[RankId(0)].manager.owed().values()) == [1]
    assert free_of(ranks, 1) == 7
    ranks.check()


def test_a_new_life_has_asked_for_nothing():
    ranks = Ranks(2)
    ranks.grow(0, "a", 4)
    manager = ranks.ranks[RankId(0)].manager
    manager.move("a", 3, DEVICE, RankId(1), DEVICE, 0.0)
    manager.rejoin(2, 0.0)
    assert manager.num_moving == 0 and manager.state().epoch == 2
    ranks.collect()
    ranks.flow()
    assert (free_of(ranks, 0), free_of(ranks, 1)) == (4, 8)


def test_a_rank_that_waits_for_room_lends_none():
    ranks = Ranks(3)
    lent(ranks)
    ranks.grow(0, "b", 7)
    ranks.grow(0, "c", 4, HOST)
    manager = ranks.ranks[RankId(0)].manager
    manager.bring_home("a", 3, ranks.now)
    manager.free("b", DEVICE, list(manager.table.slots(RankId(0), "b", DEVICE))[:2], ranks.now)
    assert ask(manager, 2, 1, 1) is None


def test_a_life_that_is_over_is_told_so():
    manager = lender()
    assert ask(manager, 1, 1, 1) is not None
    manager.lose(RankId(1), 0.0)
    assert manager.table.num_lent[DEVICE] == 0
    reserve = Reserve(RequestId(RankId(1), 1, 2), "far", 1, DEVICE)
    manager.receive(Message(RankId(1), 1, RankId(0), reserve), 0.0)
    assert manager.collect() == [Message(RankId(0), 1, RankId(1), Over(((RankId(1), 2),)))]


def test_only_who_was_asked_can_grant():
    ranks = Ranks(3)
    ranks.grow(0, "a", 4)
    manager = ranks.ranks[RankId(0)].manager
    manager.move("a", 3, DEVICE, RankId(1), DEVICE, 0.0)
    (reserve,) = manager.collect()
    stray = LoanId(RankId(2), 1, 1)
    manager.receive(Message(RankId(2), 1, RankId(0), Reserved(reserve.body.request, stray)), 0.0)
    assert manager.collect() == [Message(RankId(0), 1, RankId(2), Release(stray, 0))]


def test_a_rank_that_neither_lends_nor_borrows_says_nothing_to_others():
    ranks = Ranks(2)
    lent(ranks)
    ranks.forget(0, "a")
    ranks.flow()
    for _ in range(40):
        ranks.grow(0, "b", 1)
        ranks.advance(0.3)
        assert {message.to for message in ranks.messages} <= {None}
        ranks.messages.clear()


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
