"""Pensieve's rules of what is kept and what leaves, one by one, on a core with the fake model and tiny tiers;
and what the paper leaves open, as it was decided here.  Section numbers are the paper's.  How turns come back
is in test_pensieve_turns.py, more on values, costs and failed copies in test_tiers.py.
"""

import random
from collections.abc import Callable, Collection, Sequence

import pytest

from engine.cache.block import NO_SLOT, BlockMove
from engine.cache.costs import CostTable
from engine.cache.eviction import Candidate, Way, lowest_first
from engine.cache.policy import retention
from engine.cache.tiers import STORE_ALWAYS
from engine.conversation import Conversation, TurnState
from engine.types import FinishReason
from tests.engine.two_tiers import SIZE, TwoTiers
from tests.fakes import stateless_reply

COSTS = CostTable({SIZE: 1.0, 8: 1.2, 16: 1.7, 32: 2.9, 64: 5.0}, load_s=0.1)


def order_of(tiers: TwoTiers, way: Way) -> list[tuple[float, int]]:
    """Value and block of all that may go, as it would go; a shared one where it comes first."""
    manager, policy = tiers.manager, retention(COSTS)
    every_step = 10**9  # has ended
    ranked = lowest_first(manager._tables, manager.blocks, way, policy, SIZE, tiers.clock.now, every_step)
    first: dict[int, float] = {}
    for value, block, *_ in ranked:
        first.setdefault(block, value)
    return [(value, block) for block, value in first.items()]


def conversations_of_all_ages(tiers: TwoTiers, num: int) -> list[Conversation]:
    """With full blocks only, the first five shared by every third of them."""
    draw, made = random.Random(3), []
    for n in range(num):
        prompt = [n + 1] * (draw.randrange(2, 9) * SIZE)
        if n % 3 == 0:
            prompt = [90] * (5 * SIZE) + prompt
        conversation = tiers.open()
        tiers.say(conversation, prompt)
        made.append(conversation)
        tiers.clock.now += draw.choice([0.0, 1.0, 30.0, 500.0])
    return made


def stored_while(tiers: TwoTiers, act: Callable[[], object]) -> list[int]:
    """The host slots that are written to meanwhile."""
    slots: list[int] = []
    store = tiers.transfer.store

    def noted(moves: Sequence[BlockMove], overwritten: Collection[int] = ()) -> frozenset[BlockMove]:
        slots.extend(move.host_slot for move in moves)
        return store(moves, overwritten)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiers.transfer, "store", noted)
        act()
    return slots


# -- the value of keeping a block (4.3.1)


def test_blocks_leave_in_ascending_order_of_cost_over_idle_time() -> None:
    tiers = TwoTiers(num_slots=300, num_host_slots=300, policy=retention(COSTS))
    made = conversations_of_all_ages(tiers, 30)
    best: dict[int, float] = {}
    for conversation in made:
        idle = tiers.clock.now - conversation.table.last_active
        for i, block in enumerate(conversation.table.blocks.tolist()):
            if tiers.manager.blocks.slot[block] != NO_SLOT:
                value = COSTS.compute_s((i + 1) * SIZE) / idle
                best[block] = max(value, best.get(block, 0.0))
    order = order_of(tiers, Way.TO_HOST)
    assert len(order) == len(best) > 100
    assert [value for value, _ in order] == pytest.approx(sorted(best.values()))
    for value, block in order:
        assert value == pytest.approx(best[block]), "a shared block takes the largest value of its sharers"


def test_inside_a_conversation_blocks_leave_from_the_front_to_the_back() -> None:
    tiers = TwoTiers(num_slots=300, num_host_slots=300, policy=retention(COSTS))
    made = conversations_of_all_ages(tiers, 30)
    place = {block: at for at, (_, block) in enumerate(order_of(tiers, Way.TO_HOST))}
    num_seen = 0
    for n, conversation in enumerate(made):
        own = conversation.table.blocks.tolist()[5 if n % 3 == 0 else 0 :]
        places = [place[block] for block in own if block in place]
        assert places == sorted(places)
        num_seen += len(places)
    assert num_seen > 100


