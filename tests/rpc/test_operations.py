"""The operations on a conversation besides its turns, event by event."""

import json

import grpc
import pytest

from engine import errors
from engine.types import (
    ForkRequest,
    Message,
    OpenRequest,
    Point,
    RegenerateRequest,
    RewritePolicy,
    SamplingParams,
    TurnRequest,
    UpdateRequest,
)
from rpc._generated import continuo_pb2 as pb
from tests.rpc.conftest import kinds, reply_of

TOOL = json.dumps({"type": "function", "function": {"name": "weather"}})
CALL = json.dumps({"name": "weather", "arguments": {"town": "Ulm"}})


async def said(wire, *texts):
    """A conversation in which `texts` were said, as turns t-1, t-2, ..."""
    attached = await wire.open()
    for n, text in enumerate(texts, 1):
        await wire.say(text, f"t-{n}")
        await wire.until("turn_done")
    return attached.conversation_id


async def test_an_append_is_accepted_and_done_without_a_reply(wire, engine):
    await wire.open()
    await wire.send(append=pb.Append(turn_id="a-1", text="Miso is five."))
    events = await wire.until("turn_done")
    assert kinds(events) == ["turn_accepted", "turn_done"]
    done = events[-1].turn_done
    assert (done.turn_id, done.finish_reason) == ("a-1", pb.FINISH_REASON_APPENDED)
    assert done.committed_tokens == len("Miso is five.")
    assert engine.seen[-1] == TurnRequest("a-1", (Message("user", "Miso is five."),), wants_reply=False)


@pytest.mark.parametrize("kind", ["turn", "append"])
async def test_calls_and_results_of_tools_reach_the_engine_and_come_back(wire, engine, client, kind):
    id = (await wire.open()).conversation_id
    messages = [
        pb.Message(role="assistant", content="", tool_calls=[CALL]),
        pb.Message(role="tool", content="12 C", name="weather", tool_call_id="call-1"),
    ]
    request = {"turn": pb.Turn, "append": pb.Append}[kind](
        turn_id="t", messages=pb.Messages(messages=messages)
    )
    await wire.send(**{kind: request})
    await wire.until("turn_done")
    assert engine.seen[-1].messages == (
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "12 C", name="weather", tool_call_id="call-1"),
    )
    (turn,) = (await client.get(id))[1]
    assert list(turn.messages) == messages


async def test_an_append_that_is_repeated_has_the_same_outcome_and_other_content_is_refused(wire):
    await wire.open()
    for _ in range(2):
        await wire.send(append=pb.Append(turn_id="a-1", token_ids=pb.TokenIds(token_ids=[65, 66])))
        assert (await wire.until("turn_done"))[-1].turn_done.committed_tokens == 2
    await wire.send(append=pb.Append(turn_id="a-1", text="other"))
    assert (await wire.next()).error.reason == "ALREADY_EXISTS"


async def test_regenerate_replaces_the_last_turn_when_it_is_done(wire, engine, client):
    id = await said(wire, "one", "two")
    engine.greeting = "I heard: "
    again = pb.Regenerate(turn_id="r-1", sampling=pb.Sampling(seed=7), timeout_s=2.5)
    await wire.send(regenerate=again)
    assert reply_of(await wire.until("turn_done")) == "I heard: two"
    assert engine.seen[-1] == RegenerateRequest("r-1", None, SamplingParams(seed=7), 2.5)
    assert [turn.turn_id for turn in (await client.get(id))[1]] == ["t-1", "r-1"]


async def test_regenerate_of_an_earlier_turn_replaces_all_behind_it(wire, client):
    id = await said(wire, "one", "two", "three")
    await wire.send(regenerate=pb.Regenerate(turn_id="r-1", replaces="t-2"))
    assert reply_of(await wire.until("turn_done")) == "You said: two"
    assert [turn.turn_id for turn in (await client.get(id))[1]] == ["t-1", "r-1"]


async def test_a_regeneration_that_is_discarded_leaves_what_it_would_have_replaced(wire, engine, client):
    id = await said(wire, "one", "two")
    engine.hold(3)
    await wire.send(regenerate=pb.Regenerate(turn_id="r-1"))
    await engine.holding.wait()
    await wire.send(cancel=pb.Cancel(turn_id="r-1", discard=True))
    assert (await wire.until("turn_failed"))[-1].turn_failed.error.reason == "TURN_CANCELLED"
    assert [turn.turn_id for turn in (await client.get(id))[1]] == ["t-1", "t-2"]


