"""One `Converse` stream, event by event, without the Python client's manners."""

import asyncio

import grpc
import pytest

from engine import errors
from engine.types import Message, SamplingParams
from rpc._generated import continuo_pb2 as pb
from rpc._generated import continuo_pb2_grpc as pb_grpc
from rpc.status import status_of
from tests.rpc.conftest import Wire, eventually, kinds, reply_of, running
from tests.rpc.fakes import FakeEngine


async def test_a_turn_is_accepted_streamed_and_done_with_growing_seq(wire):
    opened = await wire.open(system="Be brief.", labels={"who": "me"})
    assert opened.conversation_id and opened.resume_token and opened.context_left == 4096
    await wire.say("Hi")
    events = await wire.until("turn_done")
    assert kinds(events)[:2] == ["turn_accepted", "state_changed"] and set(kinds(events)[2:-1]) == {"delta"}
    assert events[1].state_changed == pb.StateChanged(
        turn_id=events[0].turn_accepted.turn_id,
        state=pb.RUN_STATE_RUNNING,
        found=pb.Usage(prompt_tokens=2, new_tokens=2),
    )
    assert reply_of(events) == "You said: Hi"
    assert [token for e in events for token in e.delta.token_ids] == [ord(c) for c in "You said: Hi"]
    assert all(a.seq < b.seq for a, b in zip(events, events[1:], strict=False))
    done = events[-1].turn_done
    assert done.finish_reason == pb.FINISH_REASON_STOP_TOKEN
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.new_tokens) == (2, 12, 2)
    assert (done.committed_tokens, done.context_left) == (14, 4082)
    assert done.timing.ttft_s == pytest.approx(0.002)


async def test_open_and_turn_reach_the_engine_with_every_field(wire, engine):
    sampling = pb.Sampling(
        temperature=0.0, top_k=0, seed=7, stop=["\n"], stop_token_ids=[3], ignore_eos=False
    )
    await wire.open(conversation_id="mine", system="", labels={"a": "b"}, sampling=sampling)
    turn = pb.Turn(turn_id="t", token_ids=pb.TokenIds(token_ids=[65, 66]), timeout_s=2.5)
    await wire.send(turn=turn)
    await wire.until("turn_done")
    opened, asked = engine.seen
    assert (opened.conversation_id, opened.system, opened.labels) == ("mine", "", {"a": "b"})
    assert opened.sampling == SamplingParams(
        temperature=0.0, top_k=0, seed=7, stop=("\n",), stop_token_ids=(3,), ignore_eos=False
    )
    assert (asked.token_ids, asked.timeout_s, asked.sampling) == ((65, 66), 2.5, SamplingParams())


async def test_several_messages_reach_the_engine_in_order(wire, engine):
    await wire.open()
    messages = [pb.Message(role="system", content="s"), pb.Message(role="user", content="u")]
    await wire.send(turn=pb.Turn(turn_id="t", messages=pb.Messages(messages=messages)))
    await wire.until("turn_done")
    assert engine.seen[-1].messages == (Message("system", "s"), Message("user", "u"))


@pytest.mark.parametrize(
    ("first", "found"),
    [
        (pb.ClientEvent(turn=pb.Turn(turn_id="t", text="x")), "it was turn"),
        (pb.ClientEvent(), "it was empty or missing"),
    ],
)
async def test_the_first_event_must_open_or_resume(wire, first, found):
    await wire.call.write(first)
    status = await wire.status()
    assert status.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert status.details() == f"the first event of a stream must be open or resume; {found}"


async def test_a_stream_without_any_event_is_told_what_was_missing(wire):
    await wire.call.done_writing()
    assert "it was empty or missing" in (await wire.status()).details()