def test_the_same_value_ranks_what_leaves_the_device_and_what_leaves_the_host() -> None:
    tiers = TwoTiers(num_slots=300, num_host_slots=300, policy=retention(COSTS))
    made = conversations_of_all_ages(tiers, 12)
    before = order_of(tiers, Way.TO_HOST)
    assert order_of(tiers, Way.OFF_DEVICE) == before and len(before) > 30
    now = tiers.clock.now
    blocks = tiers.manager.blocks
    for block in {block for c in made for block in c.table.blocks.tolist() if blocks.slot[block] != NO_SLOT}:
        assert tiers.manager.tiers._begin_store(Candidate(float("inf"), block, -1, 0), now, leaves=True)
    tiers.step()
    for conversation in made:
        conversation.table.passed[:] = 0
    tiers.clock.now = now
    assert order_of(tiers, Way.TO_HOST) == []
    assert order_of(tiers, Way.OFF_HOST) == before


def test_a_full_host_refuses_what_is_worth_less_than_all_it_holds() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=6, policy=retention(COSTS))
    oldest = tiers.tell(1, 6)
    tiers.clock.now += 1000
    newer = tiers.tell(2, 6)
    tiers.bring_to_host(newer, range(6))
    assert tiers.manager.tiers.host.num_free == 0
    tiers.tell(3, 8)
    assert tiers.states(newer)[:6] == ["host"] * 6, "each of them is worth more than the other's"
    assert "dropped" in tiers.states(oldest) and "host" not in tiers.states(oldest)


# -- where blocks are, and how they move (4.3.2)

WHEN_PLANNED = {  # a plan may make several of a block
    ("dropped", "computing"),
    ("device", "computing"),  # a partial block grows
    ("both", "computing"),
    ("device", "storing"),
    ("device", "dropped"),  # the host is full of what is worth more
    ("both", "host"),  # its slot is handed out
    ("both", "device"),  # its host slot is
    ("host", "dropped"),
    ("host", "loading"),
}
WHEN_ENDED = {
    ("computing", "device"),
    ("computing", "dropped"),  # of no worth: what it attended to could not be loaded
    ("storing", "both"),
    ("storing", "host"),  # and its slot was handed out in the same step
    ("storing", "device"),  # failed
    ("storing", "dropped"),  # failed, and its slot was handed out
    ("loading", "both"),
    ("loading", "device"),  # and written to in the same step
    ("loading", "dropped"),  # failed
}


def test_blocks_make_every_legal_move_and_no_other() -> None:
    tiers = TwoTiers(num_slots=16, num_host_slots=12, policy=retention(COSTS))
    draw = random.Random(1)
    conversations = [tiers.tell(n + 1, 1) for n in range(5)]
    planned: set[tuple[str, str]] = set()
    ended: set[tuple[str, str]] = set()

    def look() -> dict[tuple[Conversation, int], str]:
        return {(c, i): state for c in conversations for i, state in enumerate(tiers.states(c))}

    for _ in range(800):
        conversation = draw.choice(conversations)
        if conversation.turn is None and len(conversation.tokens) >= 36:
            tiers.core.rewind(conversation, ())
        if conversation.turn is None:
            token = conversations.index(conversation) + 1  # nobody shares anything
            tiers.begin(conversation, [token] * draw.randrange(1, 6), draw.randrange(1, 5))
        tiers.clock.now += draw.random()
        tiers.transfer.num_to_fail = draw.random() < 0.2
        before = look()
        if step := tiers.core.plan():
            between = look()
            tiers.core.apply(step, tiers.core.execute(step))
            after = look()
            planned |= {(before.get(at, "dropped"), state) for at, state in between.items()}
            ended |= {(between.get(at, "dropped"), state) for at, state in after.items()}
        tiers.manager.check()
    planned, ended = ({(one, other) for one, other in moves if one != other} for moves in (planned, ended))
    assert planned >= WHEN_PLANNED and planned <= in_a_row(WHEN_PLANNED)
    assert ended - {("computing", "both")} == WHEN_ENDED, "and that one comes up too rarely: it follows"


