"""What is counted when, and what one snapshot says."""

import asyncio
import random
import threading
from types import SimpleNamespace

import pytest

from engine.batch import Segment, StepPlan, StepResult
from engine.cache.block_pool import BlockPool
from engine.cache.manager import KVCacheManager
from engine.cache.policy import lru
from engine.errors import ContextOverflow, InvalidRequest, QueueFull, TurnCancelled
from engine.load import ConversationCounts
from engine.scheduler import Scheduler
from engine.statistics import BOUNDS_S, Observations, Statistics, summary_line
from engine.types import (
    FinishReason,
    OpenRequest,
    ResumeRequest,
    Timing,
    TurnId,
    Usage,
)
from tests.engine.harness import BLOCK_SIZE, LOCAL, append_turn, fake_engine, ids_turn, read, say, until_done
from tests.loads import a_load

USAGE = Usage(
    prompt_tokens=100,
    cached_device_tokens=60,
    recomputed_tokens=30,
    new_tokens=10,
    evicted_tokens=14,
    restart_tokens=9,
    rewritten_tokens=5,
    cut_tokens=2,
    never_computed_tokens=7,
)


def a_turn(row=1, arrived_s=0.0, started_s=0.5, usage=USAGE):
    times = {"arrived_s": arrived_s, "started_s": started_s, "reload_s": 0.25, "recompute_s": 0.125}
    return SimpleNamespace(row=row, usage=usage, **times)


def a_record(reason=FinishReason.LENGTH, total_s=2.0):
    return SimpleNamespace(finish_reason=reason, timing=Timing(total_s=total_s), usage=USAGE)


def idle_scheduler():
    return Scheduler(KVCacheManager(BlockPool(8), BLOCK_SIZE, lru), 512, 32)


def load_of(statistics, now=10.0):
    return statistics.load(now, idle_scheduler(), [])


def a_step(statistics, now, *turns, num_tokens=0, seconds=0.0):
    plan = StepPlan(1, (Segment(1, 0, tuple(range(num_tokens)), (), None),))
    statistics.step_done(plan, StepResult(seconds=seconds), turns, now)


def observed(histogram):
    """Bound -> observations up to it and above the one before; the sum."""
    bounds = (*histogram.bounds, float("inf"))
    return {b: n for b, n in zip(bounds, histogram.counts, strict=True) if n}, histogram.sum


# -- histograms


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [(0.0, 0.001), (0.001, 0.001), (0.0011, 0.0025), (0.5, 0.5), (250.0, 250.0), (251.0, float("inf"))],
)
def test_an_observation_falls_under_the_first_bound_that_it_does_not_exceed(seconds, bound) -> None:
    observations = Observations()
    observations.add(seconds)
    assert observed(observations.histogram()) == ({bound: 1}, seconds)


def test_bounds_ascend() -> None:
    assert list(BOUNDS_S) == sorted(set(BOUNDS_S))


def test_a_snapshot_stays_as_it_is() -> None:
    statistics = Statistics(now=0.0)
    a_step(statistics, 1.0, a_turn())
    before = load_of(statistics)
    a_step(statistics, 1.1, a_turn(), num_tokens=5)
    statistics.turn_failed(a_turn(), TurnCancelled("gone"))
    assert (before.completion_tokens, before.computed_tokens, before.failed_turns) == (1, 0, {})
    assert sum(before.inter_token_s.counts) == 0
    assert load_of(statistics).completion_tokens == 2


# -- turns


def test_the_first_token_brings_queue_time_ttft_and_where_the_prompt_came_from() -> None:
    statistics, turn = Statistics(now=0.0), a_turn(arrived_s=1.0, started_s=1.25)
    a_step(statistics, 2.0, num_tokens=100)
    assert load_of(statistics).prompt_tokens == 0
    a_step(statistics, 5.0, turn, num_tokens=40, seconds=0.75)
    a_step(statistics, 5.0625, turn, num_tokens=1, seconds=0.25)
    load = load_of(statistics)
    assert observed(load.queue_s) == ({0.25: 1}, 0.25)
    assert observed(load.ttft_s) == ({5.0: 1}, 4.0)
    assert observed(load.inter_token_s) == ({0.1: 1}, 0.0625)
    assert (load.prompt_tokens, load.cached_device_tokens) == (100, 60)
    assert (load.recomputed_tokens, load.new_tokens, load.never_computed_tokens) == (30, 10, 7)
    causes = (load.evicted_tokens, load.restart_tokens, load.rewritten_tokens, load.cut_tokens)
    assert causes == (14, 9, 5, 2)
    assert (load.reload_s, load.recompute_s) == (0.25, 0.125)
    assert (load.completion_tokens, load.computed_tokens, load.steps, load.step_s) == (2, 141, 3, 1.0)


def test_tokens_of_turns_side_by_side_are_timed_each_on_its_own() -> None:
    statistics, one, two = Statistics(now=0.0), a_turn(row=1), a_turn(row=2)
    a_step(statistics, 1.0, one)
    a_step(statistics, 3.0, two)
    a_step(statistics, 3.5, one, two)
    assert observed(load_of(statistics).inter_token_s) == ({0.5: 1, 2.5: 1}, 3.0)


@pytest.mark.parametrize(
    "end",
    [
        lambda statistics, turn: statistics.turn_done(turn, a_record()),
        lambda statistics, turn: statistics.turn_failed(turn, TurnCancelled("discarded")),
    ],
)
def test_nothing_is_remembered_of_a_turn_that_is_over(end) -> None:
    statistics, turn = Statistics(now=0.0), a_turn()
    a_step(statistics, 1.0, turn)
    end(statistics, turn)
    assert not statistics._last_token_s


