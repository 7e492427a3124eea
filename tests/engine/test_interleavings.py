"""Two things at once: every await of an operation is a place where another one may come in between."""

import asyncio
import time
from pathlib import Path

import pytest

from engine.errors import DataDirError, Draining, NotFound
from engine.live import MAX_UNREAD_TOKENS
from engine.types import (
    ConversationId,
    Delta,
    FinishReason,
    GenerateRequest,
    OpenRequest,
    RegenerateRequest,
    ResumeRequest,
    SamplingParams,
    Tenant,
    TurnDone,
    TurnId,
)
from tests.engine.harness import (
    LOCAL,
    VOCAB,
    Held,
    fake_engine,
    ids_turn,
    read,
    say,
    text_turn,
    until,
    until_done,
)
from tests.fakes import stateless_reply


async def test_a_turn_that_is_sent_again_while_its_text_is_tokenised_is_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        first = asyncio.create_task(chat.turn(text_turn("1", "hello")))
        await asyncio.sleep(0)
        assert chat._live.preparing is not None
        again = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        await again.turn(text_turn("1", "hello"))
        await first
        assert (await until_done(again))[1].committed_tokens > 0


async def test_a_conversation_is_erased_although_its_last_commit_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _, manager = fake_engine()
    async with engine:
        held = Held(monkeypatch, engine, "commit_turn")
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1, 2, 3]))
        let_go = await held.arrived()
        deleting = asyncio.create_task(engine.delete(LOCAL, chat.conversation_id))
        await asyncio.sleep(0)
        let_go(DataDirError("the disk is full"))
        await asyncio.wait_for(deleting, 5)
        with pytest.raises(NotFound):
            await engine.get(LOCAL, chat.conversation_id)
        assert manager.statistics().num_free == 64


async def test_a_conversation_that_is_deleted_while_it_is_loaded_does_not_come_to_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1, 2, 3]))
    engine, _, manager = fake_engine(tmp_path)
    async with engine:
        held = Held(monkeypatch, engine, "set_seq_mark")
        resuming = asyncio.create_task(engine.resume(LOCAL, ResumeRequest(chat.conversation_id)))
        let_go = await held.arrived()
        deleting = asyncio.create_task(engine.delete(LOCAL, chat.conversation_id))
        await asyncio.sleep(0.02)
        let_go(None)
        await deleting
        with pytest.raises(NotFound):
            await until_done(await resuming)
        assert not len(engine._registry)


async def test_a_stranger_who_asks_first_does_not_keep_the_owner_out(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        request = ResumeRequest(chat.conversation_id)
        stranger, owner = await asyncio.gather(
            engine.resume(Tenant("stranger"), request),
            engine.resume(LOCAL, request),
            return_exceptions=True,
        )
        assert isinstance(stranger, NotFound) and not isinstance(owner, BaseException)


async def test_a_conversation_that_is_resumed_while_it_is_opened_exists_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _, manager = fake_engine()
    async with engine:
        id = ConversationId("chosen")
        one, two = await asyncio.gather(
            engine.open(LOCAL, OpenRequest(id)), engine.resume(LOCAL, ResumeRequest(id))
        )
        assert one._live is two._live
        assert len(manager._tables) == 1


async def test_a_generation_takes_no_name_that_a_conversation_may_have() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("generate-1")))
        first, _ = await say(chat, ids_turn("1", [1]))
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        async for _ in engine.generate(LOCAL, GenerateRequest(token_ids=(7,), sampling=sampling)):
            assert (await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))).committed_tokens == 13
        again = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        second, _ = await say(again, ids_turn("2", [2]))
        assert second == stateless_reply([1, *first, 2], 12, frozenset(), VOCAB)


async def test_every_lost_connection_has_its_whole_grace() -> None:
    engine, runner, _ = fake_engine(disconnect_grace_s=0.3)
    runner.before_step = lambda plan: time.sleep(0.002)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1], max_tokens=900))
        chat.detach()
        await asyncio.sleep(0.2)
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        chat.detach()
        await asyncio.sleep(0.2)  # more than the grace of the first time, less than that of the second
        assert chat._live.flight is not None and chat._live.flight.turn.finish_reason is None
        await until(lambda: chat._live.idle.is_set())


