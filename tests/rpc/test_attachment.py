"""How a stream holds a conversation: cancel, close, half-close, break, resume, take over, delete."""

import asyncio

import grpc
import pytest

from rpc._generated import continuo_pb2 as pb
from tests.rpc.conftest import Wire, eventually, kinds, reply_of


@pytest.mark.parametrize("discard", [False, True])
async def test_cancel_ends_the_turn_keeping_or_discarding_what_was_said(wire, engine, discard):
    engine.hold(5)
    await wire.open()
    await wire.say("Hi")
    await engine.holding.wait()
    await wire.send(cancel=pb.Cancel(turn_id="t-1", discard=discard))
    last = (await wire.until("turn_failed" if discard else "turn_done"))[-1]
    if discard:
        assert (last.turn_failed.error.code, last.turn_failed.error.reason) == (1, "TURN_CANCELLED")
    else:
        assert last.turn_done.finish_reason == pb.FINISH_REASON_CANCELLED
        assert last.turn_done.committed_tokens == len("Hi") + 5
    engine.release()
    await wire.say("and now", "t-2")
    assert reply_of(await wire.until("turn_done")) == "You said: and now"


async def test_a_retaining_close_lets_the_turn_end_first(wire, engine, client):
    engine.hold(5)
    id = (await wire.open()).conversation_id
    await wire.say("Hi")
    await engine.holding.wait()
    await wire.send(close=pb.Close())
    engine.release()
    events = await wire.until("closed")
    assert kinds(events)[-2:] == ["turn_done", "closed"] and not events[-1].closed.deleted
    await wire.ends_well()
    assert len((await client.get(id))[1]) == 1 and not engine.detached.is_set()


async def test_a_deleting_close_erases_the_conversation_at_once(wire, engine, client):
    engine.hold(5)
    id = (await wire.open()).conversation_id
    await wire.say("Hi")
    await engine.holding.wait()
    await wire.send(close=pb.Close(delete=True))
    assert (await wire.until("closed"))[-1].closed.deleted
    await wire.ends_well()
    assert not engine.conversations
    assert [c.conversation_id async for c in client.list()] == [] and id


async def test_half_closing_finishes_the_turn_and_keeps_the_conversation(wire, engine, client):
    engine.hold(5)
    id = (await wire.open()).conversation_id
    await wire.say("Hi")
    await engine.holding.wait()
    await wire.call.done_writing()
    engine.release()
    events = await wire.until("closed")
    assert reply_of(events) == "You said: Hi"
    await wire.ends_well()
    assert (await client.get(id))[1][0].reply == "You said: Hi" and not engine.detached.is_set()


async def test_a_broken_stream_cancels_its_turn_and_keeps_what_was_said(wire, engine, client):
    engine.hold(5)
    id = (await wire.open()).conversation_id
    await wire.say("Hi")
    await engine.holding.wait()
    wire.call.cancel()
    await asyncio.wait_for(engine.detached.wait(), 5)
    engine.release()
    chat = await client.resume(id)
    await eventually(lambda: engine.conversations["local", id].turns)
    turns = (await client.get(chat.id))[1]
    assert turns[0].finish_reason == pb.FINISH_REASON_CANCELLED and turns[0].reply == "You s"


async def test_resume_replays_what_came_after_a_sequence_number(wire, conversations, engine):
    engine.hold(5)
    engine.detach_grace_s = 60.0
    id = (await wire.open()).conversation_id
    await wire.say("Hi")
    await engine.holding.wait()
    seen = await wire.until("delta")
    wire.call.cancel()
    await engine.detached.wait()
    again = Wire(conversations.Converse())
    assert (await again.resume(id, after_seq=seen[-1].seq)).conversation_id == id
    engine.release()
    events = await again.until("turn_done")
    assert reply_of(seen) + reply_of(events) == "You said: Hi"
    assert events[0].delta.offset == len(reply_of(seen)) and events[0].seq > seen[-1].seq


async def test_resume_takes_a_conversation_over_from_a_stale_stream(wire, conversations):
    id = (await wire.open()).conversation_id
    taker = Wire(conversations.Converse())
    await taker.resume(id)
    status = await wire.status()
    assert status.code() is grpc.StatusCode.ABORTED
    assert status.details() == "another stream has attached to c-1"
    await taker.say("mine now")
    assert reply_of(await taker.until("turn_done")) == "You said: mine now"


@pytest.mark.parametrize(
    ("resume", "code", "message"),
    [
        (
            {"id": "c-404"},
            grpc.StatusCode.NOT_FOUND,
            "there is no conversation c-404; List shows those that exist",
        ),
        ({"id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "conversation_id is empty; set it"),
        (
            {"id": "c-1", "resume_token": "wrong"},
            grpc.StatusCode.PERMISSION_DENIED,
            "the resume token is not that",
        ),
        (
            {"id": "c-1", "expect_committed_tokens": 9},
            grpc.StatusCode.FAILED_PRECONDITION,
            "c-1 holds 0 tokens, not 9 as expected",
        ),
    ],
)
async def test_a_wrong_resume_is_answered_with_its_status(wire, conversations, resume, code, message):
    await wire.open()
    other = Wire(conversations.Converse())
    await other.send(resume=pb.Resume(conversation_id=resume.pop("id"), **resume))
    status = await other.status()
    assert status.code() is code and status.details().startswith(message)


async def test_the_right_resume_token_and_length_are_accepted(wire, conversations):
    opened = await wire.open()
    await wire.say("Hi")
    done = (await wire.until("turn_done"))[-1].turn_done
    again = Wire(conversations.Converse())
    resumed = await again.resume(
        opened.conversation_id,
        resume_token=opened.resume_token,
        expect_committed_tokens=done.committed_tokens,
    )
    assert (resumed.committed_tokens, resumed.committed_turns) == (14, 1)


async def test_a_conversation_deleted_elsewhere_ends_the_stream_with_not_found(wire, client):
    await client.delete((await wire.open()).conversation_id)
    assert (await wire.status()).code() is grpc.StatusCode.NOT_FOUND
