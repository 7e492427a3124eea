"""New defaults and labels, and who may ask for operations at all, over the fake model."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import (
    AttachmentTaken,
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
    again,
    expected,
    fake_engine,
    ids_turn,
    read,
    say,
    until_done,
)

SAMPLED = SamplingParams(max_tokens=12, ignore_eos=True)


async def test_updated_defaults_and_labels_hold_from_the_next_turn_on(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(sampling=SAMPLED, labels={"a": "1"}))
        turn = TurnRequest(TurnId("1"), token_ids=(1,))
        assert len((await say(chat, turn))[0]) == 12
        await chat.update(UpdateRequest(sampling=SamplingParams(max_tokens=3, ignore_eos=True)))
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
