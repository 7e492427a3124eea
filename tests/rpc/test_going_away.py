"""A client that goes away, at every await of the server: nothing is left running, no error is logged."""

import asyncio

import grpc
import pytest

from rpc._generated import continuo_pb2 as pb
from rpc._generated import continuo_pb2_grpc as pb_grpc
from tests.rpc.conftest import Wire, eventually


@pytest.fixture(autouse=True)
async def nothing_is_left(engine, client, caplog):
    yield
    await eventually(lambda: not [task for task in asyncio.all_tasks() if "ConversationStream" in repr(task)])
    engine.blocked = ""
    engine.release()
    assert (await (await client.open()).say("alive")).text == "You said: alive"
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_before_its_first_event(wire):
    await wire.call.write(pb.ClientEvent())  # only to have the call begun
    wire.call.cancel()


@pytest.mark.parametrize("method", ["open", "resume"])
async def test_while_the_engine_is_still_attaching(wire, engine, method):
    engine.blocked = method
    first = {"open": pb.Open()} if method == "open" else {"resume": pb.Resume(conversation_id="c-1")}
    await wire.send(**first)
    await engine.reached.wait()
    wire.call.cancel()
    await asyncio.wait_for(engine.abandoned.wait(), 5)


async def test_while_nothing_happens_and_the_conversation_stays(wire, client):
    id = (await wire.open()).conversation_id
    wire.call.cancel()
    chat = await client.resume(id)
    assert chat.id == id
    await chat.close()


async def test_while_its_turn_is_computed(wire, engine):
    engine.hold(2)
    await wire.open()
    await wire.say("Hi")
    await engine.holding.wait()
    wire.call.cancel()
    await asyncio.wait_for(engine.detached.wait(), 5)


async def test_while_its_turn_is_being_accepted(wire, engine):
    engine.blocked = "turn"
    await wire.open()
    await wire.say("Hi")
    await engine.reached.wait()
    wire.call.cancel()
    await asyncio.wait_for(engine.abandoned.wait(), 5)
    await asyncio.wait_for(engine.detached.wait(), 5)


@pytest.mark.parametrize("politely", [True, False])
async def test_while_its_close_waits_for_the_turn(wire, engine, politely):
    engine.hold(2)
    await wire.open()
    await wire.say("Hi")
    await engine.holding.wait()
    if politely:
        await wire.send(close=pb.Close())
    else:
        await wire.call.done_writing()
    await asyncio.sleep(0.05)  # the server has begun to close; there is no event that says so
    wire.call.cancel()
    await asyncio.wait_for(engine.detached.wait(), 5)


async def test_without_a_goodbye_of_its_whole_connection(server, engine):
    engine.hold(2)
    channel = grpc.aio.insecure_channel(server.address)
    wire = Wire(pb_grpc.ConversationsStub(channel).Converse())
    await wire.open()
    await wire.say("Hi")
    await engine.holding.wait()
    await channel.close()
    await asyncio.wait_for(engine.detached.wait(), 5)


async def test_after_its_deadline(conversations, engine):
    engine.hold(2)
    wire = Wire(conversations.Converse(timeout=0.3))
    await wire.open()
    await wire.say("Hi")
    assert (await wire.status()).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(engine.detached.wait(), 5)


async def test_in_the_middle_of_a_generation(channel, engine):
    engine.hold(2)
    call = pb_grpc.EngineStub(channel).Generate(pb.GenerateRequest(text="hello"))
    await call.read()
    await engine.holding.wait()
    call.cancel()
    await asyncio.wait_for(engine.generation_ended.wait(), 5)


async def test_in_the_middle_of_a_unary_call(channel, engine):
    engine.blocked = "tokenize"
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await pb_grpc.EngineStub(channel).Tokenize(pb.TokenizeRequest(text="x"), timeout=0.2)
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(engine.abandoned.wait(), 5)
