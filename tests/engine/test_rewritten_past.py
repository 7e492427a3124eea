"""Histories that come as messages: from elsewhere, appended, and under a template that rewrites the past."""

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from engine.async_engine import AsyncEngine
from engine.attachment import Attachment
from engine.conversation import common_length
from engine.errors import AlreadyExists, ContextOverflow, InvalidRequest, NotFound, TurnCancelled
from engine.history import tokens_of
from engine.replay import replayed
from engine.types import (
    ConversationId,
    Delta,
    FinishReason,
    ForkRequest,
    HistoryRewritten,
    Message,
    OpenRequest,
    Point,
    RegenerateRequest,
    ReplyKind,
    ResumeRequest,
    RewritePolicy,
    SamplingParams,
    TurnDone,
    TurnId,
    TurnRequest,
)
from tests.engine.harness import (
    BLOCK_SIZE,
    LOCAL,
    VOCAB,
    fake_engine,
    ids_turn,
    read,
    say,
    text_turn,
    until,
    until_done,
)
from tests.fakes import MARKED_TEMPLATE, RETELLING_TEMPLATE, stateless_reply

SAID = (Message("user", "What is up?"), Message("assistant", "The sky."), Message("user", "And down?"))


def rendered(messages: Sequence[Message]) -> str:
    return "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)


def expected(history: Sequence[int], num_tokens: int = 12) -> list[int]:
    return stateless_reply(history, num_tokens, frozenset(), VOCAB)


async def held(engine: AsyncEngine, id: ConversationId) -> "array[int]":
    return tokens_of((await engine.get(LOCAL, id))[1])


def append(id: str, *messages: Message) -> TurnRequest:
    return TurnRequest(TurnId(id), messages, wants_reply=False)


# -- open with a history


async def test_a_history_from_elsewhere_is_the_first_turn_and_survives_a_restart(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(system="Be brief.", history=SAID[:2]))
        assert chat.committed_turns == 1 and chat.committed_tokens > 0
        record, (turn,) = await engine.get(LOCAL, chat.conversation_id)
        assert (turn.turn_id, turn.finish_reason) == ("history", FinishReason.APPENDED)
        assert turn.messages == SAID[:2]
        text = rendered([Message("system", "Be brief."), *SAID[:2]])
        assert await engine.detokenize(turn.prompt_ids, False) == text
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        again = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        assert again.committed_tokens == len(turn.prompt_ids)
        ids, done = await say(again, text_turn("1", "And down?"))
        assert not done.history_rewritten
        tokens = await held(engine, chat.conversation_id)
        text += rendered(SAID[2:]) + "<|im_start|>assistant\n"
        assert await engine.detokenize(tokens[:-12], False) == text
        assert ids == expected(tokens[:-12])
        with pytest.raises(AlreadyExists, match="turn id history was used in c-.* with other content"):
            await again.turn(text_turn("history", "x"))


async def test_a_history_is_computed_ahead_and_what_another_conversation_has_of_it_is_used() -> None:
    engine, runner, manager = fake_engine()
    async with engine:
        one = await engine.open(LOCAL, OpenRequest(history=SAID))
        await until(lambda: runner.num_computed == one.committed_tokens)
        tokens = await held(engine, one.conversation_id)
        edited = (SAID[0], Message("assistant", "The sea."), SAID[2])
        for history in (SAID, edited):
            before = runner.num_computed
            two = await engine.open(LOCAL, OpenRequest(history=history))
            alike = common_length(tokens, await held(engine, two.conversation_id))
            num_shared = alike // BLOCK_SIZE * BLOCK_SIZE
            assert num_shared >= BLOCK_SIZE
            ids, done = await say(two, text_turn("1", "Well?"))
            assert done.usage.cached_device_tokens >= num_shared
            assert done.usage.recomputed_tokens == 0
            assert runner.num_computed - before == done.usage.prompt_tokens - num_shared + 11
            assert ids == expected((await held(engine, two.conversation_id))[:-12])
        manager.check()


async def test_a_history_that_cannot_be_taken_leaves_no_conversation() -> None:
    engine, _, _ = fake_engine(num_slots=4)
    async with engine:
        for history, error, text in (
            (SAID * 5, ContextOverflow, "the history has 285 tokens and the context 48; shorten it"),
            ((Message("judge", "x"),), InvalidRequest, "judge"),
        ):
            with pytest.raises(error, match=text):
                await engine.open(LOCAL, OpenRequest(ConversationId("mine"), history=history))
            with pytest.raises(NotFound):
                await engine.get(LOCAL, ConversationId("mine"))


# -- append messages


