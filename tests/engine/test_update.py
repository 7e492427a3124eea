"""New defaults and labels, and who may ask for operations at all, over the fake model."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import (
    AttachmentTaken,
    InvalidRequest,
    NotFound,
)
from engine.types import (
    ConversationId,
    Delta,
    OpenRequest,
    Point,
    ResumeRequest,
    SamplingParams,
    TurnId,
    TurnRequest,
    UpdateRequest,
)
from tests.engine.harness import (
    LOCAL,
    VOCAB,
    again,
    expected,
    fake_engine,
    ids_turn,
    read,
    say,
    until_done,
)
from tests.fakes import byte_tokenizer

SAMPLED = SamplingParams(max_tokens=12, ignore_eos=True)


async def test_updated_defaults_and_labels_hold_from_the_next_turn_on(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(sampling=SAMPLED, labels={"a": "1"}))
        turn = TurnRequest(TurnId("1"), token_ids=(1,))
        assert len((await say(chat, turn))[0]) == 12
        await chat.update(UpdateRequest(sampling=SamplingParams(max_tokens=3)))
        assert len((await say(chat, replace(turn, turn_id=TurnId("2"))))[0]) == 3
        await chat.update(UpdateRequest(labels={"b": "2"}))
        assert len((await say(chat, replace(turn, turn_id=TurnId("3"))))[0]) == 3
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        records, _ = await engine.list(LOCAL, {"b": "2"}, 10, None)
        assert [record.labels for record in records] == [{"b": "2"}]
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        assert len((await say(chat, replace(turn, turn_id=TurnId("4"))))[0]) == 3
        await engine.delete(LOCAL, chat.conversation_id)
        with pytest.raises(NotFound):
            await chat._operations.update(chat._live, UpdateRequest(labels={}))


async def test_defaults_that_no_turn_could_take_are_refused_where_they_are_given() -> None:
    engine, _, _ = fake_engine()
    (a,) = byte_tokenizer().encode("a", allow_special=False)
    others = tuple(id for id in range(VOCAB) if id != a)
    refusals = [
        (
            SamplingParams(stop_token_ids=(VOCAB,)),
            "stop_token_ids holds 258; this model's tokens are 0 to",
        ),
        (SamplingParams(min_tokens=30), "min_tokens is 30 and max_tokens 12; lower min_tokens"),
        (
            SamplingParams(min_tokens=1, stop_token_ids=others, bad_words=("a",)),
            "every token ends one of the bad_words, or stops the reply before min_tokens 1; leave some",
        ),
    ]
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine"), sampling=SAMPLED))
        for sampling, complaint in refusals:
            with pytest.raises(InvalidRequest, match=complaint):
                await chat.update(UpdateRequest(sampling=sampling))
            with pytest.raises(InvalidRequest, match=complaint):
                await engine.open(LOCAL, OpenRequest(sampling=sampling.over(SAMPLED)))
            with pytest.raises(InvalidRequest, match=complaint):
                await chat.turn(TurnRequest(TurnId("1"), token_ids=(1,), sampling=sampling))
        assert len((await say(chat, TurnRequest(TurnId("1"), token_ids=(1,))))[0]) == 12
        records, _ = await engine.list(LOCAL, {}, 10, None)
        assert [(record.id, record.sampling) for record in records] == [("mine", SAMPLED)]


async def test_tools_that_no_template_could_take_are_refused_at_the_opening() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        for tools, complaint in (
            (("{}", "nonsense"), r"tools\[1\] is not JSON: .*; send one JSON object"),
            (("[]",), r"tools\[0\] is JSON but no object: \[\]; send one JSON object"),
        ):
            with pytest.raises(InvalidRequest, match=complaint):
                await engine.open(LOCAL, OpenRequest(tools=tools))
        assert await engine.list(LOCAL, {}, 10, None) == ([], None)


async def test_operations_need_the_attachment_to_be_held() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        old = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await engine.resume(LOCAL, ResumeRequest(ConversationId("mine")))
        for operation in (
            old.regenerate(again("1")),
            old.rewind(Point(num_turns=0)),
            old.update(UpdateRequest(labels={})),
        ):
            with pytest.raises(
                AttachmentTaken, match="another stream has attached to mine; resume it to take"
            ):
                await operation


async def test_a_regeneration_in_flight_survives_a_change_of_streams() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("0", [1, 2]))
        await chat.regenerate(again("1", max_tokens=60))
        seen = await read(chat, 3)
        chat.detach()
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id, after_seq=seen[-1].seq))
        first = [id for event in seen if isinstance(event, Delta) for id in event.token_ids]
        await chat.regenerate(again("1", max_tokens=60))
        assert (await until_done(chat, first))[0] == expected([1, 2], 60)