def test_a_copied_partial_block_is_as_before_if_what_was_written_behind_it_is_of_no_worth() -> None:
    tiers = TwoTiers(num_slots=16, num_host_slots=12)
    first = tiers.open()
    tiers.say(first, [1] * 6, num_new=2)
    tiers.bring_to_host(first, [0])
    assert tiers.manager.tiers._begin_store(
        Candidate(float("inf"), first.table[1], first.table.row, 1), tiers.clock.now
    )
    tiers.step()
    assert tiers.states(first) == ["host", "both"]
    turn = tiers.begin(first, [9])
    tiers.transfer.num_to_fail = 1
    step = tiers.core.plan()
    assert step is not None and tiers.states(first)[:2] == ["loading", "computing"]
    tiers.core.apply(step, tiers.core.execute(step))
    assert tiers.states(first)[:2] == ["dropped", "both"]
    tiers.settle(turn)
    assert turn.reply_ids == stateless_reply([*first.tokens[:-1]], 1, frozenset())


def in_a_row(moves: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """One of the moves, or several of them, each from where the one before has led."""
    while more := {(a, d) for a, b in moves for c, d in moves if b == c and a != d} - moves:
        moves = moves | more
    return moves


def test_a_finished_turn_keeps_its_slots() -> None:
    tiers = TwoTiers(num_slots=16)
    conversation = tiers.open()
    turn = tiers.begin(conversation, [1] * 14, num_new=6)
    tiers.settle(turn)
    assert tiers.states(conversation) == ["device"] * 5
    assert tiers.manager.statistics().num_free == 16 - 5


def test_stores_begin_below_a_quarter_free_with_the_lowest_value_and_restore_a_quarter() -> None:
    tiers = TwoTiers(num_slots=40, num_host_slots=80, policy=retention(COSTS))
    oldest = tiers.tell(1, 14)
    tiers.clock.now += 100
    newer = tiers.tell(2, 14)
    assert tiers.manager.statistics().num_stored == 0, "12 of 40 are free"
    tiers.clock.now += 100
    last = tiers.tell(3, 3)
    stored = tiers.manager.statistics().num_stored
    assert tiers.manager.pool.num_free == 9
    assert stored == 2, "as many as make more than a quarter free or clean"
    assert tiers.states(oldest)[:3] == ["both", "both", "device"]
    assert set(tiers.states(newer)[:14] + tiers.states(last)[:3]) == {"device"}


def test_stores_that_are_eager_make_every_idle_block_clean_and_leave_alone_what_runs() -> None:
    tiers = TwoTiers(num_slots=64, num_host_slots=64, store_below=STORE_ALWAYS)
    told = [tiers.tell(seed, 5) for seed in range(3)]
    blocks = tiers.manager.blocks
    for conversation in told:
        ids = conversation.table.blocks[:5]
        assert (blocks.host_valid[ids] == blocks.num_valid[ids]).all() and (blocks.slot[ids] != NO_SLOT).all()
    num_stored = tiers.manager.statistics().num_stored
    turn = tiers.begin(told[0], [7], num_new=3 * SIZE)
    for _ in range(4):
        tiers.step()
    assert turn.num_generated > 0 and tiers.manager.statistics().num_stored == num_stored
    tiers.settle(turn)
    assert tiers.manager.statistics().num_stored > num_stored


def test_a_copied_block_is_valid_on_the_device_until_its_slot_is_handed_out() -> None:
    tiers = TwoTiers(num_slots=16)
    idle = tiers.tell(1, 13)
    num_copied = tiers.states(idle).count("both")
    assert num_copied > 0
    tiers.say(tiers.open(), [2] * (3 * SIZE - 1))
    assert tiers.manager.pool.num_free == 0
    assert "host" not in tiers.states(idle), "the free slots went first"
    tiers.say(tiers.open(), [3])
    assert tiers.states(idle)[0] == "host", "and then that of the lowest value"
    assert "dropped" not in tiers.states(idle)[:13]


def test_a_conversation_that_returns_early_finds_copied_blocks_on_the_device() -> None:
    tiers = TwoTiers(num_slots=16)
    idle = tiers.tell(1, 13)
    assert "both" in tiers.states(idle)
    usage = tiers.say(idle, [9])
    assert (usage.cached_device_tokens, usage.cached_host_tokens) == (13 * SIZE, 0)
    assert tiers.manager.statistics().num_loaded == 0


def test_a_block_of_a_step_in_flight_stays_although_its_turn_is_over() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=40)
    turn = tiers.begin(tiers.open(), [1] * (5 * SIZE), num_new=9)
    step = tiers.core.plan()
    assert step is not None
    pinned = set(tiers.manager.blocks.slot[step.blocks].tolist())
    assert len(pinned) == 5
    tiers.core.finish(turn, FinishReason.CANCELLED, None)
    other = tiers.begin(tiers.open(), [2] * (9 * SIZE))
    assert tiers.core.plan() is None, "7 slots can be had, it needs 10"
    tiers.core.apply(step, tiers.core.execute(step))
    tiers.manager.check()
    tiers.settle(other)
    assert other.reply_ids == stateless_reply([2] * (9 * SIZE), 1, frozenset())


