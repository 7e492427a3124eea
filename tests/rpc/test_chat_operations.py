"""The Python client: everything but saying and hearing."""

import asyncio
import json

import pytest

from engine.types import Message, Point, RegenerateRequest, RewritePolicy, SamplingParams
from rpc._generated import continuo_pb2 as pb
from rpc.client import (
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    FinishReason,
    InvalidArgument,
    NotFound,
    ReplyKind,
)

TOOL = {"type": "function", "function": {"name": "Wetter für", "parameters": {}}}
CALL = {"name": "weather", "arguments": {"town": "Ulm"}}


def standing(chat):
    return chat.committed_turns, chat.committed_tokens, chat.context_left


async def turn_ids(client, chat):
    return [turn.turn_id for turn in (await client.get(chat.id))[1]]


async def dialogue(client, *texts):
    """A chat in which `texts` were said, as turns t-1, t-2, ...; "one" makes a turn of 16 tokens."""
    chat = await client.open()
    for n, text in enumerate(texts, 1):
        await chat.say(text, turn_id=f"t-{n}")
    return chat


async def test_append_returns_a_turn_without_a_reply(client, engine):
    chat = await client.open()
    turn = await chat.append("Miso is five.", turn_id="mine")
    assert (turn.id, turn.text, turn.token_ids) == ("mine", "", ())
    assert turn.finish_reason is FinishReason.APPENDED
    assert standing(chat) == (1, 13, 4083)
    assert await chat.append("Miso is five.", turn_id="mine") == turn
    assert standing(chat) == (1, 13, 4083)
    assert not engine.seen[-1].wants_reply


async def test_messages_carry_names_calls_and_results_of_tools(client, engine):
    chat = await client.open()
    await chat.append(
        messages=[
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "12 C", "name": "weather", "tool_call_id": "call-1"},
        ]
    )
    first, second = engine.seen[-1].messages
    assert [json.loads(call) for call in first.tool_calls] == [CALL] and first.content == ""
    assert second == Message("tool", "12 C", name="weather", tool_call_id="call-1")


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (
            {"role": "user", "text": "x"},
            "message 0 has text; a message takes role, content, name, tool_call_id, tool_calls",
        ),
        ({"role": "user", "content": 5}, "message 0: bad argument type"),
        (
            {"role": "assistant", "tool_calls": [{"a": {1, 2}}]},
            "tool_calls of message 0 cannot be written as JSON: Object of type set is not JSON serializable",
        ),
    ],
)
async def test_a_message_that_cannot_be_sent_is_refused_here_and_says_why(client, message, complaint):
    chat = await client.open()
    with pytest.raises(InvalidArgument, match=complaint):
        await chat.append(messages=[message])


async def test_regenerate_gives_another_reply_in_the_place_of_the_last(client, engine):
    chat = await dialogue(client, "one", "two")
    engine.greeting = "Heard: "
    turn = await chat.regenerate(turn_id="r", seed=7, timeout=2.5)
    assert (turn.id, turn.text) == ("r", "Heard: two")
    assert engine.seen[-1] == RegenerateRequest("r", None, SamplingParams(seed=7), 2.5)
    assert await turn_ids(client, chat) == ["t-1", "r"]
    assert standing(chat) == (2, 29, 4067)
    assert await chat.regenerate(turn_id="r", seed=7, timeout=2.5) == turn
    assert standing(chat) == (2, 29, 4067)


async def test_regenerate_of_an_earlier_turn_knows_how_many_turns_are_left(client):
    chat = await dialogue(client, "one", "two", "three")
    assert (await chat.regenerate(replaces="t-2", turn_id="r")).text == "You said: two"
    assert await turn_ids(client, chat) == ["t-1", "r"]
    assert standing(chat) == (2, 32, 4064)
    assert (await chat.say("four")).text == "You said: four" and chat.committed_turns == 3


