"""A real server on a free port over a scripted engine, a real client, and a stream without its manners."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from rpc._generated import continuo_pb2 as pb
from rpc._generated import continuo_pb2_grpc as pb_grpc
from rpc.client import ContinuoClient
from rpc.listen import ServerOptions
from rpc.server import Server
from tests.rpc.fakes import FakeEngine


@asynccontextmanager
async def running(engine: FakeEngine, **options: Any) -> AsyncIterator[Server]:
    server = Server(engine, ServerOptions(**{"listen": "127.0.0.1:0", **options}))
    await server.start()
    try:
        yield server
    finally:
        server.hurry()
        await server.stop()


async def eventually(true: Callable[[], object]) -> None:
    """Waits, for at most five seconds, until `true()` is."""
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it never became true")


class Wire:
    """A `Converse` call without any manners: sends what it is given, returns what comes."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def send(self, client_seq: int = 0, **event: Any) -> None:
        await self.call.write(pb.ClientEvent(client_seq=client_seq, **event))

    async def next(self) -> pb.ServerEvent:
        event = await self.call.read()
        assert event is not grpc.aio.EOF, "the server ended the stream"
        return event

    async def until(self, kind: str) -> list[pb.ServerEvent]:
        """All events up to the first of `kind`, which is the last of them."""
        events = [await self.next()]
        while events[-1].WhichOneof("event") != kind:
            events.append(await self.next())
        return events

    async def open(self, **fields: Any) -> pb.Attached:
        await self.send(open=pb.Open(**fields))
        return (await self.next()).opened

    async def resume(self, id: str, **fields: Any) -> pb.Attached:
        await self.send(resume=pb.Resume(conversation_id=id, **fields))
        return (await self.next()).resumed

    async def say(self, text: str, turn_id: str = "t-1", client_seq: int = 0) -> None:
        await self.send(client_seq, turn=pb.Turn(turn_id=turn_id, text=text))

    async def status(self) -> grpc.aio.AioRpcError:
        """How the call fails, after whatever still comes."""
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        return failure.value

    async def ends_well(self) -> None:
        assert await self.call.read() is grpc.aio.EOF
        assert await self.call.code() is grpc.StatusCode.OK


def kinds(events: Sequence[pb.ServerEvent]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


def reply_of(events: Sequence[pb.ServerEvent]) -> str:
    return "".join(event.delta.text for event in events)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as engine:
        yield engine


@pytest.fixture
async def server(engine: FakeEngine) -> AsyncIterator[Server]:
    async with running(engine) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[ContinuoClient]:
    async with ContinuoClient(server.address, jitter=lambda: 0.0) as client:
        yield client


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def conversations(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.ConversationsStub(channel)


@pytest.fixture
def wire(conversations: Any) -> Wire:
    return Wire(conversations.Converse())


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost connections come back without long pauses."""
    monkeypatch.setattr("rpc.client.PAUSES_S", (0.02,) * 100)


@pytest.fixture
async def restart(engine: FakeEngine, server: Server) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Breaks every connection and serves again on the same port; the engine lives on."""
    servers = [server]

    async def restart() -> None:
        servers[-1].hurry()
        await servers[-1].stop()
        servers.append(Server(engine, ServerOptions(listen=server.address)))
        await servers[-1].start()

    yield restart
    servers[-1].hurry()
    await servers[-1].stop()
