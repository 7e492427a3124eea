"""Restarts, failures, the end, and what is in memory meanwhile, over the fake model."""

import asyncio
import time
from pathlib import Path

import pytest

from engine.attachment import Attachment
from engine.errors import (
    DataDirError,
    Draining,
    EngineStopped,
)
from engine.types import (
    FinishReason,
    OpenRequest,
    ResumeRequest,
    TurnAccepted,
    TurnRequest,
)
from tests.engine.harness import LOCAL, VOCAB, fake_engine, ids_turn, read, say, text_turn, until_done
from tests.fakes import stateless_reply


async def test_conversations_survive_a_restart_token_for_token(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(system="Remember."))
        first, done = await say(chat, text_turn("1", "a fact"))
        last_seq = done.seq
    engine, runner, _ = fake_engine(tmp_path)
    async with engine:
        again = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id, after_seq=0))
        assert again.committed_tokens == done.committed_tokens and again.last_seq >= last_seq + 2**20
        assert await until_done(again) == (first, done)
        second, done = await say(again, text_turn("2", "and now?"))
        record, turns = await engine.get(LOCAL, chat.conversation_id)
        history = [*turns[0].prompt_ids, *first, *turns[1].prompt_ids]
        assert second == stateless_reply(history, 12, frozenset(), VOCAB)
        assert done.usage.recomputed_tokens == len(turns[0].prompt_ids) + len(first) - 1
        assert not done.history_rewritten
        assert [turn.messages[0].content for turn in turns] == ["a fact", "and now?"]


async def test_the_first_turn_after_a_restart_says_that_an_earlier_attempt_is_void(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        again = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        await again.turn(ids_turn("1", [1]))
        (accepted,) = await read(again, 1)
        assert isinstance(accepted, TurnAccepted) and accepted.restarted


async def test_a_failing_step_ends_the_engine_and_everybody_hears_it() -> None:
    engine, runner, _ = fake_engine()

    def break_down(plan: object) -> None:
        raise RuntimeError("the device is gone")

    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        idle = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1]))
        runner.before_step = break_down
        await chat.turn(ids_turn("2", [2]))
        for attachment in (chat, idle):
            with pytest.raises(EngineStopped, match="the device is gone"):
                await until_done(attachment)
        assert "the device is gone" in str(await asyncio.wait_for(engine.wait_failed(), 1))
        with pytest.raises(EngineStopped):
            await engine.open(LOCAL, OpenRequest())


async def test_a_stalled_step_counts_as_failure() -> None:
    engine, runner, _ = fake_engine(stall_s=0.05)
    runner.before_step = lambda plan: time.sleep(0.3)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1]))
        with pytest.raises(EngineStopped, match="made no progress for 0.05 s"):
            await until_done(chat)


async def test_draining_lets_turns_end_then_cancels_and_tells_the_streams() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        short = await engine.open(LOCAL, OpenRequest())
        long = await engine.open(LOCAL, OpenRequest())
        await short.turn(ids_turn("1", [1], max_tokens=3))
        await long.turn(ids_turn("1", [1], max_tokens=900))
        await engine.drain(0.05)
        assert (await until_done(short))[1].finish_reason is FinishReason.LENGTH
        assert (await until_done(long))[1].finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
        for chat in (short, long):
            with pytest.raises(Draining):
                await read(chat, 1)
        with pytest.raises(Draining):
            await engine.open(LOCAL, OpenRequest())


async def test_idle_conversations_leave_memory_and_come_back() -> None:
    engine, _, manager = fake_engine(max_conversations=2)
    async with engine:
        replies = {}
        for number in range(5):
            chat = await engine.open(LOCAL, OpenRequest())
            replies[chat.conversation_id], _ = await say(chat, ids_turn("1", [number, 9]))
            chat.detach()
        assert len(engine._registry) <= 2
        for number, (id, first) in enumerate(replies.items()):
            again = await engine.resume(LOCAL, ResumeRequest(id))
            second, _ = await say(again, ids_turn("2", [3]))
            assert second == stateless_reply([number, 9, *first, 3], 12, frozenset(), VOCAB)
            again.detach()


async def test_two_resumes_at_once_load_the_conversation_once(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1]))
    engine, _, manager = fake_engine(tmp_path)
    async with engine:
        request = ResumeRequest(chat.conversation_id)
        one, two = await asyncio.gather(engine.resume(LOCAL, request), engine.resume(LOCAL, request))
        assert one._live is two._live
        manager.check()


def test_a_data_dir_has_one_server(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    try:
        with pytest.raises(DataDirError, match="in use"):
            fake_engine(tmp_path)
    finally:
        engine._log.close()


async def test_what_only_a_template_needs_is_not_in_memory_until_one_is_rendered(tmp_path: Path) -> None:
    async def hold(chat: Attachment, turn: TurnRequest) -> bool:
        before = list(chat._live.core.tokens)
        ids, _ = await say(chat, turn)
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        assert ids == stateless_reply([*before, *turns[-1].prompt_ids], 12, frozenset(), VOCAB)
        return bool(chat._live.not_in_past or chat._live.past.said)

    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        assert [await hold(chat, ids_turn(str(n), [n, 5])) for n in range(3)] == [False] * 3
        assert await hold(chat, text_turn("text", "hello"))
        assert not await hold(chat, ids_turn("ids", [1]))
        assert await hold(chat, text_turn("again", "hello"))
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        assert not chat._live.not_in_past
        assert await hold(chat, text_turn("more", "hello"))
        assert "hello" in "".join(said.value["content"] for said in chat._live.past.said)
