"""Who is computed next, and what turns report of it: on the core, with the fake model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.cache.block_pool import BlockPool
from engine.cache.manager import KVCacheManager
from engine.cache.policy import Policy, lru
from engine.conversation import Conversation, Turn, TurnState
from engine.core import EngineCore
from engine.scheduler import Scheduler
from engine.types import ConversationId, FinishReason, SamplingParams, Tenant, TokenLogprobs, TurnId
from tests.fakes import FakeClock, FakeRunner, stateless_reply

BLOCK_SIZE = 4


class Core:
    """A core over `num_slots` blocks, with the shortest way to begin turns and to run them."""

    def __init__(
        self, num_slots: int = 32, max_step_tokens: int = 64, max_concurrent: int = 4, policy: Policy = lru
    ) -> None:
        self.runner = FakeRunner(num_slots, BLOCK_SIZE)
        self.manager = KVCacheManager(BlockPool(num_slots), BLOCK_SIZE, policy)
        scheduler = Scheduler(self.manager, max_step_tokens, max_concurrent)
        context = (num_slots - 1) * BLOCK_SIZE
        self.core = EngineCore(self.manager, scheduler, self.runner, FakeClock(), frozenset(), context)

    def open(self, *history: int) -> Conversation:
        return self.core.new_conversation(ConversationId("c"), Tenant("a"), history)

    def begin(self, conversation: Conversation, prompt: list[int], num_new: int = 3) -> Turn:
        sampling = SamplingParams(max_tokens=num_new)
        return self.core.begin(conversation, TurnId("t"), prompt, sampling, seed=0)

    def append(self, conversation: Conversation, ids: list[int], first_token: int | None = None) -> None:
        self.core.confirm(self.core.append(conversation, TurnId("a"), ids, first_token=first_token))
        self.core.compute_when_idle(conversation)

    def step(self, times: int) -> None:
        for _ in range(times):
            self.core.step()
            self.manager.check()

    def finish(self, turn: Turn) -> Turn:
        for _ in range(200):
            if turn.state is TurnState.FINISHED:
                return turn
            self.core.step()
        raise AssertionError(f"the turn never ends: {turn}")

    def cancel(self, turn: Turn) -> None:
        self.core.finish(turn, FinishReason.CANCELLED, turn.num_generated)


@pytest.mark.parametrize("length", [BLOCK_SIZE, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 1])
def test_a_prompt_whose_every_block_another_conversation_holds_is_answered(length: int) -> None:
    core, prompt = Core(), list(range(1, length + 1))
    first = core.finish(core.begin(core.open(), prompt))
    computed = core.runner.num_computed
    second = core.finish(core.begin(core.open(), prompt))
    assert second.reply_ids == first.reply_ids == stateless_reply(prompt, 3, frozenset())
    assert core.runner.num_computed - computed <= 3, "at most the last token of the prompt, and the reply"
    assert second.usage is not None and second.usage.cached_device_tokens == length - 1


def test_conversations_in_lockstep_share_every_block_and_both_go_on() -> None:
    core, prompt = Core(), [1, 2, 3]
    turns = [core.begin(core.open(), prompt, num_new=20) for _ in range(3)]
    for turn in turns:
        assert core.finish(turn).reply_ids == stateless_reply(prompt, 20, frozenset())
    core.manager.check()


def test_turns_whose_readers_are_slow_keep_nobody_out() -> None:
    core = Core(num_slots=12, max_concurrent=2)
    slow = [core.begin(core.open(), [n] * 17, num_new=5) for n in (1, 2)]
    core.step(1)
    for turn in slow:
        turn.paused = True
    quick = core.begin(core.open(), [3] * 30)
    assert core.finish(quick).reply_ids == stateless_reply([3] * 30, 3, frozenset())
    for n, turn in enumerate(slow, 1):
        turn.paused = False
        assert core.finish(turn).reply_ids == stateless_reply([n] * 17, 5, frozenset())
    core.manager.check()


def test_a_slow_reader_at_the_head_of_the_queue_does_not_hold_up_those_behind_it() -> None:
    core = Core(max_concurrent=1)
    running, head, behind = (core.begin(core.open(), [n]) for n in (1, 2, 3))
    head.paused = True
    core.finish(running)
    core.finish(behind)
    head.paused = False
    core.finish(head)


def test_what_was_cancelled_before_it_was_computed_is_new_and_not_recomputed_later() -> None:
    core = Core(max_step_tokens=8)
    conversation = core.open()
    core.cancel(core.begin(conversation, list(range(1, 11))))  # in the queue: nothing of it was computed
    halfway = core.begin(conversation, list(range(20, 30)))
    core.step(1)  # 8 of 20 tokens
    core.cancel(halfway)
    last = core.finish(core.begin(conversation, [40]))
    usage = halfway.usage
    assert usage is not None and (usage.prompt_tokens, usage.new_tokens) == (20, 20)
    usage = last.usage
    assert usage is not None and usage.prompt_tokens == 21
    assert (usage.cached_device_tokens, usage.recomputed_tokens, usage.new_tokens) == (8, 0, 13)


def test_usage_adds_up_to_the_tokens_that_were_computed() -> None:
    core = Core(num_slots=12, max_step_tokens=16)
    conversations = [core.open() for _ in range(3)]
    for number in range(30):
        conversation = conversations[number % 3]
        before = core.runner.num_computed
        turn = core.finish(core.begin(conversation, [number + 1] * 2, num_new=1))
        usage = turn.usage
        assert usage is not None
        assert usage.prompt_tokens == len(conversation.tokens) - 1
        assert usage.cached_device_tokens + usage.recomputed_tokens + usage.new_tokens == usage.prompt_tokens
        assert core.runner.num_computed - before == usage.recomputed_tokens + usage.new_tokens
        if len(conversation.tokens) > 30:
            core.core.forget(conversation)
            conversations[number % 3] = core.open()


def test_making_room_looks_only_at_conversations_that_still_hold_something() -> None:
    ranked: list[int] = []

    def value(end: Any, idle_s: Any) -> Any:
        ranked.append(np.size(end))
        return -idle_s

    core = Core(num_slots=16, policy=Policy(value))
    for number in range(60):
        core.core._clock.now = float(number)  # type: ignore[attr-defined]
        ranked.clear()
        core.finish(core.begin(core.open(), [number + 1] * 14))
        core.manager.check()
        assert sum(ranked) <= 2 * (4 + 4 * 4), (
            "twice, the next of 4 conversations that hold any, and their own"
        )
    assert core.manager.statistics().num_evicted > 200 and ranked


def test_an_appended_history_is_computed_only_while_no_turn_wants_anything() -> None:
    core = Core(max_step_tokens=8)
    conversation, other = core.open(), core.open()
    turn = core.begin(other, [9] * 20, num_new=2)
    core.append(conversation, list(range(1, 31)))
    core.finish(turn)
    assert core.runner.num_computed == 20 + 1, "the appended tokens waited"
    core.step(2)
    assert core.runner.num_computed == 21 + 16
    late = core.begin(other, [8], num_new=1)
    core.finish(late)
    computed = core.runner.num_computed
    core.step(5)
    assert core.runner.num_computed - computed == 30 - 16
    assert core.core.step() is None
    reply = core.finish(core.begin(conversation, [7]))
    assert reply.reply_ids == stateless_reply([*range(1, 31), 7], 3, frozenset())
    usage = reply.usage
    assert usage is not None
    assert (usage.cached_device_tokens, usage.recomputed_tokens, usage.new_tokens) == (30, 0, 1)


def test_a_turn_takes_over_what_was_computed_ahead_of_it() -> None:
    core = Core(max_step_tokens=8)
    conversation = core.open()
    core.append(conversation, list(range(1, 31)))
    core.step(1)
    reply = core.finish(core.begin(conversation, [7]))
    usage = reply.usage
    assert usage is not None and usage.cached_device_tokens == 8 and usage.new_tokens == 23
    assert core.core.step() is None, "it is not computed ahead any more"


def test_computing_ahead_evicts_nothing() -> None:
    core = Core(num_slots=8)
    holder, appended = core.open(), core.open()
    core.finish(core.begin(holder, [1] * 20, num_new=1))  # 5 of 8 slots
    core.append(appended, [2] * 17)  # needs 5
    assert core.core.step() is None
    assert core.manager.statistics().num_evicted == 0
    core.append(appended, [], first_token=12)  # 3 will do
    core.step(1)
    assert core.runner.num_computed == 20 + 12
    assert core.manager.held.num_cached(holder.table, 20) == 20


def test_a_conversation_that_leaves_memory_is_not_computed_ahead() -> None:
    core = Core()
    conversation = core.open()
    core.append(conversation, [1, 2, 3])
    core.core.forget(conversation)
    assert core.core.step() is None


def test_a_turn_whose_next_token_depends_on_its_history_waits_until_all_of_it_is_known() -> None:
    core = Core()
    free, bound = core.begin(core.open(), [1, 2]), core.begin(core.open(), [3, 4])
    bound.needs_history = True
    first = core.core.plan()
    second = core.core.plan()  # ahead of the first one's result
    assert first is not None and first.turns == (free, bound)
    assert second is not None and second.turns == (free,)
    (draw,) = [s.draw for s in first.plan.segments if s.row == bound.row]
    assert draw is not None and draw.history is not None
    assert (list(draw.history), draw.num_prompt, draw.position) == ([3, 4], 2, 2)
    for step in (first, second):
        core.core.apply(step, core.core.execute(step))
    assert list(draw.history) == [3, 4], "a launched step's history is never written"
    third = core.core.plan()
    assert third is not None and third.turns == (free, bound)
    (draw,) = [s.draw for s in third.plan.segments if s.row == bound.row]
    assert draw is not None and draw.history is not None
    assert list(draw.history) == [3, 4, bound.reply_ids[0]] and draw.num_prompt == 2
    assert next(s.draw for s in third.plan.segments if s.row == free.row).history is None  # type: ignore[union-attr]


def test_logprobs_travel_with_their_token() -> None:
    core = Core()
    turn = core.begin(core.open(), [1, 2], num_new=1)
    step = core.core.plan()
    assert step is not None
    result = core.core.execute(step)
    reported = TokenLogprobs(result.sampled[turn.row], -0.5, ((3, -0.5),))
    (event,) = core.core.apply(step, replace(result, logprobs={turn.row: reported}))
    assert event.logprobs is reported
