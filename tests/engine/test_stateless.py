"""An engine that keeps no KV between turns, over the fake model: however a turn ends, the next finds none."""

import threading

import pytest

from engine.attachment import Attachment
from engine.batch import StepPlan
from engine.cache.manager import KVCacheManager
from engine.errors import DataDirError
from engine.types import OpenRequest, TurnId
from tests.engine.harness import LOCAL, WatchedRunner, expected, fake_engine, ids_turn, say, until

PROMPT = [*range(40)]


class HeldStep:
    """The first step that decodes goes on when the test lets it."""

    def __init__(self, runner: WatchedRunner) -> None:
        self.has_begun, self._may_go_on = threading.Event(), threading.Event()
        runner.before_step = self._hold

    def _hold(self, plan: StepPlan) -> None:
        if any(segment.first > len(PROMPT) for segment in plan.segments):
            self.has_begun.set()
            self._may_go_on.wait(5)

    async def begun(self) -> None:
        await until(self.has_begun.is_set)

    def let_go(self) -> None:
        self._may_go_on.set()


async def finds_nothing(chat: Attachment, history: list[int], manager: KVCacheManager) -> None:
    ids, done = await say(chat, ids_turn("next", [1]))
    assert ids == expected([*history, 1])
    usage = done.usage
    assert (usage.cached_device_tokens, usage.cached_host_tokens) == (0, 0)
    assert usage.recomputed_tokens + usage.new_tokens == usage.prompt_tokens == len(history) + 1
    await until(lambda: manager.statistics().num_free == manager.pool.num_slots)
    assert manager.statistics().num_host_free == manager.tiers.host.num_slots
    manager.check()


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("let_go_first", [False, True])
@pytest.mark.parametrize("keep", [False, True])
async def test_a_turn_cancelled_while_a_step_computes_it_leaves_no_kv(
    keep: bool, let_go_first: bool, run_ahead: int
) -> None:
    engine, runner, manager = fake_engine(stateless=True, run_ahead=run_ahead, num_host_slots=8)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        ids, _ = await say(chat, ids_turn("0", [7] * 20))
        history = [*[7] * 20, *ids]
        step = HeldStep(runner)
        await chat.turn(ids_turn("1", PROMPT, max_tokens=50))
        await step.begun()
        await chat.cancel(TurnId("1"), keep)
        if let_go_first:
            step.let_go()
            await until(lambda: manager.statistics().num_free == manager.pool.num_slots)
        await until(lambda: chat._live.flight is None)
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        history = [token for turn in turns for token in (*turn.prompt_ids, *turn.reply_ids)]
        assert (len(history) >= 72) is keep
        async for event in chat.events():
            if event.seq == chat._live.seq:
                break
        threading.Timer(0.02, step.let_go).start()
        await finds_nothing(chat, history, manager)


async def test_a_turn_whose_commit_fails_leaves_no_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, manager = fake_engine(stateless=True)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        ids, _ = await say(chat, ids_turn("0", [7] * 20))

        def full(*_: object, **__: object) -> None:
            raise DataDirError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr("engine.log_statements.commit_turn", full)
            with pytest.raises(DataDirError, match="the disk is full"):
                await say(chat, ids_turn("1", PROMPT))
        await finds_nothing(chat, [*[7] * 20, *ids], manager)


async def test_a_turn_that_ends_before_its_prompt_is_computed_leaves_no_kv() -> None:
    engine, runner, manager = fake_engine(stateless=True, max_step_tokens=16)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", PROMPT, timeout_s=0.0))
        async for event in chat.events():
            if event.seq == chat._live.seq and chat._live.flight is None:
                break
        await finds_nothing(chat, PROMPT, manager)