async def test_a_turn_that_begins_behind_its_stream_is_cancelled_after_the_grace() -> None:
    engine, _, _ = fake_engine(disconnect_grace_s=0.05)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        turn = asyncio.create_task(chat.turn(text_turn("1", "hello", max_tokens=900)))
        await asyncio.sleep(0)
        assert chat._live.preparing is not None
        chat.detach()
        await turn
        await until(lambda: chat._live.idle.is_set())
        _, (record,) = await engine.get(LOCAL, chat.conversation_id)
        assert record.finish_reason is FinishReason.CANCELLED


async def test_a_reader_that_is_up_to_date_wakes_a_turn_that_another_had_paused() -> None:
    engine, _, _ = fake_engine(num_slots=128)
    async with engine:
        slow = await engine.open(LOCAL, OpenRequest())
        await slow.turn(ids_turn("1", [1], max_tokens=3 * MAX_UNREAD_TOKENS))
        await until(lambda: slow._live.flight is not None and slow._live.flight.turn.paused)
        seen = [id for e in slow._live.journal if isinstance(e, Delta) for id in e.token_ids]
        again = await engine.resume(LOCAL, ResumeRequest(slow.conversation_id, after_seq=slow._live.seq))
        ids, _ = await asyncio.wait_for(until_done(again, seen), 10)
        assert ids == stateless_reply([1], 3 * MAX_UNREAD_TOKENS, frozenset(), VOCAB)


async def test_draining_without_grace_still_tells_what_was_committed() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1], max_tokens=900))
        await read(chat, 2)
        reading = asyncio.create_task(until_done(chat))
        await asyncio.sleep(0)
        await engine.drain(0)
        assert (await reading)[1].finish_reason is FinishReason.CANCELLED
        with pytest.raises(Draining):
            await read(chat, 1)


async def test_tokens_count_as_committed_once_they_are_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, _ = fake_engine()
    async with engine:
        held = Held(monkeypatch, engine, "commit_turn")
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1, 2, 3]))
        let_go = await held.arrived()
        again = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id, expect_committed_tokens=0))
        assert (again.committed_tokens, again.committed_turns) == (0, 0)
        let_go(None)
        assert (await until_done(again))[1].committed_tokens == 15


async def test_no_timer_of_a_turn_outlives_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    engine, runner, _ = fake_engine(tmp_path)
    runner.before_step = lambda plan: time.sleep(0.002)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1], max_tokens=900, timeout_s=0.05))
    await asyncio.sleep(0.1)
    assert not complaints


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("prompt", ["ids", "text"])
async def test_a_turn_can_be_cancelled_while_it_is_prepared_queued_or_committed(
    keep: bool, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _, manager = fake_engine(max_concurrent=1)
    async with engine:
        busy = await engine.open(LOCAL, OpenRequest())
        await busy.turn(ids_turn("1", [9], max_tokens=200))
        chat = await engine.open(LOCAL, OpenRequest())
        request = text_turn("1", "hello") if prompt == "text" else ids_turn("1", [1, 2, 3])
        sending = asyncio.create_task(chat.turn(request))
        await asyncio.sleep(0)
        await chat.cancel(TurnId("1"), keep)
        await sending
        events = await read(chat, 2)
        if keep:
            assert isinstance(events[1], TurnDone)
            usage = events[1].usage
            assert usage.prompt_tokens == (
                usage.cached_device_tokens + usage.recomputed_tokens + usage.new_tokens
            )
        await until_done(busy)
        held = Held(monkeypatch, engine, "commit_turn")
        await chat.turn(ids_turn("2", [4]))
        let_go = await held.arrived()
        await chat.cancel(TurnId("2"), keep)
        let_go(None)
        assert (await until_done(chat))[1].finish_reason is FinishReason.LENGTH
        manager.check()
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        assert [turn.turn_id for turn in turns] == (["1", "2"] if keep else ["2"])


async def test_a_client_that_resumes_while_a_turn_is_replaced_hears_of_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1, 2, 3]))
        held = Held(monkeypatch, engine, "load")
        resuming = asyncio.create_task(engine.resume(LOCAL, ResumeRequest(chat.conversation_id, after_seq=0)))
        let_old_go = await held.arrived()
        sampling = SamplingParams(max_tokens=5, ignore_eos=True)
        regenerating = asyncio.create_task(chat.regenerate(RegenerateRequest(TurnId("2"), None, sampling)))
        (await held.arrived())(None)
        await regenerating
        await until(chat._live.idle.is_set)
        let_old_go(None)
        (await held.arrived())(None)
        ids, done = await until_done(await resuming)
        assert (done.turn_id, len(ids)) == ("2", 5)
