"""Where the tokens of a prompt came from, why the others were computed, and what that took: each reason by
itself, on a core with tiny tiers.
"""

from collections.abc import Callable, Sequence

import pytest

from engine.batch import StepPlan, StepResult
from engine.cache.block import BlockMove
from engine.cache.block_pool import BlockPool
from engine.cache.manager import KVCacheManager
from engine.cache.policy import lru
from engine.conversation import Conversation, Turn, TurnState
from engine.core import EngineCore
from engine.scheduler import Scheduler
from engine.types import ConversationId, FinishReason, RunState, SamplingParams, Tenant, TurnId, Usage
from tests.engine.harness import check_sums
from tests.fakes import FakeClock, FakeLoading, FakeRunner, FakeTransfer

SIZE = 4
TOKEN_S, COPY_S = 0.5, 0.25


class Runner(FakeRunner):
    """A position takes half a second."""

    def __init__(self, clock: FakeClock, num_slots: int) -> None:
        super().__init__(num_slots, SIZE)
        self._clock = clock

    def run(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> StepResult:
        begun = self._clock.now
        sampled = super().run(plan, wait_for).sampled
        self._clock.now += TOKEN_S * plan.num_tokens
        return StepResult(sampled, self._clock.now - begun)


class Transfer(FakeTransfer):
    """A copy from the host takes a quarter of a second, and may fail; one to the host takes none."""

    def __init__(self, runner: FakeRunner, num_host_slots: int, clock: FakeClock) -> None:
        super().__init__(runner, num_host_slots)
        self.clock = clock
        self.num_loads_to_fail = 0

    def load(self, moves: Sequence[BlockMove]) -> FakeLoading:
        return Loading(self, moves)

    def load_now(self, moves: Sequence[BlockMove]) -> frozenset[BlockMove]:
        self.num_to_fail, self.num_loads_to_fail = self.num_loads_to_fail, 0
        self.clock.now += COPY_S * len(moves)
        return super().load_now(moves)


class Loading(FakeLoading):
    def wait_for(self, layer: int) -> None:
        super().wait_for(layer)
        self.seconds += COPY_S * len(self._moves)


class Engine:
    """Blocks of 4 tokens, and steps one after the other."""

    def __init__(self, num_slots: int = 16, num_host_slots: int = 0, max_step_tokens: int = 64) -> None:
        self.clock = FakeClock()
        runner = Runner(self.clock, num_slots)
        self.transfer = Transfer(runner, num_host_slots, self.clock)
        self.manager = KVCacheManager(BlockPool(num_slots), SIZE, lru, BlockPool(num_host_slots))
        scheduler = Scheduler(self.manager, max_step_tokens, 4)
        context = num_slots * SIZE
        self.core = EngineCore(
            self.manager, scheduler, runner, self.clock, frozenset(), context, self.transfer
        )
        self.states: list[tuple[Turn, RunState, Usage | None]] = []
        scheduler.on_state = lambda turn, state, found: self.states.append((turn, state, found))

    def open(self, tokens: list[int] | None = None, num_computed: int | None = None) -> Conversation:
        id, tenant = ConversationId("c"), Tenant("a")
        return self.core.new_conversation(id, tenant, tokens or [], num_computed=num_computed)

    def begin(
        self, conversation: Conversation, prompt: list[int], num_new: int = 1, **where: int | None
    ) -> Turn:
        sampling = SamplingParams(max_tokens=num_new)
        return self.core.begin(conversation, TurnId("t"), prompt, sampling, 0, **where)  # type: ignore[arg-type]

    def finish(self, turn: Turn) -> Usage:
        for _ in range(300):
            if turn.state is TurnState.FINISHED:
                self.core.confirm(turn)
                assert turn.usage is not None
                check_sums(turn.usage)
                return turn.usage
            self.core.step()
        raise AssertionError(f"the turn never ends: {turn}")

    def say(
        self, conversation: Conversation, prompt: list[int], num_new: int = 1, **where: int | None
    ) -> Usage:
        return self.finish(self.begin(conversation, prompt, num_new, **where))

    def fill(self) -> None:
        """Others take up the whole device tier."""
        self.say(self.open(), [90] * ((self.manager.pool.num_slots - 1) * SIZE), num_new=2)
        while self.core.step() is not None:  # whatever is stored ahead
            pass


def reasons(usage: Usage) -> dict[str, int]:
    names = ("evicted", "restart", "rewritten", "cut", "never_computed")
    return {name: count for name in names if (count := getattr(usage, f"{name}_tokens"))}


# -- reasons


def test_what_a_turn_says_is_new_and_what_was_said_is_found() -> None:
    engine = Engine()
    chat = engine.open()
    assert engine.say(chat, [1] * 10, num_new=3) == Usage(prompt_tokens=10, new_tokens=10)
    usage = engine.say(chat, [2] * 5)
    # The last token of the reply was chosen and not attended to: it is new, and nobody had given it.
    assert usage == Usage(prompt_tokens=18, cached_device_tokens=12, new_tokens=6)


def test_what_was_given_up_for_others_was_evicted() -> None:
    engine = Engine()
    chat = engine.open()
    engine.say(chat, [1] * 10, num_new=3)
    engine.fill()
    usage = engine.say(chat, [2] * 5)
    assert (usage.recomputed_tokens, usage.new_tokens, reasons(usage)) == (12, 6, {"evicted": 12})


def test_what_comes_back_from_the_host_is_no_miss_unless_its_copy_fails() -> None:
    engine = Engine(num_host_slots=40)
    chat = engine.open()
    engine.say(chat, [1] * 12)
    engine.fill()
    usage = engine.say(chat, [2])
    assert (usage.cached_host_tokens, usage.new_tokens, reasons(usage)) == (12, 2, {})
    engine.fill()
    engine.transfer.num_loads_to_fail = 1
    usage = engine.say(chat, [3])
    assert (usage.cached_host_tokens, usage.recomputed_tokens) == (10, 4)
    assert reasons(usage) == {"evicted": 4}


def test_what_was_computed_before_the_conversation_came_into_memory_is_told_apart_from_what_was_since() -> (
    None
):
    engine = Engine()
    chat = engine.open([*range(20)])
    usage = engine.say(chat, [30])
    assert (usage.recomputed_tokens, usage.new_tokens, reasons(usage)) == (19, 2, {"restart": 19})
    engine.fill()
    assert reasons(engine.say(chat, [31])) == {"evicted": 21}


def test_a_turn_that_is_cancelled_half_way_leaves_both_reasons_behind() -> None:
    engine = Engine(max_step_tokens=8)
    chat = engine.open([*range(20)])
    turn = engine.begin(chat, [30])
    engine.core.step()
    engine.core.finish(turn, FinishReason.CANCELLED, None)
    engine.fill()
    assert reasons(engine.say(chat, [31])) == {"evicted": 8, "restart": 11}


def test_history_that_no_turn_attended_to_is_new_but_not_of_this_turn() -> None:
    engine = Engine()
    given = engine.open([*range(20)], num_computed=0)
    usage = engine.say(given, [30], num_new=2)
    assert (usage.recomputed_tokens, usage.new_tokens, reasons(usage)) == (0, 21, {"never_computed": 20})
    engine.core.append(given, TurnId("a"), [40] * 6)
    usage = engine.say(given, [31])
    assert (usage.cached_device_tokens, usage.new_tokens, reasons(usage)) == (22, 8, {"never_computed": 6})


def test_history_that_is_computed_ahead_is_found() -> None:
    engine = Engine()
    chat = engine.open([*range(20)], num_computed=0)
    engine.core.compute_when_idle(chat)
    while engine.core.step() is not None:
        pass
    usage = engine.say(chat, [30])
    assert (usage.cached_device_tokens, usage.new_tokens, reasons(usage)) == (20, 1, {})
    engine.fill()
    assert reasons(engine.say(chat, [31])) == {"evicted": 21}


@pytest.mark.parametrize(("num_prompt", "cut"), [(10, 2), (11, 3), (12, 1), (13, 1)])
def test_another_reply_computes_the_rest_of_a_block_and_at_least_its_last_token(
    num_prompt: int, cut: int
) -> None:
    engine = Engine()
    chat, prompt = engine.open(), [*range(num_prompt)]
    engine.say(chat, prompt, num_new=9)
    usage = engine.say(chat, prompt, first_token=0)
    assert (usage.cached_device_tokens, usage.new_tokens) == (num_prompt - cut, 0)
    assert reasons(usage) == {"cut": cut}
    engine.fill()
    assert reasons(engine.say(chat, prompt, first_token=0)) == {"evicted": num_prompt // 4 * 4} | (
        {"cut": num_prompt % 4} if num_prompt % 4 else {}
    )


def test_a_rewind_into_a_block_cuts_it() -> None:
    engine = Engine()
    chat = engine.open()
    engine.say(chat, [*range(16)], num_new=5)
    engine.core.rewind(chat, chat.tokens[:14])
    usage = engine.say(chat, [30])
    assert (usage.cached_device_tokens, usage.new_tokens, reasons(usage)) == (12, 1, {"cut": 2})


def test_a_rewind_in_an_unshared_block_cuts_nothing() -> None:
    engine = Engine()
    chat = engine.open()
    engine.say(chat, [*range(13)], num_new=2)
    engine.core.rewind(chat, chat.tokens[:13])
    usage = engine.say(chat, [30])
    assert (usage.cached_device_tokens, usage.new_tokens, reasons(usage)) == (13, 1, {})


def test_history_in_other_words_counts_as_rewritten_and_the_turn_itself_as_new() -> None:
    engine = Engine()
    chat = engine.open()
    engine.say(chat, [*range(16)], num_new=5)
    usage = engine.say(chat, [8, 9, *[50] * 7, *[60] * 4], first_token=8, rewritten_to=17)
    assert (usage.cached_device_tokens, usage.prompt_tokens, usage.new_tokens) == (8, 21, 4)
    assert reasons(usage) == {"cut": 2, "rewritten": 7}
    engine.fill()
    assert reasons(engine.say(chat, [61])) == {"evicted": 21}


def test_a_rewind_behind_other_words_counts_the_old_ones_as_rewritten() -> None:
    engine = Engine()
    chat = engine.open()
    engine.say(chat, [*range(16)], num_new=5)
    old = chat.tokens[:]
    engine.say(chat, [50] * 9, first_token=8)
    engine.core.rewind(chat, old)
    usage = engine.say(chat, [30])
    assert (usage.cached_device_tokens, usage.new_tokens, reasons(usage)) == (8, 2, {"rewritten": 12})


def test_a_replacement_that_comes_to_nothing_leaves_the_reasons_as_they_were() -> None:
    engine = Engine()
    chat = engine.open([*range(20)])
    turn = engine.begin(chat, [50] * 9, num_new=5, first_token=12, rewritten_to=18)
    engine.core.step()
    engine.core.finish(turn, FinishReason.CANCELLED, None)
    usage = engine.say(chat, [30])
    assert (usage.cached_device_tokens, usage.new_tokens, reasons(usage)) == (12, 2, {"restart": 7})


def test_what_another_conversation_holds_is_found_whatever_its_zone() -> None:
    engine = Engine()
    engine.say(engine.open(), [*range(20)])
    usage = engine.say(engine.open([*range(18)]), [30])
    assert (usage.cached_device_tokens, usage.new_tokens, reasons(usage)) == (16, 2, {"restart": 1})


# -- times


def times(turn: Turn) -> tuple[float, float, float, float]:
    assert turn.first_token_s is not None and turn.started_s is not None
    queue_s, ttft_s = turn.started_s - turn.arrived_s, turn.first_token_s - turn.arrived_s
    rest_s = ttft_s - queue_s - turn.reload_s - turn.recompute_s - turn.prefill_s
    return turn.reload_s, turn.recompute_s, turn.prefill_s, rest_s


def test_the_time_to_the_first_token_of_a_turn_alone_is_the_sum_of_its_parts() -> None:
    engine = Engine(num_host_slots=7, max_step_tokens=8)
    chat = engine.open()
    engine.say(chat, [1] * 20)
    engine.fill()
    turn = engine.begin(chat, [2] * 6, num_new=4)
    usage = engine.finish(turn)
    num_loaded, num_again = usage.cached_host_tokens // SIZE, usage.evicted_tokens
    assert num_loaded > 0 and num_again > 0 and usage.new_tokens == 7
    assert times(turn) == (num_loaded * COPY_S, num_again * TOKEN_S, 7 * TOKEN_S, 0.0)


def test_turns_side_by_side_share_a_step_by_its_positions_and_wait_for_each_other() -> None:
    engine = Engine()
    back = engine.open([*range(8)])
    again, fresh = engine.begin(back, [30, 31]), engine.begin(engine.open(), [9] * 5)
    engine.finish(again)
    engine.finish(fresh)
    assert times(again) == (0.0, 7 * TOKEN_S, 3 * TOKEN_S, 5 * TOKEN_S)
    assert times(fresh) == (0.0, 0.0, 5 * TOKEN_S, 10 * TOKEN_S)


def test_what_comes_behind_the_first_token_is_not_in_its_time() -> None:
    engine = Engine()
    turn = engine.begin(engine.open(), [1] * 4, num_new=20)
    engine.finish(turn)
    assert times(turn) == (0.0, 0.0, 4 * TOKEN_S, 0.0)


# -- states


@pytest.mark.parametrize("num_host_slots", [0, 40])
def test_a_suspended_turn_says_so_and_what_it_finds_when_it_goes_on(num_host_slots: int) -> None:
    engine = Engine(num_slots=12, num_host_slots=num_host_slots)
    turns = [engine.begin(engine.open(), [n] * 10, num_new=20) for n in (1, 2, 3)]
    for turn in turns:
        engine.finish(turn)
    of_last = [(state, found) for turn, state, found in engine.states if turn is turns[-1]]
    assert [state for state, _ in of_last[:3]] == [RunState.RUNNING, RunState.SUSPENDED, RunState.RUNNING]
    (_, first), (_, none), (_, found) = of_last[:3]
    assert first == Usage(prompt_tokens=10, new_tokens=10) and none is None and found is not None
    check_sums(found)
    assert found.prompt_tokens == 10 + found.completion_tokens and found.completion_tokens > 0
    assert found.new_tokens == 1  # the token that was chosen before it was suspended
    if num_host_slots:
        assert found.cached_host_tokens > 0 == found.recomputed_tokens
    else:
        assert found.recomputed_tokens > 0 and reasons(found) == {"evicted": found.recomputed_tokens}
    assert turns[-1].usage == first, "usage is of the turn's beginning"
    assert not [turn for turn, state, _ in engine.states if state is RunState.SUSPENDED and turn is turns[0]]


def test_a_turn_whose_reader_is_slow_is_paused_once_others_want_to_run() -> None:
    engine = Engine()
    slow = engine.begin(engine.open(), [1] * 4, num_new=20)
    engine.core.step()
    slow.paused = True
    engine.core.step()
    assert [state for _, state, _ in engine.states] == [RunState.RUNNING]
    engine.say(engine.open(), [2] * 4)
    assert [state for turn, state, _ in engine.states if turn is slow] == [RunState.RUNNING, RunState.PAUSED]
    slow.paused = False
    engine.finish(slow)
    assert engine.states[-1][:2] == (slow, RunState.RUNNING)