def test_endings_are_counted_by_reason_and_timed_where_somebody_waited() -> None:
    statistics = Statistics(now=0.0)
    for reason in (FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.APPENDED):
        statistics.turn_accepted()
        statistics.turn_done(a_turn(), a_record(reason))
    statistics.turn_accepted()
    statistics.turn_failed(a_turn(), ZeroDivisionError("ours"))
    load = load_of(statistics)
    assert load.finished_turns == {"LENGTH": 2, "CANCELLED": 1, "APPENDED": 1}
    assert load.failed_turns == {"INTERNAL": 1}
    assert load.accepted_turns == 5
    assert observed(load.total_s) == ({2.5: 3}, 6.0)


def test_refusals_are_counted_by_reason_and_go_on_to_the_caller() -> None:
    statistics = Statistics(now=0.0)
    for error in (QueueFull("full"), QueueFull("full"), ContextOverflow("long")):
        with pytest.raises(type(error)), statistics.refusals():
            raise error
    with pytest.raises(asyncio.CancelledError), statistics.refusals():
        raise asyncio.CancelledError
    with statistics.refusals():
        pass
    assert load_of(statistics).refused_turns == {"QUEUE_FULL": 2, "CONTEXT_OVERFLOW": 1}


# -- an engine's


async def test_an_engines_load_adds_up_to_what_its_turns_were_told() -> None:
    engine, runner, manager = fake_engine(num_slots=8)
    random_ids = random.Random(1)
    done = []
    async with engine:
        chats = [await engine.open(LOCAL, OpenRequest()) for _ in range(3)]
        for number in range(2):
            for chat in chats:
                ids = [random_ids.randrange(256) for _ in range(40)]
                done.append((await say(chat, ids_turn(str(number), ids, max_tokens=9)))[1])
        await chat.turn(append_turn("more", [1, 2, 3]))
        _, appended = await until_done(chat)
        load = engine.load()
        told = [event.usage for event in (*done, appended)]
        assert load.accepted_turns == len(told)
        assert load.finished_turns == {"LENGTH": len(done), "APPENDED": 1}
        for name in ("prompt_tokens", "cached_device_tokens", "recomputed_tokens", "new_tokens"):
            assert getattr(load, name) == sum(getattr(usage, name) for usage in told), name
        assert load.completion_tokens == 9 * len(done)
        assert load.recomputed_tokens > 0 and load.evicted_blocks == manager.statistics().num_evicted > 0
        assert load.computed_tokens >= load.recomputed_tokens + load.new_tokens - 3  # those perhaps not yet
        assert sum(load.ttft_s.counts) == sum(load.queue_s.counts) == sum(load.total_s.counts) == len(done)
        assert load.total_s.sum == pytest.approx(sum(event.timing.total_s for event in done))
        assert sum(load.inter_token_s.counts) == 8 * len(done)
        assert load.inter_token_s.sum <= load.total_s.sum <= load.uptime_s


async def test_conversations_are_counted_by_what_they_do() -> None:
    engine, runner, _ = fake_engine(num_slots=64, max_concurrent=1)
    going_on = threading.Event()
    async with engine:
        chats = [await engine.open(LOCAL, OpenRequest()) for _ in range(4)]
        chats[3].detach()
        assert engine.load().conversations == ConversationCounts(running=0, waiting=0, attached=3, idle=1)
        await chats[0].turn(ids_turn("1", [1, 2, 3], max_tokens=900))
        await read(chats[0], 2)
        runner.before_step = lambda plan: going_on.wait(5)
        await chats[1].turn(ids_turn("1", [1, 2, 3], max_tokens=900))
        load = engine.load()
        assert load.conversations == ConversationCounts(running=1, waiting=1, attached=1, idle=1)
        assert (load.running_turns, load.waiting_turns) == (1, 1)
        device = load.device
        assert device.total_tokens == 64 * BLOCK_SIZE
        assert device.in_use_tokens >= BLOCK_SIZE
        going_on.set()
        assert device.in_use_tokens + device.idle_tokens + device.free_tokens == device.total_tokens
        for chat in chats[:2]:
            await chat.cancel(TurnId("1"), keep=False)
        load = engine.load()
        assert load.failed_turns == {"TURN_CANCELLED": 2}
        assert load.conversations == ConversationCounts(running=0, waiting=0, attached=3, idle=1)


async def test_refused_turns_and_streams_that_come_back_are_counted() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        with pytest.raises(InvalidRequest):
            await chat.turn(ids_turn("1", [10**6]))
        with pytest.raises(ContextOverflow):
            await chat.turn(ids_turn("1", [1] * 5000))
        await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        load = engine.load()
        assert load.refused_turns == {"INVALID_REQUEST": 1, "CONTEXT_OVERFLOW": 1}
        assert (load.accepted_turns, load.reattached_streams) == (0, 1)


# -- in the log


def test_the_summary_tells_an_interval_in_which_something_was_computed() -> None:
    now = a_load(uptime_s=110.0, steps=450, step_s=17.0, completion_tokens=3600, computed_tokens=8000)
    assert summary_line(now, a_load()) == (
        "3 running, 5 waiting | 10.0 tokens/s out, 250.0 computed/s | "
        "KV 25% in use, 50% idle, 25% free | step 20.0 ms"
    )
    assert summary_line(a_load(uptime_s=110.0), a_load()) is None