@pytest.mark.parametrize(
    ("to", "point", "turns", "tokens"),
    [
        ({"turns": 1}, Point(num_turns=1), 1, 16),
        ({"tokens": 20}, Point(num_tokens=20), 2, 20),
        ({"turns": 0}, Point(num_turns=0), 0, 0),
        ({"tokens": 0}, Point(num_tokens=0), 0, 0),
    ],
)
async def test_rewind_tells_where_the_conversation_stands_and_repeating_it_changes_nothing(
    wire, engine, to, point, turns, tokens
):
    await said(wire, "one", "two")
    for client_seq in (5, 6):
        await wire.send(client_seq, rewind=pb.Rewind(**to))
        rewound = (await wire.next()).rewound
        assert rewound == pb.Rewound(
            client_seq=client_seq, committed_tokens=tokens, committed_turns=turns, context_left=4096 - tokens
        )
        assert engine.seen[-1] == point


async def test_update_names_what_it_changes_and_nothing_else(wire, engine, client):
    id = (await wire.open(labels={"a": "1"}, sampling=pb.Sampling(top_k=5))).conversation_id
    await wire.send(5, update=pb.Update(sampling=pb.Sampling(temperature=0.0)))
    assert (await wire.next()).updated == pb.Updated(client_seq=5)
    assert engine.seen[-1] == UpdateRequest(sampling=SamplingParams(temperature=0.0), labels=None)
    assert (await client.get(id))[0].labels == {"a": "1"}
    await wire.send(6, update=pb.Update(labels=pb.Labels()))
    assert (await wire.next()).updated == pb.Updated(client_seq=6)
    assert engine.seen[-1] == UpdateRequest(sampling=None, labels={})
    assert (await client.get(id))[0].labels == {}


async def test_an_update_is_answered_while_a_turn_goes_on(wire, engine):
    await wire.open()
    engine.hold(3)
    await wire.say("Hi")
    await engine.holding.wait()
    await wire.send(5, update=pb.Update(sampling=pb.Sampling(temperature=0.0)))
    assert (await wire.until("updated"))[-1].updated.client_seq == 5
    engine.release()
    assert (await wire.until("turn_done"))[-1].turn_done.turn_id == "t-1"


async def test_an_operation_that_takes_long_holds_up_no_event(wire, engine):
    await wire.open()
    engine.hold(3)
    await wire.say("Hi")
    await engine.holding.wait()
    engine.blocked = "update"
    await wire.send(5, update=pb.Update(labels=pb.Labels()))
    await engine.reached.wait()
    engine.release()
    assert reply_of(await wire.until("turn_done")) == "You said: Hi"


@pytest.mark.parametrize(
    ("event", "code", "message"),
    [
        ({"append": pb.Append(text="x")}, 3, "turn_id is empty; set it"),
        ({"append": pb.Append(turn_id="a")}, 3, "turn a says nothing; set text, messages or token_ids"),
        ({"regenerate": pb.Regenerate()}, 3, "turn_id is empty; set it"),
        ({"regenerate": pb.Regenerate(turn_id="r", replaces="")}, 3, "replaces is empty; set it"),
        ({"regenerate": pb.Regenerate(turn_id="r", timeout_s=0)}, 3, "timeout_s is 0; it must be a positive"),
        ({"regenerate": pb.Regenerate(turn_id="r", replaces="t-9")}, 5, "there is no turn t-9 in c-1"),
        (
            {"regenerate": pb.Regenerate(turn_id="r", sampling=pb.Sampling(logprobs=21))},
            3,
            "logprobs is 21; it must be between 0 (of the chosen token alone) and 20",
        ),
        ({"rewind": pb.Rewind()}, 3, "the rewind does not say where to; set turns or tokens"),
        ({"rewind": pb.Rewind(turns=-1)}, 3, "turns is -1; it must be 0 or more, so many turns stay"),
        ({"rewind": pb.Rewind(tokens=-2)}, 3, "tokens is -2; it must be 0 or more, so many tokens stay"),
        ({"rewind": pb.Rewind(turns=2)}, 3, "c-1 has 1 turns; 2 cannot stay"),
        ({"update": pb.Update()}, 3, "the update changes nothing; set sampling or labels"),
        (
            {"update": pb.Update(sampling=pb.Sampling(logit_bias={5: 101.0}))},
            3,
            "logit_bias of token 5 is 101.0; it must be between -100 and 100",
        ),
    ],
)
async def test_a_refused_operation_is_answered_in_band_and_the_stream_lives_on(wire, event, code, message):
    await said(wire, "one")
    await wire.send(17, **event)
    told = (await wire.next()).error
    assert (told.code, told.client_seq, told.retryable) == (code, 17, False)
    assert told.message.startswith(message)
    (operation,) = event.values()
    assert told.turn_id == getattr(operation, "turn_id", "")
    await wire.say("still here?", "t-2")
    assert reply_of(await wire.until("turn_done")) == "You said: still here?"