async def test_a_regeneration_may_be_cancelled_or_discarded_like_any_turn(client, engine):
    chat = await dialogue(client, "one", "two")
    engine.hold(3)
    reading = asyncio.ensure_future(chat.regenerate())
    await engine.holding.wait()
    await chat.cancel(discard=True)
    with pytest.raises(Cancelled):
        await reading
    assert await turn_ids(client, chat) == ["t-1", "t-2"] and standing(chat) == (2, 32, 4064)
    engine.hold(3)
    reading = asyncio.ensure_future(chat.regenerate(turn_id="r"))
    await engine.holding.wait()
    await chat.cancel()
    assert ((await reading).text, (await reading).finish_reason) == ("You", FinishReason.CANCELLED)
    assert await turn_ids(client, chat) == ["t-1", "r"] and standing(chat) == (2, 22, 4074)


async def test_there_must_be_a_turn_to_regenerate(client):
    chat = await client.open()
    with pytest.raises(NotFound, match=f"there is no turn None in {chat.id} to regenerate"):
        await chat.regenerate()


async def test_rewind_to_a_turn_or_a_token_and_go_on_from_there(client, engine):
    chat = await dialogue(client, "one", "two", "three")
    await chat.rewind(turns=2)
    assert standing(chat) == (2, 32, 4064) and engine.seen[-1] == Point(num_turns=2)
    await chat.rewind(tokens=22)
    assert standing(chat) == (2, 22, 4074) and engine.seen[-1] == Point(num_tokens=22)
    assert [turn.reply for turn in (await client.get(chat.id))[1]] == ["You said: one", "You"]
    await chat.say("four")
    assert chat.committed_turns == 3
    await chat.rewind(turns=0)
    assert standing(chat) == (0, 0, 4096)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ({}, "the rewind does not say where to; set turns or tokens"),
        ({"turns": 1, "tokens": 3}, "give turns or tokens, not both; got turns=1 and tokens=3"),
        ({"turns": -1}, "turns is -1; it must be 0 or more, so many turns stay"),
        ({"tokens": 1}, "token 1 lies inside the message of t-1"),
    ],
)
async def test_a_wrong_rewind_is_told_and_changes_nothing(client, to, message):
    chat = await dialogue(client, "one")
    with pytest.raises(InvalidArgument, match=message):
        await chat.rewind(**to)
    assert standing(chat) == (1, 16, 4080)
    assert (await chat.say("two")).text == "You said: two"


async def test_update_sets_labels_and_defaults_apart(client):
    chat = await client.open(labels={"a": "1"}, temperature=0.5, top_k=3)
    await chat.update(temperature=0.0, logit_bias={5: -1.0})
    conversation, _ = await client.get(chat.id)
    assert conversation.sampling == pb.Sampling(temperature=0.0, top_k=3, logit_bias={5: -1.0})
    assert dict(conversation.labels) == {"a": "1"}
    await chat.update(labels={"b": "2"})
    conversation, _ = await client.get(chat.id)
    assert conversation.sampling.temperature == 0.0 and dict(conversation.labels) == {"b": "2"}
    await chat.update(labels={})
    assert not (await client.get(chat.id))[0].labels
    with pytest.raises(InvalidArgument, match="the update changes nothing; set sampling or labels"):
        await chat.update()


async def test_a_fork_goes_on_apart_from_where_it_came(client):
    chat = await dialogue(client, "one", "two")
    fork = await chat.fork(turns=1, labels={"side": "b"})
    assert fork.id != chat.id and standing(fork) == (1, 16, 4080)
    assert (await fork.say("three")).text == "You said: three"
    assert (await chat.say("four")).text == "You said: four"
    conversation, turns = await client.get(fork.id)
    assert [turn.reply for turn in turns] == ["You said: one", "You said: three"]
    assert (conversation.parent_id, conversation.forked_at) == (chat.id, 16)
    assert dict(conversation.labels) == {"side": "b"}
    assert standing(await chat.fork(tokens=22)) == (2, 22, 4074)
    assert standing(await chat.fork()) == (3, chat.committed_tokens, chat.context_left)