@pytest.mark.parametrize(
    ("event", "code", "message"),
    [
        (
            {"open": pb.Open()},
            3,
            "open must be the first event of a stream; this one is attached to c-1 already",
        ),
        ({"resume": pb.Resume()}, 3, "resume must be the first event of a stream"),
        (
            {},
            3,
            "the event is empty or not known here; "
            "send turn, append, regenerate, rewind, update, cancel or close",
        ),
        ({"turn": pb.Turn(text="x")}, 3, "turn_id is empty; set it"),
        ({"turn": pb.Turn(turn_id="t")}, 3, "turn t says nothing; set text, messages or token_ids"),
        (
            {"turn": pb.Turn(turn_id="x" * 129, text="x")},
            3,
            "turn_id must be at most 128 printable characters",
        ),
        ({"turn": pb.Turn(turn_id="a\nb", text="x")}, 3, "turn_id must be at most 128 printable characters"),
        (
            {"turn": pb.Turn(turn_id="t", text="x", timeout_s=-1)},
            3,
            "timeout_s is -1; it must be a positive number of seconds",
        ),
        ({"turn": pb.Turn(turn_id="t", text="x", timeout_s=float("nan"))}, 3, "timeout_s is nan; it must be"),
        (
            {"turn": pb.Turn(turn_id="t", text="x", sampling=pb.Sampling(temperature=float("nan")))},
            3,
            "temperature is nan; it must be between 0 (greedy) and 100",
        ),
        (
            {"turn": pb.Turn(turn_id="t", text="x", sampling=pb.Sampling(top_k=-1))},
            3,
            "top_k is -1; it must be 0 (off) or a positive number of tokens",
        ),
        ({"cancel": pb.Cancel(turn_id="t-9")}, 5, "turn t-9 is not in flight in c-1"),
        ({"cancel": pb.Cancel()}, 3, "turn_id is empty; set it"),
    ],
)
async def test_a_refused_event_is_answered_in_band_and_the_stream_lives_on(wire, event, code, message):
    await wire.open()
    await wire.send(17, **event)
    told = (await wire.next()).error
    assert (told.code, told.client_seq, told.retryable) == (code, 17, False)
    assert told.message.startswith(message)
    await wire.say("still here?")
    assert reply_of(await wire.until("turn_done")) == "You said: still here?"


async def test_an_error_that_passes_says_when_to_try_again(wire, engine):
    await wire.open()
    engine.refuse = errors.QueueFull("256 turns wait already; try again in a second")
    await wire.say("Hi", client_seq=3)
    told = (await wire.next()).error
    assert (told.code, told.reason, told.retryable, told.retry_after_s) == (8, "QUEUE_FULL", True, 1.0)
    assert (told.turn_id, told.client_seq, told.message) == ("t-1", 3, str(engine.refuse))


async def test_a_turn_that_fails_after_its_acceptance_leaves_the_stream_alive(wire, engine):
    await wire.open()
    engine.fail_with = errors.ContextOverflow("turn needs 812 tokens but 396 of 4096 are left in c-1")
    await wire.say("Hi")
    failed = (await wire.until("turn_failed"))[-1]
    assert failed.seq > 0 and failed.turn_failed.turn_id == "t-1"
    assert failed.turn_failed.error.reason == "CONTEXT_OVERFLOW" and failed.turn_failed.error.code == 11
    engine.fail_with = None
    await wire.say("again", "t-2")
    assert reply_of(await wire.until("turn_done")) == "You said: again"


async def test_a_second_turn_meanwhile_is_refused_in_band(engine, wire):
    engine.hold(3)
    await wire.open()
    await wire.say("one")
    await engine.holding.wait()
    await wire.say("two", "t-2", client_seq=2)
    told = (await wire.until("error"))[-1].error
    assert (told.code, told.turn_id, told.client_seq) == (9, "t-2", 2)
    assert told.message == "turn t-1 is in flight in c-1; wait or cancel it"
    engine.release()
    assert (await wire.until("turn_done"))[-1].turn_done.turn_id == "t-1"


async def test_the_same_turn_again_replays_its_outcome_and_other_content_is_refused(wire):
    await wire.open()
    await wire.say("Hi")
    first = await wire.until("turn_done")
    await wire.say("Hi")
    again = await wire.until("turn_done")
    assert kinds(again) == ["delta", "turn_done"] and reply_of(again) == reply_of(first)
    assert again[-1].turn_done.committed_tokens == first[-1].turn_done.committed_tokens
    await wire.say("Ho", client_seq=4)
    told = (await wire.next()).error
    assert (told.code, told.reason) == (6, "ALREADY_EXISTS")


async def test_a_malformed_message_ends_the_stream_and_is_called_malformed(channel, engine):
    raw = channel.stream_stream("/continuo.v1.Conversations/Converse", lambda data: data)
    call = raw()
    await call.write(pb.ClientEvent(open=pb.Open()).SerializeToString())
    await call.read()
    await call.write(b"\xff\xff\xff")
    status = await Wire(call).status()
    assert status.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert status.details().startswith("the message does not follow continuo.proto")
    assert engine.detached.is_set()