def test_a_running_turn_is_evicted_from_by_nobody() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=40)
    runs = tiers.open()
    turn = tiers.begin(runs, [1] * (6 * SIZE), num_new=4)
    tiers.step()
    idle = [tiers.begin(tiers.open(), [n] * (2 * SIZE)) for n in range(2, 7)]
    while turn.state is TurnState.RUNNING:
        assert tiers.states(runs)[:6] == ["device"] * 6
        tiers.step()
    tiers.settle(turn, *idle)
    assert tiers.manager.statistics().num_stored > 0


def test_the_copy_on_the_host_survives_a_swap_in_so_that_the_next_swap_out_is_free() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=60)
    first = tiers.tell(1, 6)
    tiers.fill(2)
    assert tiers.states(first)[:6] == ["host"] * 6
    tiers.say(first, [9])
    assert tiers.states(first)[:6] == ["both"] * 6
    held = tiers.manager.blocks.host_slot[first.table.blocks[:6]].copy()
    written = stored_while(tiers, lambda: tiers.fill(3))
    assert tiers.states(first)[:6] == ["host"] * 6
    assert not set(written) & set(held.tolist()), "none of them was copied again"
    assert (tiers.manager.blocks.host_slot[first.table.blocks[:6]] == held).all()


def test_the_assistants_own_tokens_and_a_partial_block_are_kept_like_any_other() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=40)
    first = tiers.open()
    tiers.say(first, [1] * 5, num_new=10)  # two of three full blocks and the tail are of the reply
    tiers.fill(2)
    assert tiers.states(first) == ["host"] * 4 and tiers.host_valid(first) == [4, 4, 4, 2]
    computed = tiers.runner.num_computed
    usage = tiers.say(first, [9])
    assert (usage.cached_host_tokens, usage.recomputed_tokens, usage.new_tokens) == (14, 0, 2)
    assert tiers.runner.num_computed - computed == 2


def test_a_block_that_anybody_needs_soon_is_dropped_for_nobody() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=5, policy=retention(COSTS))
    shared = [7] * (2 * SIZE)
    early, late = tiers.open(), tiers.open()
    tiers.say(early, [*shared, *[1] * (4 * SIZE)])
    tiers.clock.now += 1000
    tiers.say(late, [*shared, 2])
    tiers.tell(3, 8)
    states = tiers.states(early)
    assert "dropped" in states[2:6], "what it alone held is gone"
    assert "dropped" not in states[:2]
    tiers.say(late, [4])