@pytest.mark.parametrize(
    "event",
    [
        {"append": pb.Append(turn_id="x", text="x")},
        {"regenerate": pb.Regenerate(turn_id="x")},
        {"rewind": pb.Rewind(turns=0)},
    ],
)
async def test_what_needs_the_history_at_rest_is_refused_while_a_turn_is_in_flight(wire, engine, event):
    await said(wire, "one")
    engine.hold(3)
    await wire.say("two", "t-2")
    await engine.holding.wait()
    await wire.send(17, **event)
    told = (await wire.until("error"))[-1].error
    assert (told.code, told.reason, told.client_seq) == (9, "CONFLICT", 17)
    assert told.message == "turn t-2 is in flight in c-1; wait or cancel it"
    engine.release()
    assert (await wire.until("turn_done"))[-1].turn_done.turn_id == "t-2"


async def test_open_hands_over_history_tools_and_policy(wire, engine, client):
    history = [pb.Message(role="user", content="Hi"), pb.Message(role="assistant", content="Hello.")]
    opened = await wire.open(
        system="Be brief.",
        history=pb.Messages(messages=history),
        tools=[TOOL],
        on_rewrite=pb.REWRITE_POLICY_STRIP,
    )
    assert (opened.committed_turns, engine.seen[-1]) == (
        1,
        OpenRequest(
            system="Be brief.",
            history=(Message("user", "Hi"), Message("assistant", "Hello.")),
            tools=(TOOL,),
            on_rewrite=RewritePolicy.STRIP,
        ),
    )
    conversation, (turn,) = await client.get(opened.conversation_id)
    assert (list(conversation.tools), conversation.on_rewrite) == ([TOOL], pb.REWRITE_POLICY_STRIP)
    assert (turn.turn_id, turn.finish_reason) == ("history", pb.FINISH_REASON_APPENDED)
    assert list(turn.messages) == history


async def test_an_unknown_rewrite_policy_is_refused_with_those_that_exist(wire):
    await wire.send(open=pb.Open(on_rewrite=7))
    status = await wire.status()
    assert status.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert status.details() == "on_rewrite is 7; it must be KEEP (0) or STRIP (1)"


async def test_every_sampling_field_reaches_the_engine_and_comes_back(wire, engine, client):
    sampling = pb.Sampling(
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        logit_bias={7: -1.5, 3: 2.0},
        logprobs=0,
        include_stop=True,
        bad_words=["damn"],
    )
    id = (await wire.open(sampling=sampling)).conversation_id
    assert engine.seen[-1].sampling == SamplingParams(
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        logit_bias=((3, 2.0), (7, -1.5)),
        logprobs=0,
        include_stop=True,
        bad_words=("damn",),
    )
    assert (await client.get(id))[0].sampling == sampling