async def test_appended_messages_are_read_with_the_next_turn() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(system="Be brief."))
        for number, message in enumerate(SAID[:2]):
            await chat.turn(append(str(number), message))
            await read(chat, 2)
        ids, done = await say(chat, text_turn("3", SAID[2].content))
        tokens = await held(engine, chat.conversation_id)
        text = rendered([Message("system", "Be brief."), *SAID]) + "<|im_start|>assistant\n"
        assert await engine.detokenize(tokens[:-12], False) == text
        assert ids == expected(tokens[:-12]) and not done.history_rewritten


# -- a template that rewrites the past


async def asked(chat: Attachment, id: str, text: str) -> tuple[HistoryRewritten | None, list[int], TurnDone]:
    await chat.turn(text_turn(id, text))
    rewritten, ids = None, []
    async for event in chat.events():
        if isinstance(event, HistoryRewritten):
            rewritten = event
        if isinstance(event, Delta):
            ids += event.token_ids
        if isinstance(event, TurnDone):
            return rewritten, ids, event
    raise AssertionError("the events ended before the turn")


async def test_keeping_reports_what_following_the_template_would_cost() -> None:
    engine, runner, _ = fake_engine(template=RETELLING_TEMPLATE)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        rewritten, _, first = await asked(chat, "1", "hello")
        assert rewritten is None and not first.history_rewritten
        before = runner.num_computed
        rewritten, _, done = await asked(chat, "2", "again")
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        begin = len(turns[0].prompt_ids)
        assert rewritten is not None and rewritten.turn_id == "2"
        assert (rewritten.first_token, rewritten.num_tokens) == (begin, 12)
        assert rewritten.policy is RewritePolicy.KEEP and done.history_rewritten
        assert turns[1].first_token == first.committed_tokens
        assert runner.num_computed - before == 1 + len(turns[1].prompt_ids) + 11
        assert (await say(chat, ids_turn("3", [5])))[1].history_rewritten, "it stays so"
        await chat.rewind(Point(num_turns=1))
        assert not (await say(chat, ids_turn("4", [5])))[1].history_rewritten


async def test_stripping_follows_the_template_and_the_log_keeps_what_was_said(tmp_path: Path) -> None:
    engine, runner, manager = fake_engine(tmp_path, template=RETELLING_TEMPLATE)
    said: list[Message] = []
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(on_rewrite=RewritePolicy.STRIP))
        for number in range(4):
            question = Message("user", f"question {number}")
            before = runner.num_computed
            rewritten, ids, done = await asked(chat, str(number), question.content)
            assert not done.history_rewritten, "the history reads as the template writes it"
            _, turns = await engine.get(LOCAL, chat.conversation_id)
            tokens = tokens_of(turns)
            assert done.committed_tokens == len(tokens)
            text = rendered([*said, question]) + "<|im_start|>assistant\n"
            assert await engine.detokenize(tokens[:-12], False) == text
            assert ids == expected(tokens[:-12])
            if number:
                last = turns[-2]
                assert rewritten is not None and rewritten.policy is RewritePolicy.STRIP
                assert rewritten.first_token == turns[-1].first_token
                assert turns[-1].first_token < last.first_token + len(last.prompt_ids) + len(last.reply_ids)
                num_new = len(tokens) - 12 - turns[-1].first_token
                assert runner.num_computed - before <= num_new + BLOCK_SIZE + 11
            said += [question, Message("assistant", "~" + await engine.detokenize(ids, False))]
        manager.check()
    engine, _, manager = fake_engine(tmp_path, template=RETELLING_TEMPLATE)
    async with engine:
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        assert chat.committed_tokens == len(tokens)
        again = RegenerateRequest(TurnId("1b"), TurnId("1"), SamplingParams(max_tokens=12, ignore_eos=True))
        await chat.regenerate(again)
        ids, done = await until_done(chat)
        assert ids == list(turns[1].reply_ids) and done.committed_tokens == len(tokens_of(turns[:2]))
        fork = await engine.fork(LOCAL, ForkRequest(chat.conversation_id, at=Point(num_turns=1)))
        for id in (chat.conversation_id, fork.id):
            chat = await engine.resume(LOCAL, ResumeRequest(id))
            standing = await chat.rewind(Point(num_turns=1))
            first = tokens_of(turns[:1])
            assert standing.committed_tokens == len(first)
            assert (await say(chat, ids_turn("x", [5])))[0] == expected([*first, 5]), "as it was said"
        manager.check()