async def test_a_fork_under_an_id_of_its_own_is_made_once(client):
    chat = await dialogue(client, "one")
    first, again = await chat.fork(id="f"), await client.fork(chat.id, new_id="f")
    assert first.id == again.conversation_id == "f"
    await chat.say("two")
    with pytest.raises(AlreadyExists, match="conversation f exists"):
        await client.fork(chat.id, new_id="f")
    with pytest.raises(InvalidArgument, match="give turns or tokens, not both; got turns=0 and tokens=0"):
        await client.fork(chat.id, turns=0, tokens=0)
    with pytest.raises(NotFound, match="there is no conversation c-404"):
        await client.fork("c-404")


async def test_open_takes_history_tools_and_what_to_do_with_a_rewritten_past(client, engine):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    chat = await client.open("Be brief.", history=history, tools=[TOOL], strip_rewritten=True)
    opened = engine.seen[-1]
    assert opened.history == (Message("user", "Hi"), Message("assistant", "Hello."))
    assert [json.loads(tool) for tool in opened.tools] == [TOOL] and "für" in opened.tools[0]
    assert opened.on_rewrite is RewritePolicy.STRIP
    assert chat.committed_turns == 1
    await client.open()
    assert engine.seen[-1].on_rewrite is RewritePolicy.KEEP


async def test_a_tool_that_is_no_json_is_refused_here(client):
    with pytest.raises(InvalidArgument, match="tools cannot be written as JSON: Out of range float"):
        await client.open(tools=[{"a": float("nan")}])


async def test_deltas_and_turns_carry_kinds_and_logprobs(client, engine):
    engine.thoughts = "You said"
    chat = await client.open()
    reply = chat.say("!", logprobs=1)
    deltas = [delta async for delta in reply]
    turn = await reply
    thought = "".join(delta.text for delta in deltas if delta.kind is ReplyKind.REASONING)
    assert (thought, turn.text) == ("You said ", "You said :!".replace(" :", ": "))
    assert sum((delta.logprobs for delta in deltas), ()) == turn.logprobs
    assert [each.token_id for each in turn.logprobs] == list(turn.token_ids)
    assert turn.logprobs[0].logprob == -0.5 and turn.logprobs[0].top[1].logprob == -1.0
    assert (await chat.say("!")).logprobs == ()


async def test_a_turn_says_from_where_the_template_renders_the_past_anew(client, engine):
    chat = await dialogue(client, "one")
    assert (await chat.say("two")).rewritten_from is None
    engine.rewritten_from = 0
    assert (await chat.say("three")).rewritten_from == 0


async def test_one_thing_at_a_time(client, engine):
    chat = await dialogue(client, "one")
    engine.blocked = "rewind"
    rewinding = asyncio.ensure_future(chat.rewind(turns=0))
    await engine.reached.wait()
    for other in (chat.say("two"), chat.update(labels={}), chat.close(), chat.append("three")):
        with pytest.raises(FailedPrecondition, match="`rewind` is not answered yet; await it first"):
            await other
    rewinding.cancel()
    engine.blocked = ""
    engine.hold(3)
    reply = chat.say("two", turn_id="t-two")
    reading = asyncio.ensure_future(reply)
    await engine.holding.wait()
    for other in (chat.rewind(turns=0), chat.update(labels={}), chat.append("three")):
        with pytest.raises(FailedPrecondition, match="turn t-two is still being answered; read its reply"):
            await other
    engine.release()
    assert (await reading).text == "You said: two"


async def test_an_operation_that_was_given_up_leaves_a_usable_chat(client, engine):
    chat = await dialogue(client, "one")
    engine.blocked = "update"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await chat.update(temperature=0.0)
    engine.blocked = ""
    assert (await chat.say("two")).text == "You said: two"
    await chat.rewind(turns=1)
    assert standing(chat) == (1, 16, 4080)
