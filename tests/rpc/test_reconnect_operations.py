"""A connection lost in the middle of an operation: it is asked for again, and happens once.

`blocked` is where the server stands when the connection breaks: before it did anything, or with the answer in
its hands.
"""

import asyncio

import pytest

from engine.types import OpenRequest, ResumeRequest
from rpc.client import AlreadyExists, ContinuoClient, FinishReason, Unavailable
from tests.rpc.conftest import eventually


@pytest.fixture
async def chat(fast, client):
    chat = await client.open(labels={"a": "1"})
    await chat.say("one", turn_id="t-1")
    await chat.say("two", turn_id="t-2")
    return chat


@pytest.fixture
def broken(engine, restart):
    """Breaks the connection once the server is in `blocked`, and returns what the operation then returns."""

    async def broken(operation, blocked):
        engine.blocked = blocked
        engine.reached.clear()
        asking = asyncio.ensure_future(operation)
        await engine.reached.wait()
        engine.blocked = ""
        await restart()
        return await asking

    return broken


async def replies(client, chat):
    return [turn.reply for turn in (await client.get(chat.id))[1]]


async def test_an_append_that_never_arrived_is_sent_again(chat, client, broken):
    turn = await broken(chat.append("three", turn_id="a"), "turn")
    assert turn.finish_reason is FinishReason.APPENDED
    assert await replies(client, chat) == ["You said: one", "You said: two", ""]
    assert chat.committed_turns == 3


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.parametrize("operation", ["append", "regenerate", "regenerate t-1"])
async def test_a_turn_whose_end_was_lost_happens_once(chat, client, engine, restart, operation, crashed):
    here = engine.conversations["local", chat.id]
    num_turns = {"append": 3, "regenerate": 2, "regenerate t-1": 1}[operation]
    asked = {
        "append": lambda: chat.append("three", turn_id="x"),
        "regenerate": lambda: chat.regenerate(turn_id="x"),
        "regenerate t-1": lambda: chat.regenerate(replaces="t-1", turn_id="x"),
    }[operation]()
    engine.blocked = "events"
    asking = asyncio.ensure_future(asked)
    await eventually(lambda: here.turns[-1].turn_id == "x")
    engine.blocked = ""
    if crashed:
        here.log.clear()  # only the committed turn is known
    await restart()
    turn = await asking
    assert turn.id == "x" and len(here.turns) == num_turns
    assert (chat.committed_turns, chat.committed_tokens) == (num_turns, here.committed_tokens())
    assert turn.committed_tokens == chat.committed_tokens


async def test_a_regeneration_goes_on_where_it_was(chat, client, engine, restart):
    engine.detach_grace_s = 60.0
    engine.hold(9)
    reply, shown = chat.regenerate(), ""
    async for delta in reply:
        shown += delta.text
        if len(shown) == 9:
            break
    await restart()
    engine.release()
    async for delta in reply:
        assert not delta.restarted
        shown += delta.text
    assert shown == (await reply).text == "You said: two"
    assert await replies(client, chat) == ["You said: one", "You said: two"]
    assert (chat.committed_turns, chat.committed_tokens) == (2, 32)


@pytest.mark.parametrize("blocked", ["rewind", "answer"])
async def test_a_rewind_is_asked_for_until_it_is_answered(chat, client, broken, blocked):
    await broken(chat.rewind(turns=1), blocked)
    assert (chat.committed_turns, chat.committed_tokens, chat.context_left) == (1, 16, 4080)
    assert await replies(client, chat) == ["You said: one"]


@pytest.mark.parametrize("blocked", ["update", "answer"])
async def test_an_update_is_asked_for_until_it_is_answered(chat, client, broken, blocked):
    await broken(chat.update(labels={"b": "2"}, temperature=0.0), blocked)
    conversation, _ = await client.get(chat.id)
    assert (dict(conversation.labels), conversation.sampling.temperature) == ({"b": "2"}, 0.0)


@pytest.mark.parametrize("blocked", ["fork", "answer", "resume"])
async def test_a_fork_is_made_once_however_often_it_is_asked_for(chat, client, broken, blocked):
    fork = await broken(chat.fork(turns=1), blocked)
    assert fork.committed_turns == 1
    assert {c.conversation_id async for c in client.list()} == {chat.id, fork.id}


@pytest.mark.parametrize("blocked", ["open", "opened"])
async def test_a_conversation_is_opened_once_however_often_it_is_asked_for(
    fast, client, engine, broken, blocked
):
    history = [{"role": "user", "content": "Hi"}]
    chat = await broken(client.open("Be brief.", history=history), blocked)
    assert [c.conversation_id async for c in client.list()] == [chat.id]
    assert (chat.committed_turns, chat.committed_tokens) == (1, 2)
    opens = [request for request in engine.seen if isinstance(request, OpenRequest)]
    resumes = [request for request in engine.seen if isinstance(request, ResumeRequest)]
    assert (len(opens), len(resumes)) == {"open": (1, 0), "opened": (2, 1)}[blocked]
    assert (await chat.say("there")).text == "You said: there"


async def test_an_open_under_an_id_of_the_callers_is_tried_once(fast, client, engine, broken):
    with pytest.raises(Unavailable):
        await broken(client.open(id="mine"), "opened")
    with pytest.raises(AlreadyExists, match="conversation mine exists"):
        await client.open(id="mine")


async def test_without_retry_every_lost_operation_is_told(engine, server, restart):
    async with ContinuoClient(server.address, retry=False) as client:
        chat = await client.open()
        await chat.say("one")
        for operation in (chat.rewind(turns=0), chat.update(labels={}), chat.fork(), client.open()):
            engine.blocked = {"rewind": "rewind", "update": "update", "fork": "fork", "open": "open"}[
                operation.__name__
            ]
            engine.reached.clear()
            asking = asyncio.ensure_future(operation)
            await engine.reached.wait()
            await restart()
            with pytest.raises(Unavailable):
                await asking
        engine.blocked = ""
        assert (await chat.say("two")).text == "You said: two"