async def test_a_turn_that_strips_and_comes_to_nothing_leaves_the_history_as_it_was() -> None:
    engine, _, manager = fake_engine(template=RETELLING_TEMPLATE)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(on_rewrite=RewritePolicy.STRIP))
        await say(chat, text_turn("1", "hello"))
        tokens = await held(engine, chat.conversation_id)
        await chat.turn(text_turn("2", "again", max_tokens=900))
        await read(chat, 4)
        await chat.cancel(TurnId("2"), keep=False)
        with pytest.raises(TurnCancelled):
            await until_done(chat)
        assert chat._live.core.tokens == tokens
        assert (await say(chat, ids_turn("3", [5])))[0] == expected([*tokens, 5])
        manager.check()


# -- what a reply is


async def test_stretches_of_a_reply_are_told_apart_also_when_they_are_replayed() -> None:
    engine, _, _ = fake_engine(template=MARKED_TEMPLATE)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1, 2, 3]))
        _, (turn,) = await engine.get(LOCAL, chat.conversation_id)
        think, done = await engine.tokenize("<think></think>", True)
        tokens = await engine.tokenize("plain", True)
        marked = [*tokens[:2], think, *tokens[2:4], done, *tokens[4:]]
        text = await engine._text.decode(marked, skip_special=True)
        record = replace(turn, reply_ids=tuple(marked), reply_text=text, done_seq=50)
        events = engine._turns.replay(record)
        deltas = [event for event in events if isinstance(event, Delta)]
        assert [delta.kind for delta in deltas] == [ReplyKind.TEXT, ReplyKind.REASONING, ReplyKind.TEXT]
        assert [delta.text for delta in deltas] == ["pl", "<think>ai</think>", "n"]
        assert [delta.offset for delta in deltas] == [0, 2, 6]
        assert [id for delta in deltas for id in delta.token_ids] == marked
        assert [event.seq for event in events] == [46, 47, 48, 49, 50]
        assert replayed(record, [], 100)[0].seq == 49


# -- all of it together


@pytest.mark.parametrize("policy", RewritePolicy)
@pytest.mark.parametrize("seed", range(4))
async def test_memory_and_log_agree_on_a_rewritten_history_whatever_is_done_to_it(
    seed: int, policy: RewritePolicy, tmp_path: Path
) -> None:
    choose = random.Random(seed)
    engine, _, manager = fake_engine(tmp_path, template=RETELLING_TEMPLATE, num_slots=24)
    await engine.__aenter__()
    chat = await engine.open(LOCAL, OpenRequest(history=SAID[:2], on_rewrite=policy))
    num_replies = num_refused = 0
    for number in range(40):
        what, name = choose.random(), TurnId(f"t{number}")
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        with_reply = [turn for turn in turns if turn.finish_reason is not FinishReason.APPENDED]
        sampling = SamplingParams(max_tokens=choose.randrange(1, 12), ignore_eos=True)
        try:
            if what < 0.4:
                await chat.turn(TurnRequest(name, (Message("user", f"so {number}"),), sampling=sampling))
            elif what < 0.5:
                await chat.turn(append(name, Message("user", f"note {number}")))
            elif what < 0.7 and with_reply:
                await chat.regenerate(RegenerateRequest(name, choose.choice(with_reply).turn_id, sampling))
            elif what < 0.8:
                await chat.rewind(Point(num_turns=choose.randrange(len(turns) + 1)))
            elif what < 0.9:
                await chat.rewind(Point(num_tokens=choose.randrange(chat._live.committed_tokens + 1)))
            else:
                await engine.__aexit__()
                engine, _, manager = fake_engine(tmp_path, template=RETELLING_TEMPLATE, num_slots=24)
                await engine.__aenter__()
                chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        except ContextOverflow:
            await chat.rewind(Point(num_turns=1))
        except InvalidRequest as error:
            assert "lies inside the messages of turn" in str(error)
            num_refused += 1
        if (flight := chat._live.flight) is not None:
            if choose.random() < 0.2 and flight.turn.finish_reason is None:
                await chat.cancel(name, keep=False)
                with pytest.raises(TurnCancelled):
                    await until_done(chat)
            else:
                ids, done = await until_done(chat)
                tokens = await held(engine, chat.conversation_id)
                assert ids == expected(tokens[: len(tokens) - len(ids)], len(ids))
                assert done.committed_tokens == len(tokens)
                num_replies += bool(ids)
        record, turns = await engine.get(LOCAL, chat.conversation_id)
        assert chat._live.core.tokens == tokens_of(turns)
        assert list(chat._live.turns) == [turn.turn_id for turn in turns]
        assert (record.num_turns, record.num_tokens) == (len(turns), len(tokens_of(turns)))
        manager.check()
    assert num_replies > 8
    await engine.__aexit__()
