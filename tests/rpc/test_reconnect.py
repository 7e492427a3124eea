"""A lost connection: the reply goes on, or begins again and says so."""

import asyncio

import pytest

from engine.errors import Draining
from rpc.client import ContinuoClient, FinishReason, Unavailable
from tests.rpc.conftest import eventually


async def half_read(chat, engine):
    """A reply that has shown its first nine letters when the connection breaks."""
    engine.hold(9)
    reply, shown = chat.say("Hi"), ""
    async for delta in reply:
        shown += delta.text
        if len(shown) == 9:
            return reply
    raise AssertionError(shown)


async def test_a_reply_goes_on_where_it_was_when_the_engine_kept_the_turn(fast, client, engine, restart):
    engine.detach_grace_s = 60.0
    reply = await half_read(await client.open(), engine)
    await restart()
    engine.release()
    rest = [delta async for delta in reply]
    assert "".join(delta.text for delta in rest) == " Hi" and not any(delta.restarted for delta in rest)
    assert (await reply).text == "You said: Hi"


async def test_a_turn_that_was_committed_meanwhile_comes_back_once(fast, client, engine, restart):
    engine.detach_grace_s = 60.0
    chat = await client.open()
    reply = await half_read(chat, engine)
    engine.release()
    await eventually(lambda: engine.conversations["local", chat.id].turns)
    await restart()
    engine.conversations["local", chat.id].log.clear()  # as after a crash: only the committed turn is known
    rest = [delta async for delta in reply]
    assert "".join(delta.text for delta in rest) == " Hi"
    assert (await chat.say("next")).text == "You said: next"
    assert chat.committed_turns == 2


async def test_a_lost_turn_is_sent_again_and_shows_nothing_twice(fast, client, engine, restart):
    chat = await client.open()
    reply = await half_read(chat, engine)
    engine.lose_turn(engine.conversations["local", chat.id])
    await restart()
    engine.release()
    rest = [delta async for delta in reply]
    assert "".join(delta.text for delta in rest) == " Hi" and not any(delta.restarted for delta in rest)
    turns = [request for request in engine.seen if getattr(request, "turn_id", "") == (await reply).id]
    assert len(turns) == 2 and turns[0] == turns[1]


async def test_a_reply_that_comes_out_differently_begins_again_and_says_so(fast, client, engine, restart):
    chat = await client.open()
    reply = await half_read(chat, engine)
    engine.lose_turn(engine.conversations["local", chat.id])
    await restart()
    engine.greeting = "I heard: "
    engine.release()
    rest = [delta async for delta in reply]
    assert rest[0].restarted and not any(delta.restarted for delta in rest[1:])
    assert "".join(delta.text for delta in rest) == (await reply).text == "I heard: Hi"


async def test_a_turn_cut_by_a_drain_is_told_as_cancelled_with_what_it_has(fast, client, engine, server):
    reply = await half_read(await client.open(), engine)
    run = asyncio.create_task(server.run())
    server.begin_drain(0.05)
    turn = await reply
    assert (turn.text, turn.finish_reason) == ("You said:", FinishReason.CANCELLED)
    assert await run == 0


async def test_an_idle_chat_does_not_notice_a_restart(fast, client, restart):
    chat = await client.open()
    await chat.say("one")
    await restart()
    assert (await chat.say("two")).text == "You said: two"
    await restart()
    await chat.close()


async def test_a_server_that_drains_is_left_alone_for_as_long_as_it_asks(fast, client, engine, monkeypatch):
    monkeypatch.setattr(Draining, "retry_after_s", 0.4)
    chat = await client.open()
    engine.draining = True
    began = asyncio.get_running_loop().time()
    saying = asyncio.ensure_future(chat.say("Hi"))
    await eventually(lambda: len(engine.seen) == 2)
    engine.draining = False
    assert (await saying).text == "You said: Hi"
    assert asyncio.get_running_loop().time() - began >= 0.4


async def test_without_retry_a_lost_connection_is_told_at_once(engine, server, restart):
    async with ContinuoClient(server.address, retry=False) as client:
        reply = await half_read(await client.open(), engine)
        await restart()
        with pytest.raises(Unavailable):
            await reply


async def test_the_attempts_are_bounded(client, server, monkeypatch):
    monkeypatch.setattr("rpc.client.PAUSES_S", (0.01,) * 3)
    chat = await client.open()
    server.hurry()
    await server.stop()
    with pytest.raises(Unavailable):
        await chat.say("Hi")
    with pytest.raises(Unavailable):
        await client.resume(chat.id)


def test_jitter_spreads_the_pauses_between_half_and_whole():
    pauses = {}
    for jitter in (0.0, 1.0):
        client = ContinuoClient.__new__(ContinuoClient)
        client._retry, client._jitter = True, lambda jitter=jitter: jitter
        pauses[jitter] = list(client._pauses())
    assert pauses[0.0] == [pause / 2 for pause in pauses[1.0]]
    assert pauses[1.0] == sorted(pauses[1.0]) and sum(pauses[1.0]) > 15


async def test_a_resume_waits_for_a_server_that_is_not_there_yet(fast, engine, server, restart):
    async with ContinuoClient(server.address) as client:
        id = (await client.open()).id
        server.hurry()
        await server.stop()
        resuming = asyncio.ensure_future(client.resume(id))
        await asyncio.sleep(0.05)
        assert not resuming.done()
        await restart()
        assert (await resuming).id == id
