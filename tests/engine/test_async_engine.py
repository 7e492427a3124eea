"""Operations of conversations on the event loop, over the fake model."""

import asyncio
import time
from pathlib import Path

import pytest

from engine.errors import (
    AlreadyExists,
    AttachmentTaken,
    Conflict,
    ContextOverflow,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    QueueFull,
    TurnCancelled,
)
from engine.live import MAX_UNREAD_TOKENS
from engine.types import (
    ConversationId,
    Delta,
    FinishReason,
    GenerateRequest,
    OpenRequest,
    ResumeRequest,
    SamplingParams,
    Tenant,
    TurnDone,
    TurnId,
    TurnRequest,
)
from tests.engine.harness import LOCAL, VOCAB, fake_engine, ids_turn, read, say, text_turn, until, until_done
from tests.fakes import stateless_reply

NO_EOS = SamplingParams(ignore_eos=True)


async def test_a_second_turn_computes_only_what_is_new() -> None:
    engine, runner, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        first, done = await say(chat, ids_turn("1", range(40)))
        assert first == stateless_reply(range(40), 12, frozenset(), VOCAB)
        before = runner.num_computed
        second, done = await say(chat, ids_turn("2", [7, 8, 9]))
        assert second == stateless_reply([*range(40), *first, 7, 8, 9], 12, frozenset(), VOCAB)
        assert done.usage.cached_device_tokens == 51 and done.usage.new_tokens == 4
        assert runner.num_computed - before == 4 + 11
        assert done.committed_tokens == 40 + 12 + 3 + 12


async def test_text_turns_render_only_the_new_message_and_report_a_true_history() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(system="Be brief."))
        await say(chat, text_turn("1", "hello"))
        _, done = await say(chat, text_turn("2", "again"))
        assert not done.history_rewritten
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        head = await engine.detokenize(turns[0].prompt_ids, False)
        assert head.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello")
        assert "hello" not in await engine.detokenize(turns[1].prompt_ids, False)


async def test_a_repeated_turn_id_replays_its_outcome_and_other_content_is_refused() -> None:
    engine, runner, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        ids, done = await say(chat, ids_turn("1", [1, 2, 3]))
        computed = runner.num_computed
        assert await say(chat, ids_turn("1", [1, 2, 3])) == (ids, done)
        assert runner.num_computed == computed
        with pytest.raises(AlreadyExists, match="turn id 1 was used in c-.* with other content"):
            await chat.turn(ids_turn("1", [1, 2, 4]))


async def test_a_client_that_returns_in_the_middle_misses_nothing() -> None:
    engine, runner, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1, 2, 3], max_tokens=60))
        seen = await read(chat, 3)
        chat.detach()
        again = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id, after_seq=seen[-1].seq))
        first = [id for event in seen if isinstance(event, Delta) for id in event.token_ids]
        ids, _ = await until_done(again, first)
        assert ids == stateless_reply([1, 2, 3], 60, frozenset(), VOCAB)


async def test_a_stale_attachment_is_taken_over_and_told_so() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        old = await engine.open(LOCAL, OpenRequest())
        new = await engine.resume(LOCAL, ResumeRequest(old.conversation_id))
        with pytest.raises(AttachmentTaken):
            await until_done(old)
        with pytest.raises(AttachmentTaken):
            await old.turn(ids_turn("1", [1]))
        old.detach()
        await say(new, ids_turn("1", [1]))


@pytest.mark.parametrize("keep", [True, False])
async def test_cancel_keeps_or_discards_the_partial_answer_and_the_conversation_goes_on(keep: bool) -> None:
    engine, _, manager = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        _, done = await say(chat, ids_turn("1", [1, 2, 3]))
        await chat.turn(ids_turn("2", [4, 5], max_tokens=500))
        await read(chat, 4)
        await chat.cancel(TurnId("2"), keep)
        if keep:
            _, cancelled = await until_done(chat)
            assert cancelled.finish_reason is FinishReason.CANCELLED
            assert 3 <= cancelled.usage.completion_tokens < 500
        else:
            with pytest.raises(TurnCancelled):
                await until_done(chat)
        record, turns = await engine.get(LOCAL, chat.conversation_id)
        assert len(turns) == (2 if keep else 1)
        history = [id for turn in turns for id in (*turn.prompt_ids, *turn.reply_ids)]
        third, _ = await say(chat, ids_turn("3", [6]))
        assert third == stateless_reply([*history, 6], 12, frozenset(), VOCAB)
        manager.check()
        with pytest.raises(NotFound, match="turn 99 is not in flight"):
            await chat.cancel(TurnId("99"), keep)