async def test_deltas_say_what_kind_they_are_and_how_likely_their_tokens_were(wire, engine):
    engine.thoughts = "You said"
    await wire.open()
    await wire.send(turn=pb.Turn(turn_id="t", text="!", sampling=pb.Sampling(logprobs=1)))
    deltas = [event.delta for event in await wire.until("turn_done") if event.HasField("delta")]
    by_kind = {
        kind: "".join(delta.text for delta in deltas if delta.kind == kind)
        for kind in (pb.REPLY_KIND_REASONING, pb.REPLY_KIND_TEXT)
    }
    assert by_kind == {pb.REPLY_KIND_REASONING: "You said ", pb.REPLY_KIND_TEXT: ":!"}
    logprobs = [each for delta in deltas for each in delta.logprobs]
    assert [each.token_id for each in logprobs] == [id for delta in deltas for id in delta.token_ids]
    likely = [pb.TokenLogprob(token_id=89, logprob=-0.5), pb.TokenLogprob(token_id=0, logprob=-1.0)]
    assert (logprobs[0].logprob, list(logprobs[0].top)) == (-0.5, likely)


async def test_a_rewritten_history_is_told_with_its_place_and_cost(wire, engine):
    await said(wire, "one")
    engine.rewritten_from = 6
    await wire.say("two", "t-2")
    (event,) = [e for e in await wire.until("turn_done") if e.HasField("history_rewritten")]
    assert event.seq > 0 and event.history_rewritten == pb.HistoryRewritten(
        turn_id="t-2", first_token=6, num_tokens=10, policy=pb.REWRITE_POLICY_KEEP
    )


async def test_fork_makes_a_conversation_that_says_where_it_comes_from(wire, engine, client, conversations):
    id = await said(wire, "one", "two")
    request = pb.ForkRequest(conversation_id=id, new_conversation_id="f", turns=1, labels=pb.Labels())
    fork = (await conversations.Fork(request)).conversation
    assert engine.seen[-1] == ForkRequest(id, "f", Point(num_turns=1), {})
    assert (fork.conversation_id, fork.parent_id, fork.forked_at) == ("f", id, 16)
    assert (fork.num_turns, fork.num_tokens) == (1, 16)
    assert (await conversations.Fork(request)).conversation == fork
    assert [turn.turn_id for turn in (await client.get("f"))[1]] == ["t-1"]
    assert len((await client.get(id))[1]) == 2
    assert not (await client.get(id))[0].HasField("parent_id")


async def test_a_fork_of_all_takes_the_labels_along(wire, engine, conversations):
    id = (await wire.open(labels={"a": "1"})).conversation_id
    fork = (await conversations.Fork(pb.ForkRequest(conversation_id=id))).conversation
    assert engine.seen[-1] == ForkRequest(id) and fork.labels == {"a": "1"}


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"conversation_id": ""}, "INVALID_ARGUMENT", "conversation_id is empty; set it"),
        ({"new_conversation_id": ""}, "INVALID_ARGUMENT", "new_conversation_id is empty; set it"),
        ({"tokens": -1}, "INVALID_ARGUMENT", "tokens is -1; it must be 0 or more, so many tokens stay"),
        ({"tokens": 18}, "INVALID_ARGUMENT", "token 18 lies inside the message of t-2"),
        ({"tokens": 99}, "INVALID_ARGUMENT", "c-1 has 32 tokens; 99 cannot stay"),
        ({"conversation_id": "c-404"}, "NOT_FOUND", "there is no conversation c-404"),
        ({"new_conversation_id": "c-1"}, "ALREADY_EXISTS", "conversation c-1 exists"),
    ],
)
async def test_a_wrong_fork_hears_what_is_wrong(wire, conversations, fields, code, message):
    id = await said(wire, "one", "two")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await conversations.Fork(pb.ForkRequest(**{"conversation_id": id, **fields}))
    assert failure.value.code().name == code and failure.value.details().startswith(message)


async def test_tools_of_a_generation_reach_the_engine(client, engine):
    await client.generate(messages=[{"role": "user", "content": "hi"}], tools=[json.loads(TOOL)])
    assert engine.seen[-1].tools == (TOOL,)


async def test_an_operation_that_the_disk_refuses_is_told_with_the_time_to_wait(wire, engine):
    await said(wire, "one")
    engine.refuse = errors.DataDirError("the disk of the data dir is full; make room")
    for event in ({"append": pb.Append(turn_id="x", text="x")}, {"regenerate": pb.Regenerate(turn_id="x")}):
        await wire.send(9, **event)
        told = (await wire.next()).error
        assert (told.reason, told.turn_id, told.client_seq) == ("DATA_DIR_ERROR", "x", 9)
        assert told.retryable and told.retry_after_s == 2.0
