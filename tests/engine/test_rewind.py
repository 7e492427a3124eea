"""Histories cut, over the fake model."""

import asyncio
from pathlib import Path

import pytest

from engine.errors import (
    AttachmentTaken,
    Conflict,
    DataDirError,
    InvalidRequest,
    NotFound,
)
from engine.types import (
    ConversationId,
    FinishReason,
    ForkRequest,
    OpenRequest,
    Point,
    ResumeRequest,
    Standing,
    TurnId,
)
from tests.engine.harness import (
    BLOCK_SIZE,
    LOCAL,
    Held,
    expected,
    fake_engine,
    ids_turn,
    say,
    talked,
    text_turn,
    until,
)


@pytest.mark.parametrize("place", range(0, 67, 3))
async def test_a_conversation_goes_on_from_any_token_it_is_rewound_to(place: int, tmp_path: Path) -> None:
    engine, runner, manager = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        history = (await talked(chat))[:place]
        for _ in range(2):
            standing = await chat.rewind(Point(num_tokens=place))
            assert standing == Standing(place, -(-place // 22), 63 * BLOCK_SIZE - place)
        manager.check()
        before = runner.num_computed
        ids, done = await say(chat, ids_turn("next", [7, 8]))
        assert ids == expected([*history, 7, 8])
        assert runner.num_computed - before <= BLOCK_SIZE - 1 + 2 + 11
        assert done.usage.new_tokens <= 3
        assert done.committed_tokens == place + 14
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        assert chat.committed_tokens == place + 14
        assert (await say(chat, ids_turn("more", [9])))[0] == expected([*history, 7, 8, *ids, 9])


async def test_a_reply_that_is_cut_keeps_the_text_of_what_is_left() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        history = await talked(chat, 2)
        await chat.rewind(Point(num_tokens=22 + 10 + 5))
        _, (_, turn) = await engine.get(LOCAL, chat.conversation_id)
        assert list(turn.reply_ids) == history[32:37]
        assert turn.reply_text == await engine.detokenize(turn.reply_ids, True)
        assert (turn.finish_reason, turn.matched_stop) == (FinishReason.CANCELLED, None)
        await chat.rewind(Point(num_tokens=22 + 4))
        _, (_, turn) = await engine.get(LOCAL, chat.conversation_id)
        assert (list(turn.prompt_ids), turn.reply_ids, turn.reply_text) == (history[22:26], (), "")
        assert turn.finish_reason is FinishReason.APPENDED


async def test_rewinding_by_turns_frees_their_ids() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        history = await talked(chat)
        assert (await chat.rewind(Point(num_turns=1))).committed_tokens == 22
        ids, _ = await say(chat, ids_turn("2", [5]))
        assert ids == expected([*history[:22], 5])
        assert (await chat.rewind(Point(num_turns=0))).committed_tokens == 0
        ids, _ = await say(chat, ids_turn("0", [6]))
        assert ids == expected([6])


async def test_a_text_turn_after_a_rewind_says_nothing_of_what_was_forgotten() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(system="Be brief."))
        for number, text in enumerate(("one", "two", "three")):
            await say(chat, text_turn(str(number), text))
        await chat.rewind(Point(num_turns=1))
        _, done = await say(chat, text_turn("next", "four"))
        assert not done.history_rewritten
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        assert "four" in await engine.detokenize(turns[1].prompt_ids, False)
        await chat.rewind(Point(num_turns=0))
        await say(chat, text_turn("anew", "five"))
        _, (turn,) = await engine.get(LOCAL, chat.conversation_id)
        assert (await engine.detokenize(turn.prompt_ids, False)).startswith("<|im_start|>system\nBe brief.")


async def test_what_cannot_be_rewound_is_said_with_values() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await say(chat, ids_turn("0", [1, 2, 3], max_tokens=2))
        await say(chat, text_turn("1", "hello"))
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        behind = 5 + len(turns[1].prompt_ids)
        end = behind + 12
        refusals = [
            (
                Point(num_tokens=end + 1),
                f"mine has {end} tokens; give a number from 0 to that, not {end + 1}",
            ),
            (Point(num_tokens=-1), f"mine has {end} tokens; give a number from 0 to that, not -1"),
            (Point(num_turns=3), "mine has 2 turns; give a number from 0 to that, not 3"),
            (Point(), "a point is a number of turns or of tokens; neither was given for mine"),
            (Point(1, 1), "a point is a number of turns or of tokens; both was given for mine"),
            (
                Point(num_tokens=7),
                "token 7 of mine lies inside the messages of turn number 1; "
                f"the nearest points are tokens 5 and {behind}",
            ),
        ]
        for point, text in refusals:
            for operation in (
                chat.rewind(point),
                engine.fork(LOCAL, ForkRequest(ConversationId("mine"), at=point)),
            ):
                with pytest.raises(InvalidRequest) as refused:
                    await operation
                assert str(refused.value) == text
        await chat.turn(ids_turn("2", [1], max_tokens=500))
        with pytest.raises(
            Conflict, match="turn 2 is in flight in mine; wait for its turn_done or cancel it"
        ):
            await chat.rewind(Point(num_turns=0))
        await chat.cancel(TurnId("2"), keep=False)
        assert (await chat.rewind(Point(num_turns=0))).committed_turns == 0


async def test_nothing_else_happens_to_a_conversation_while_it_is_rewound() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await talked(chat)
        rewinding = asyncio.create_task(chat.rewind(Point(num_turns=1)))
        await asyncio.sleep(0)
        with pytest.raises(Conflict, match="mine is being rewound; try again when that is answered"):
            await chat.turn(ids_turn("x", [1]))
        rewinding.cancel()  # its stream is gone: what the log does, memory follows
        with pytest.raises(asyncio.CancelledError):
            await rewinding
        await until(lambda: chat._live.idle.is_set())
        assert chat._live.committed_tokens == 22
        record, turns = await engine.get(LOCAL, chat.conversation_id)
        assert (record.num_turns, record.num_tokens, len(turns)) == (1, 22, 1)


async def test_a_rewind_that_meets_itself_on_its_way_to_the_log_waits_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _, manager = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        history = await talked(chat)
        held = Held(monkeypatch, engine, "rewind")
        first = asyncio.create_task(chat.rewind(Point(num_tokens=40)))
        let_first_go = await held.arrived()
        chat.detach()
        first.cancel()
        resuming = asyncio.create_task(engine.resume(LOCAL, ResumeRequest(ConversationId("mine"))))
        await asyncio.sleep(0.01)
        assert not resuming.done(), "where it stands is not known yet"
        let_first_go(None)
        chat = await resuming
        assert (chat.committed_tokens, chat.committed_turns) == (40, 2)
        one = asyncio.create_task(chat.rewind(Point(num_tokens=40)))
        let_one_go = await held.arrived()
        two = asyncio.create_task(chat.rewind(Point(num_tokens=40)))
        await asyncio.sleep(0.01)
        assert not held.calls, "the second waits for the first"
        let_one_go(None)
        (await held.arrived())(None)
        assert await one == await two == Standing(40, 2, 63 * BLOCK_SIZE - 40)
        assert (await say(chat, ids_turn("x", [1])))[0] == expected([*history[:40], 1])
        manager.check()


async def test_a_rewind_that_waits_is_refused_once_its_stream_has_lost_the_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await talked(chat)
        held = Held(monkeypatch, engine, "rewind")
        first = asyncio.create_task(chat.rewind(Point(num_turns=2)))
        let_go = await held.arrived()
        second = asyncio.create_task(chat.rewind(Point(num_turns=0)))
        await asyncio.sleep(0)
        chat.detach()
        let_go(None)
        assert (await first).committed_turns == 2
        with pytest.raises(AttachmentTaken):
            await second
        assert (await engine.get(LOCAL, ConversationId("mine")))[0].num_turns == 2


async def test_a_conversation_is_erased_although_rewinds_are_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _, manager = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await talked(chat)
        held = Held(monkeypatch, engine, "rewind")
        rewinds = [asyncio.create_task(chat.rewind(Point(num_turns=n))) for n in (2, 1)]
        let_go = await held.arrived()
        erasing = asyncio.create_task(engine.delete(LOCAL, ConversationId("mine")))
        await asyncio.sleep(0)
        let_go(None)
        (await held.arrived())(None)
        await erasing
        await asyncio.wait(rewinds, timeout=5)
        with pytest.raises(NotFound):
            await engine.get(LOCAL, ConversationId("mine"))
        assert not len(engine._registry) and manager.statistics().num_free == 64


async def test_a_rewind_that_the_log_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        history = await talked(chat)

        def full(*_: object) -> None:
            raise DataDirError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr("engine.log_statements._cut", full)
            with pytest.raises(DataDirError, match="the disk is full"):
                await chat.rewind(Point(num_turns=1))
        assert (await say(chat, ids_turn("x", [1])))[0] == expected([*history, 1])