async def test_a_dropped_connection_cancels_after_its_grace_and_retains() -> None:
    engine, _, manager = fake_engine(disconnect_grace_s=0.05)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1, 2], max_tokens=900))
        await read(chat, 2)
        chat.detach()
        await until(lambda: chat._live.idle.is_set())
        again = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id, after_seq=0))
        _, done = await until_done(again)
        assert done.finish_reason is FinishReason.CANCELLED and done.usage.completion_tokens < 900
        manager.check()


async def test_stop_strings_end_the_reply_and_nothing_behind_them_is_delivered() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        reply = stateless_reply([1, 2, 3], 40, frozenset(), VOCAB)
        text = await engine.detokenize(reply, True)
        stop = next(char for char in text[4:] if char.isascii())
        sampling = SamplingParams(max_tokens=40, stop=(stop,), ignore_eos=True)
        await chat.turn(TurnRequest(TurnId("1"), token_ids=(1, 2, 3), sampling=sampling))
        shown = ""
        async for event in chat.events():
            if isinstance(event, Delta):
                shown += event.text
            if isinstance(event, TurnDone):
                assert event.finish_reason is FinishReason.STOP_STRING and event.matched_stop == stop
                break
        assert shown == text[: text.index(stop)]


async def test_a_slow_reader_pauses_its_own_turn_only() -> None:
    engine, runner, _ = fake_engine(num_slots=128)
    async with engine:
        slow = await engine.open(LOCAL, OpenRequest())
        quick = await engine.open(LOCAL, OpenRequest())
        await slow.turn(ids_turn("1", [1], max_tokens=MAX_UNREAD_TOKENS * 4))
        await say(quick, ids_turn("1", [2], max_tokens=MAX_UNREAD_TOKENS * 2))
        await say(quick, ids_turn("2", [2], max_tokens=MAX_UNREAD_TOKENS * 2))
        assert runner.num_computed < MAX_UNREAD_TOKENS * 6
        ids, _ = await until_done(slow)
        assert ids == stateless_reply([1], MAX_UNREAD_TOKENS * 4, frozenset(), VOCAB)


async def test_a_deadline_ends_the_turn_and_keeps_what_was_said() -> None:
    engine, runner, _ = fake_engine()
    runner.before_step = lambda plan: time.sleep(0.005)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        _, done = await say(chat, ids_turn("1", [1], max_tokens=900, timeout_s=0.1))
        assert done.finish_reason is FinishReason.DEADLINE and 0 < done.usage.completion_tokens < 100


async def test_the_queue_is_bounded_and_says_so() -> None:
    engine, _, _ = fake_engine(max_concurrent=1, max_queue=1)
    async with engine:
        chats = [await engine.open(LOCAL, OpenRequest()) for _ in range(4)]
        await chats[0].turn(ids_turn("1", [1], max_tokens=500))
        await read(chats[0], 2)
        await chats[1].turn(ids_turn("1", [1]))
        with pytest.raises(QueueFull, match="1 turns are waiting already, of at most 1"):
            await chats[2].turn(ids_turn("1", [1]))
        await asyncio.gather(until_done(chats[0]), until_done(chats[1]))
        await say(chats[2], ids_turn("1", [1]))


