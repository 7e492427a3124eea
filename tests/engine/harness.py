"""An AsyncEngine over the fake model, everything real but the arithmetic, and what a client does with it."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from engine.async_engine import AsyncEngine
from engine.attachment import Attachment
from engine.batch import StepPlan, StepResult
from engine.cache.block_pool import BlockPool
from engine.cache.manager import KVCacheManager
from engine.cache.policy import lru
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.loader import GREEDY, SystemClock
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.text_service import TextService
from engine.token_log import TokenLog
from engine.types import (
    ConversationEvent,
    Delta,
    Limits,
    Message,
    ModelInfo,
    RegenerateRequest,
    SamplingParams,
    StateChanged,
    Tenant,
    TurnDone,
    TurnFailed,
    TurnId,
    TurnRequest,
    Usage,
)
from tests.fakes import CHAT_TEMPLATE, FakeRunner, FakeTransfer, byte_tokenizer, stateless_reply

LOCAL = Tenant("local")
BLOCK_SIZE = 16
VOCAB = 258
IM_END = 257


class WatchedRunner(FakeRunner):
    """A fake model whose steps the test may hold up, or break."""

    before_step: Callable[[StepPlan], None] | None = None

    def run(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> StepResult:
        if self.before_step is not None:
            self.before_step(plan)
        return super().run(plan, wait_for)


def fake_engine(
    data_dir: Path | None = None,
    *,
    num_slots: int = 64,
    num_host_slots: int = 0,
    fingerprint: str = "fake",
    eos_ids: frozenset[int] = frozenset({IM_END}),
    template: str = CHAT_TEMPLATE,
    **settings: object,
) -> tuple[AsyncEngine, WatchedRunner, KVCacheManager]:
    config = EngineConfig(Path("fake"), block_size=BLOCK_SIZE, data_dir=data_dir, **settings)  # type: ignore[arg-type]
    manager = KVCacheManager(BlockPool(num_slots), BLOCK_SIZE, lru, BlockPool(num_host_slots))
    runner = WatchedRunner(num_slots, BLOCK_SIZE, VOCAB)
    clock = SystemClock()
    context = (num_slots - 1) * BLOCK_SIZE
    scheduler = Scheduler(manager, config.max_step_tokens, config.max_concurrent)
    transfer = FakeTransfer(runner, num_host_slots)
    core = EngineCore(manager, scheduler, runner, clock, eos_ids, context, transfer)
    limits = Limits(context, config.max_concurrent, config.max_queue, 1 << 20)
    tokenizer = byte_tokenizer(template)
    info = ModelInfo("fake", "0", fingerprint, "Fake", "int64", "cpu", VOCAB, tuple(eos_ids), True, limits)
    engine = AsyncEngine(
        config,
        core,
        TokenLog.open(data_dir, clock=clock),
        TextService(tokenizer),
        Sampler(VOCAB, eos_ids),
        clock,
        info,
        GREEDY,
        lambda: None,
    )
    return engine, runner, manager


def text_turn(id: str, text: str, max_tokens: int = 12, **more: object) -> TurnRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return TurnRequest(TurnId(id), (Message("user", text),), sampling=sampling, **more)  # type: ignore[arg-type]


def ids_turn(id: str, ids: Sequence[int], max_tokens: int = 12, **more: object) -> TurnRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return TurnRequest(TurnId(id), token_ids=tuple(ids), sampling=sampling, **more)  # type: ignore[arg-type]


async def until_done(attachment: Attachment, seen: Sequence[int] = ()) -> tuple[list[int], TurnDone]:
    """Reads one turn to its end: ids as a client would collect them, and its TurnDone."""
    ids = list(seen)
    async for event in attachment.events():
        if isinstance(event, Delta):
            ids[event.offset :] = event.token_ids
        if isinstance(event, TurnFailed):
            raise event.error
        if isinstance(event, TurnDone):
            return ids, event
    raise AssertionError("the events ended before the turn")


async def say(attachment: Attachment, request: TurnRequest) -> tuple[list[int], TurnDone]:
    await attachment.turn(request)
    return await until_done(attachment)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def read(attachment: Attachment, count: int) -> list[ConversationEvent]:
    """The next events but those that only tell of states."""
    events: list[ConversationEvent] = []
    if count:
        async for event in attachment.events():
            if isinstance(event, StateChanged):
                continue
            events.append(event)
            if len(events) == count:
                break
    return events


def append_turn(id: str, ids: list[int]) -> TurnRequest:
    return TurnRequest(TurnId(id), token_ids=tuple(ids), wants_reply=False)


def again(id: str, replaces: str | None = None, max_tokens: int = 12) -> RegenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return RegenerateRequest(TurnId(id), None if replaces is None else TurnId(replaces), sampling)


def expected(history: list[int], num_tokens: int = 12) -> list[int]:
    return stateless_reply(history, num_tokens, frozenset(), VOCAB)


async def regenerated(chat: Attachment, request: RegenerateRequest) -> tuple[list[int], TurnDone]:
    await chat.regenerate(request)
    return await until_done(chat)


class Held:
    """Stands in for an operation of the log: it is done at once, its outcome told when the test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: AsyncEngine, name: str) -> None:
        self.calls: list[Callable[[Exception | None], None]] = []
        operation = getattr(engine._log, name)

        def held(*args: object) -> Future[object]:
            outcome: Future[object] = Future()
            done = operation(*args)

            def let_go(error: Exception | None = None) -> None:
                if error is not None:
                    outcome.set_exception(error)
                else:
                    done.add_done_callback(lambda done: _copy(done, outcome))

            self.calls.append(let_go)
            return outcome

        monkeypatch.setattr(engine._log, name, held)

    async def arrived(self) -> Callable[[Exception | None], None]:
        await until(lambda: bool(self.calls))
        return self.calls.pop(0)


def _copy(done: "Future[object]", outcome: "Future[object]") -> None:
    error = done.exception()
    if error is None:
        outcome.set_result(done.result())
    else:
        outcome.set_exception(error)


async def talked(chat: Attachment, times: int = 3) -> list[int]:
    """That many turns of 10 tokens and a reply of 12; the whole history."""
    history: list[int] = []
    for number in range(times):
        prompt = [number * 10 + n for n in range(10)]
        reply, _ = await say(chat, ids_turn(str(number), prompt))
        history += [*prompt, *reply]
    return history


def check_sums(usage: Usage) -> None:
    """Every token of the prompt is counted once, and so is every reason."""
    cached = usage.cached_device_tokens + usage.cached_host_tokens
    assert usage.prompt_tokens == cached + usage.recomputed_tokens + usage.new_tokens
    reasons = (usage.evicted_tokens, usage.restart_tokens, usage.rewritten_tokens, usage.cut_tokens)
    assert usage.recomputed_tokens == sum(reasons)
    assert 0 <= usage.never_computed_tokens <= usage.new_tokens and min(reasons) >= 0
    assert 0 <= usage.unseen_tokens <= usage.cached_device_tokens
