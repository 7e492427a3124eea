"""What becomes of a turn while it lasts, as a client hears it."""

import pytest

from engine.types import RunState as EngineRunState
from engine.types import StateChanged, TurnId, Usage
from rpc import codec, outcome
from rpc._generated import continuo_pb2 as pb
from rpc.client import RunState, TurnState
from rpc.outcome import state_of
from rpc.reply import event_of

SUSPENDED_AND_BACK = (EngineRunState.SUSPENDED, EngineRunState.RUNNING)


async def test_states_come_between_the_deltas_and_do_not_disturb_them(client, engine):
    engine.interruptions = SUSPENDED_AND_BACK
    chat, heard = await client.open(), []
    deltas = [delta.text async for delta in chat.say("Hi", on_state=heard.append)]
    assert "".join(deltas) == "You said: Hi"
    assert heard == [
        TurnState(RunState.RUNNING, pb.Usage(prompt_tokens=2, new_tokens=2)),
        TurnState(RunState.SUSPENDED, pb.Usage()),
        TurnState(RunState.RUNNING, pb.Usage()),
    ]
    heard.clear()
    turn = await chat.regenerate(on_state=heard.append)
    assert turn.text == "You said: Hi"
    assert [turn.state for turn in heard] == [RunState.RUNNING, RunState.SUSPENDED, RunState.RUNNING]


async def test_a_state_is_heard_while_nothing_else_comes(client, engine):
    engine.interruptions = (EngineRunState.SUSPENDED,)
    engine.hold(0)
    chat = await client.open()

    def release(turn):
        if turn.state is RunState.SUSPENDED:
            engine.release()

    assert (await chat.say("Hi", on_state=release)).text == "You said: Hi"


async def test_nobody_has_to_listen(client, engine):
    engine.interruptions = SUSPENDED_AND_BACK
    chat = await client.open()
    assert (await chat.say("Hi")).text == "You said: Hi"
    assert (await chat.append("Noted.")).finish_reason is outcome.FinishReason.APPENDED


async def test_what_a_listener_raises_the_reader_gets(client):
    chat = await client.open()
    with pytest.raises(ZeroDivisionError):
        await chat.say("Hi", on_state=lambda turn: 1 // 0)
    assert (await chat.say("Hi")).text == "You said: Hi"


async def test_on_the_wire_states_are_numbered_as_the_other_events_of_their_turn(wire, engine):
    engine.interruptions = SUSPENDED_AND_BACK
    await wire.open()
    await wire.say("Hi")
    events = await wire.until("turn_done")
    told = [event for event in events if event.WhichOneof("event") == "state_changed"]
    assert [event.seq for event in told] == [2, 3, 4]
    assert {event.state_changed.turn_id for event in told} == {events[0].turn_accepted.turn_id}
    assert [event.state_changed.HasField("found") for event in told] == [True, False, False]


def test_states_agree_in_name_and_number():
    on_the_wire = {name: number for name, number in pb.RunState.items() if number}
    assert on_the_wire == {f"RUN_STATE_{state.name}": state.value for state in EngineRunState}
    assert {f"RUN_STATE_{state.name}" for state in RunState} == {*on_the_wire, "RUN_STATE_UNKNOWN"}


def test_a_state_of_a_newer_server_is_unknown_and_a_kind_of_event_passed_over():
    assert state_of(pb.StateChanged(state=99)).state is RunState.UNKNOWN  # type: ignore[arg-type]
    assert event_of("t", 1, pb.ServerEvent(seq=7)) is None


def test_every_figure_of_what_was_found_crosses_the_wire():
    usage = Usage(*range(1, 1 + len(Usage.__slots__)))
    event = StateChanged(5, TurnId("t"), EngineRunState.RUNNING, usage)
    found = codec.server_event(event).state_changed.found
    assert {field.name: value for field, value in found.ListFields()} == {
        name: getattr(usage, name) for name in Usage.__slots__
    }