async def test_generate_keeps_nothing_and_closing_it_cancels() -> None:
    engine, _, manager = fake_engine()
    async with engine:
        sampling = SamplingParams(max_tokens=20, ignore_eos=True)
        ids: list[int] = []
        async for event in engine.generate(LOCAL, GenerateRequest(token_ids=(1, 2, 3), sampling=sampling)):
            if isinstance(event, Delta):
                ids += event.token_ids
        assert ids == stateless_reply([1, 2, 3], 20, frozenset(), VOCAB)
        endless = engine.generate(LOCAL, GenerateRequest(prompt="on and on", sampling=NO_EOS))
        await anext(endless)
        await endless.aclose()
        await until(lambda: manager.statistics().num_free == 64)
        manager.check()
        assert (await engine.list(LOCAL, {}, 10, None)) == ([], None)


async def test_deleting_erases_for_the_owner_and_nobody_else(tmp_path: Path) -> None:
    engine, _, manager = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1], max_tokens=900))
        for operation in (engine.delete, engine.get):
            with pytest.raises(NotFound, match="there is no conversation c-.*; open a new one"):
                await operation(Tenant("stranger"), chat.conversation_id)
        with pytest.raises(NotFound, match="there is no conversation"):
            await engine.resume(Tenant("stranger"), ResumeRequest(chat.conversation_id))
        await engine.delete(LOCAL, chat.conversation_id)
        with pytest.raises(NotFound):
            await engine.get(LOCAL, chat.conversation_id)
        with pytest.raises((NotFound, TurnCancelled)):
            await until_done(chat)
        await until(lambda: manager.statistics().num_free == 64)


async def test_closing_with_delete_erases_and_ends_the_stream() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1], max_tokens=900))
        await chat.close(delete=True)
        assert all(not isinstance(event, TurnDone) for event in [event async for event in chat.events()])
        with pytest.raises(NotFound):
            await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))


async def test_what_is_wrong_with_a_request_is_said_with_values(tmp_path: Path) -> None:
    engine, _, manager = fake_engine(tmp_path, num_slots=4)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await say(chat, ids_turn("0", range(10)))
        refusals = [
            (ids_turn("1", [VOCAB]), InvalidRequest, "token id 258 is outside the vocabulary of 258"),
            (ids_turn("1", [-1]), InvalidRequest, "token id -1 is outside"),
            (TurnRequest(TurnId("1")), InvalidRequest, "turn 1 has neither text nor token ids"),
            (
                ids_turn("1", range(40)),
                ContextOverflow,
                "turn needs 41 tokens but 26 of 48 are left in mine; sho",
            ),
        ]
        for request, error, text in refusals:
            with pytest.raises(error, match=text):
                await chat.turn(request)
        await chat.turn(ids_turn("1", [1], max_tokens=20))
        with pytest.raises(Conflict, match="turn 1 is in flight in mine; wait for its turn_done or cancel"):
            await chat.turn(ids_turn("2", [1]))
        await until_done(chat)
        with pytest.raises(AlreadyExists, match="conversation id mine is taken"):
            await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        with pytest.raises(PermissionDenied, match="the resume token for mine is wrong"):
            await engine.resume(LOCAL, ResumeRequest(ConversationId("mine"), resume_token="x"))
        with pytest.raises(Conflict, match="mine has 43 committed tokens, not 7"):
            await engine.resume(LOCAL, ResumeRequest(ConversationId("mine"), expect_committed_tokens=7))
        manager.check()
    engine, _, _ = fake_engine(tmp_path, num_slots=4, fingerprint="another")
    async with engine:
        with pytest.raises(Conflict, match="mine belongs to model fake, this server has another"):
            await engine.resume(LOCAL, ResumeRequest(ConversationId("mine")))


async def test_a_turn_that_cannot_be_committed_leaves_the_conversation_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _, manager = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        first, _ = await say(chat, ids_turn("1", [1, 2]))
        commit = engine._log.commit_turn

        def full(*_: object) -> object:
            future = commit(ConversationId("nobody"), *_[1:])  # type: ignore[arg-type]
            return future

        monkeypatch.setattr(engine._log, "commit_turn", full)
        with pytest.raises(NotFound):
            await say(chat, ids_turn("2", [3]))
        monkeypatch.setattr(engine._log, "commit_turn", commit)
        manager.check()
        second, _ = await say(chat, ids_turn("2", [3]))
        assert second == stateless_reply([1, 2, *first, 3], 12, frozenset(), VOCAB)
