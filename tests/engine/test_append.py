"""Turns without a reply, over the fake model."""

from pathlib import Path

import pytest

from engine.errors import (
    AlreadyExists,
    Conflict,
    ContextOverflow,
    DataDirError,
)
from engine.types import (
    ConversationId,
    FinishReason,
    OpenRequest,
    ResumeRequest,
    TurnAccepted,
    TurnDone,
    TurnFailed,
    Usage,
)
from tests.engine.harness import (
    LOCAL,
    Held,
    append_turn,
    expected,
    fake_engine,
    ids_turn,
    read,
    say,
    until,
    until_done,
)


async def test_an_appended_turn_is_done_at_once_and_read_by_the_next() -> None:
    engine, runner, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(append_turn("1", [1, 2, 3]))
        accepted, done = await read(chat, 2)
        assert isinstance(accepted, TurnAccepted) and isinstance(done, TurnDone)
        assert done.finish_reason is FinishReason.APPENDED and done.committed_tokens == 3
        assert done.usage == Usage(prompt_tokens=3, new_tokens=3) and done.seq == accepted.seq + 1
        ids, done = await say(chat, ids_turn("2", [4]))
        assert ids == expected([1, 2, 3, 4])


async def test_what_was_appended_is_computed_before_anybody_asks() -> None:
    engine, runner, manager = fake_engine(max_step_tokens=16)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(append_turn("1", list(range(100))))
        await read(chat, 2)
        await until(lambda: runner.num_computed == 100)
        _, done = await say(chat, ids_turn("2", [4]))
        usage = done.usage
        assert (usage.cached_device_tokens, usage.recomputed_tokens, usage.new_tokens) == (100, 0, 1)
        manager.check()


async def test_an_engine_that_keeps_no_kv_computes_nothing_ahead() -> None:
    engine, _, _ = fake_engine(stateless=True)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(append_turn("1", list(range(100))))
        await read(chat, 2)
        other = await engine.open(LOCAL, OpenRequest())
        await say(other, ids_turn("1", [1]))
        _, done = await say(chat, ids_turn("2", [4]))
        assert (done.usage.cached_device_tokens, done.usage.new_tokens) == (0, 101)


async def test_an_append_is_replayed_when_it_is_repeated_and_survives_a_restart(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(append_turn("1", [1, 2, 3]))
        told = await read(chat, 2)
        await chat.turn(append_turn("1", [1, 2, 3]))
        assert await read(chat, 2) == told
        with pytest.raises(AlreadyExists, match="turn id 1 was used in c-.* with other content"):
            await chat.turn(ids_turn("1", [1, 2, 3]))
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id, after_seq=0))
        assert await read(chat, 2) == told
        assert (chat.committed_tokens, chat.committed_turns) == (3, 1)
        assert (await say(chat, ids_turn("2", [4])))[0] == expected([1, 2, 3, 4])


async def test_an_append_may_fill_the_context_and_no_more() -> None:
    engine, _, _ = fake_engine(num_slots=4)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await chat.turn(append_turn("1", [1] * 48))
        (_, done) = await read(chat, 2)
        assert isinstance(done, TurnDone) and done.context_left == 0
        with pytest.raises(ContextOverflow, match="turn needs 1 tokens but 0 of 48 are left in mine"):
            await chat.turn(append_turn("2", [1]))


async def test_an_append_is_refused_while_the_turn_before_it_is_committed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _, _ = fake_engine()
    async with engine:
        held = Held(monkeypatch, engine, "commit_turn")
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await chat.turn(ids_turn("1", [1]))
        let_go = await held.arrived()
        with pytest.raises(Conflict, match="turn 1 is in flight in mine; wait for its turn_done or cancel"):
            await chat.turn(append_turn("2", [2]))
        let_go(None)
        reply, _ = await until_done(chat)
        await chat.turn(append_turn("2", [2]))
        (await held.arrived())(None)
        await until(chat._live.idle.is_set)
        assert list(chat._live.core.tokens) == [1, *reply, 2]


async def test_an_append_that_the_log_refuses_leaves_no_trace_though_it_was_computed_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, runner, manager = fake_engine(max_step_tokens=16, run_ahead=1)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        reply, _ = await say(chat, ids_turn("1", [1]))
        with monkeypatch.context() as patch:
            held = Held(patch, engine, "commit_turn")
            before = runner.num_computed
            await chat.turn(append_turn("2", list(range(100))))
            let_go = await held.arrived()
            await until(lambda: runner.num_computed > before)
            let_go(DataDirError("the disk is full"))
            await until(chat._live.idle.is_set)
        (_, failed) = await read(chat, 2)
        assert isinstance(failed, TurnFailed)
        manager.check()
        assert (await say(chat, ids_turn("3", [5])))[0] == expected([1, *reply, 5])


async def test_what_is_computed_ahead_gives_way_to_whoever_wants_room() -> None:
    engine, _, manager = fake_engine(num_slots=16, max_step_tokens=16)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(append_turn("1", list(range(150))))
        await read(chat, 2)
        other = await engine.open(LOCAL, OpenRequest())
        reply, _ = await say(other, ids_turn("1", [7] * 150, max_tokens=60))
        assert reply == expected([7] * 150, 60)
        await other.close(delete=True)
        ids, done = await say(chat, ids_turn("2", [4]))
        assert ids == expected([*range(150), 4])
        manager.check()
