"""A real server on a free port over a scripted engine, and a real client."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

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
