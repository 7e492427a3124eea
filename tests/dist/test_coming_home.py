"""How blocks come home, or are lost, case by case; tests/dist/test_protocol.py has the rest."""

import pytest

from engine.dist.entries import (
    Commit,
    Committed,
    Message,
    Over,
    Plan,
    RankId,
    RequestId,
    Reserve,
    Revoked,
    SettleOrder,
    Tier,
)
from tests.dist.ranks import LENDING, Ranks, ask, bodies, free_of, lender, lent

DEVICE, HOST = Tier.DEVICE, Tier.HOST


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