async def test_an_oversized_message_is_refused_with_both_sizes():
    async with FakeEngine() as engine, running(engine, max_message_bytes=1000) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = channel.stream_stream("/continuo.v1.Conversations/Converse", lambda data: data)()
            await call.write(pb.ClientEvent(open=pb.Open(system="x" * 2000)).SerializeToString())
            status = await Wire(call).status()
    assert status.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max (2006 vs. 1000)" in status.details()


async def test_a_message_of_twenty_megabytes_arrives(channel, engine):
    call = channel.stream_stream("/continuo.v1.Conversations/Converse", lambda data: data)()
    await call.write(pb.ClientEvent(open=pb.Open(system="x" * 20_000_000)).SerializeToString())
    await call.read()
    assert len(engine.seen[0].system) == 20_000_000
    call.cancel()


@pytest.fixture
async def stuck(server, engine):
    """A stream whose reader stopped: the buffers on the way are full, the turn waits for its last letter."""
    engine.letters_per_token = 20_000
    options = [("grpc.http2.bdp_probe", 0)]  # or the window grows to megabytes
    async with grpc.aio.insecure_channel(server.address, options) as channel:
        wire = Wire(pb_grpc.ConversationsStub(channel).Converse())
        await wire.open()
        await _get_stuck(wire, engine)
        yield wire


async def _get_stuck(wire, engine):
    engine.hold(209)
    await wire.say("x" * 200)
    await engine.holding.wait()
    attachment = engine.conversations["local", "c-1"].attachment
    num_taken = 0
    while attachment.num_taken != num_taken:  # until nothing moves any more
        num_taken = attachment.num_taken
        await asyncio.sleep(0.1)
    assert num_taken < 100, "the buffers on the way took every single delta: the reply must be larger"


async def test_a_slow_reader_delays_nobody_else(stuck, engine, client):
    engine.letters_per_token = 1
    engine.release()
    other = await client.open()
    assert (await asyncio.wait_for(other.say("quick"), 5)).text == "You said: quick"


async def test_a_slow_reader_gets_what_waited_in_one_delta(stuck, engine):
    engine.release()
    events = await stuck.until("turn_done")
    deltas = [event.delta for event in events if event.WhichOneof("event") == "delta"]
    assert max(len(delta.token_ids) for delta in deltas) > 50
    assert "".join(chr(token) for delta in deltas for token in delta.token_ids) == "You said: " + "x" * 200


async def test_a_rewound_comes_behind_all_events_of_the_turns_before_it(stuck, engine):
    engine.release()
    await eventually(lambda: engine.conversations["local", "c-1"].turns)
    await stuck.send(7, rewind=pb.Rewind(turns=0))
    events = await stuck.until("rewound")
    assert kinds(events)[-2:] == ["turn_done", "rewound"]
    assert (events[-1].rewound.client_seq, events[-1].rewound.committed_tokens) == (7, 0)


async def test_a_reader_that_stopped_and_went_away_counts_as_gone(stuck, engine):
    stuck.call.cancel()
    await asyncio.wait_for(engine.detached.wait(), 5)


async def test_draining_is_announced_with_the_resume_token_before_unavailable(wire, server, engine):
    opened = await wire.open()
    run = asyncio.create_task(server.run())
    server.begin_drain()
    draining = (await wire.until("draining"))[-1].draining
    assert draining.resume_token == opened.resume_token and draining.retry_after_s == 2.0
    status = await wire.status()
    assert status.code() is grpc.StatusCode.UNAVAILABLE
    assert status.details() == "the server is shutting down; reconnect and resume"
    assert await run == 0


async def test_a_bug_is_answered_with_internal_and_without_its_text(wire, engine, caplog):
    await wire.open()
    engine.refuse = errors.InvariantError("block 7 is owned twice")
    await wire.say("Hi")
    status = await wire.status()
    assert status.code() is grpc.StatusCode.INTERNAL
    assert status.details() == "internal error; the server's log has the details"
    assert "block 7 is owned twice" in caplog.text


def test_a_very_long_message_is_cut_to_fit_into_headers():
    _, details, trailers = status_of(errors.InvalidRequest("x" * 100_000))
    assert len(details) == 1000 and sum(len(value) for _, value in trailers) < 4000
