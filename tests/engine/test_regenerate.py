"""Other replies to turns that were, over the fake model."""

from dataclasses import replace

import pytest

from engine.conversation import TurnState
from engine.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    TurnCancelled,
)
from engine.types import (
    ConversationId,
    FinishReason,
    OpenRequest,
    TurnFailed,
    TurnId,
)
from tests.engine.harness import (
    BLOCK_SIZE,
    LOCAL,
    again,
    append_turn,
    expected,
    fake_engine,
    ids_turn,
    read,
    regenerated,
    say,
    until,
    until_done,
)


@pytest.mark.parametrize("replaces", ["2", None])
async def test_regenerating_replaces_the_turn_and_all_behind_it(replaces: str | None) -> None:
    engine, _, manager = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        first, _ = await say(chat, ids_turn("1", [1, 2]))
        _, done = await say(chat, ids_turn("2", [3, 4], max_tokens=5))
        if replaces:
            await say(chat, ids_turn("3", [9]))
        history = [1, 2, *first, 3, 4]
        ids, done = await regenerated(chat, again("2b", replaces))
        assert ids == expected(history)
        assert done.committed_tokens == len(history) + 12
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        assert [turn.turn_id for turn in turns] == ["1", "2b"]
        assert turns[1].prompt_ids == (3, 4) and turns[1].first_token == 14
        ids, _ = await say(chat, ids_turn("2", [7]))  # its id is free again
        assert ids == expected([*history, *expected(history), 7])
        manager.check()
        assert len(manager._tables) == 1, "what was replaced is forgotten"


async def test_regenerating_a_long_prompt_computes_one_block_at_most() -> None:
    engine, runner, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        prompt = [n % 250 for n in range(300)]
        await say(chat, ids_turn("1", prompt, max_tokens=100))
        before = runner.num_computed
        ids, done = await regenerated(chat, again("2"))
        assert ids == expected(prompt)
        assert runner.num_computed - before <= BLOCK_SIZE + 11
        usage = done.usage
        assert usage.new_tokens == 0 and 0 < usage.recomputed_tokens <= BLOCK_SIZE
        assert usage.cached_device_tokens + usage.recomputed_tokens == usage.prompt_tokens == 300


@pytest.mark.parametrize("how", ["discarded", "not committed"])
async def test_a_regeneration_that_comes_to_nothing_leaves_the_reply_and_its_kv(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner, manager = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        first, done = await say(chat, ids_turn("1", [1, 2], max_tokens=60))
        if how == "discarded":
            await chat.regenerate(again("2", max_tokens=900))
            await read(chat, 3)
            assert engine._registry.get(chat.conversation_id).committed_tokens == 62  # type: ignore[union-attr]
            await chat.cancel(TurnId("2"), keep=False)
            with pytest.raises(TurnCancelled, match="turn 2 was cancelled and discarded"):
                await until_done(chat)
        else:
            with monkeypatch.context() as patch:
                lost = engine._log.commit_turn
                patch.setattr(
                    engine._log, "commit_turn", lambda id, *rest: lost(ConversationId("nobody"), *rest)
                )
                with pytest.raises(NotFound, match="nobody is not in the token log"):
                    await regenerated(chat, again("2"))
        manager.check()
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        assert [turn.turn_id for turn in turns] == ["1"]
        assert len(manager._tables) == 1
        before = runner.num_computed
        ids, done = await say(chat, ids_turn("3", [5]))
        assert ids == expected([1, 2, *first, 5])
        assert runner.num_computed - before <= 2 * BLOCK_SIZE + 11
        assert done.usage.new_tokens == 2, "the last token was sampled only; nothing else is new"


async def test_a_reply_that_stands_counts_as_computed_although_it_was_set_aside() -> None:
    engine, _, manager = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1, 2], max_tokens=60))
        await chat.regenerate(again("2", max_tokens=900))
        await read(chat, 3)
        await chat.cancel(TurnId("2"), keep=False)
        with pytest.raises(TurnCancelled):
            await until_done(chat)
        await until(lambda: manager.statistics().num_evictable + manager.pool.num_free == 64)
        manager.drop(chat._live.core.table)
        _, done = await say(chat, ids_turn("3", [5]))
        usage = done.usage
        assert (usage.cached_device_tokens, usage.recomputed_tokens, usage.new_tokens) == (0, 61, 2)


async def test_a_cancelled_regeneration_that_is_kept_has_replaced_the_reply() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1, 2]))
        await chat.regenerate(again("2", max_tokens=900))
        await read(chat, 4)
        await chat.cancel(TurnId("2"), keep=True)
        _, done = await until_done(chat)
        assert done.finish_reason is FinishReason.CANCELLED
        _, (turn,) = await engine.get(LOCAL, chat.conversation_id)
        assert turn.turn_id == "2"
        assert list(turn.reply_ids) == expected([1, 2], len(turn.reply_ids))


async def test_a_repeated_regeneration_is_replayed() -> None:
    engine, runner, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1, 2]))
        told = await regenerated(chat, again("2", "1"))
        computed = runner.num_computed
        assert await regenerated(chat, again("2", "1")) == told and runner.num_computed == computed
        with pytest.raises(AlreadyExists, match="turn id 2 was used in c-.* with other content"):
            await chat.regenerate(again("2"))


async def test_what_cannot_be_regenerated_is_said() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        with pytest.raises(InvalidRequest, match="mine has no turn yet, so there is no reply to regenerate"):
            await chat.regenerate(again("1"))
        await chat.turn(append_turn("1", [1]))
        await read(chat, 2)
        with pytest.raises(InvalidRequest, match="turn 1 of mine was appended and has no reply to regenerat"):
            await chat.regenerate(again("2"))
        with pytest.raises(NotFound, match="turn 7 is not in mine; nothing was regenerated"):
            await chat.regenerate(again("2", "7"))


@pytest.mark.parametrize("how", ["cancel", "disconnect", "deadline", "drain"])
async def test_a_regeneration_that_ends_before_it_has_said_anything_leaves_the_old_reply(how: str) -> None:
    engine, _, manager = fake_engine(max_concurrent=1, disconnect_grace_s=0.01)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1, 2]))
        before = await engine.get(LOCAL, chat.conversation_id)
        busy = await engine.open(LOCAL, OpenRequest())
        await busy.turn(ids_turn("1", [9], max_tokens=900))
        request = replace(again("2"), timeout_s=0.01 if how == "deadline" else None)
        await chat.regenerate(request)
        assert (flight := chat._live.flight) is not None and flight.turn.state is TurnState.WAITING
        error: type[Exception] = TurnCancelled
        if how == "cancel":
            await chat.cancel(TurnId("2"), keep=True)
        elif how == "disconnect":
            chat.detach()
        elif how == "deadline":
            error = DeadlineExceeded
        else:
            await engine.drain(0)
        await until(chat._live.idle.is_set)
        if how != "disconnect":
            _, failed = await read(chat, 2)
            assert isinstance(failed, TurnFailed) and type(failed.error) is error
        assert await engine.get(LOCAL, chat.conversation_id) == before
        manager.check()
