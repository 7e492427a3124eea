"""The port: binding, TLS, identity, health, reflection, keepalive, drain.

`serve` is the whole life of a server process from an engine on; `Server` is the same without signals, for
tests.
"""

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from engine.errors import ConfigError
from rpc._generated import continuo_pb2, continuo_pb2_grpc
from rpc.auth import Doorkeeper
from rpc.backend import Backend
from rpc.listen import Address, ServerOptions, authenticator, check_exposure, tls_credentials
from rpc.servicer import ConversationsServicer, EngineServicer
from rpc.status import AnswerMalformed

log = logging.getLogger(__name__)

SERVICES = tuple(service.full_name for service in continuo_pb2.DESCRIPTOR.services_by_name.values())
LAST_WORDS_S = 2.0  # for handlers to end after the engine has ended their streams
_SERVING = health_pb2.HealthCheckResponse.SERVING


async def serve(backend: Backend, options: ServerOptions, on_ready: Callable[[str], None]) -> int:
    """Serves until SIGTERM, Ctrl-C, `Drain` or a failed engine.  Returns the exit code: 0 = drained, 1 = not.

    `on_ready` gets the real address once calls are taken.  A second signal ends without waiting for the
    drain. Raises `ConfigError`.
    """
    server = Server(backend, options)
    await server.start()
    try:
        on_ready(server.address)
        with _signals(server.begin_drain, server.hurry):
            return await server.run()
    finally:
        await server.stop()


class Server:
    """One bound port.  Raises `ConfigError` from the constructor if the options cannot work."""

    def __init__(self, backend: Backend, options: ServerOptions) -> None:
        address = check_exposure(options)
        who = authenticator(options, address)
        self._backend = backend
        self._grace_s = options.drain_grace_s
        self._drain_begun = asyncio.Event()
        self._hurried = asyncio.Event()
        self._health = health.aio.HealthServicer()
        self._grpc = grpc.aio.server(
            interceptors=[Doorkeeper(who), AnswerMalformed()], options=_channel_options(options)
        )
        continuo_pb2_grpc.add_ConversationsServicer_to_server(ConversationsServicer(backend, who), self._grpc)
        engine_servicer = EngineServicer(backend, who, self.begin_drain)
        continuo_pb2_grpc.add_EngineServicer_to_server(engine_servicer, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        self.address = str(Address(address.host, _bind(self._grpc, address, options)))

    async def start(self) -> None:
        await self._grpc.start()
        for service in ("", *SERVICES):
            await self._health.set(service, _SERVING)

    def begin_drain(self, grace_s: float | None = None) -> None:
        """No new turns; `run` returns when the running ones have ended, or after `grace_s`."""
        if grace_s is not None:
            self._grace_s = grace_s
        self._drain_begun.set()

    def hurry(self) -> None:
        """Makes `run` return now."""
        self._hurried.set()

    async def run(self) -> int:
        """Until drained (0), or until hurried or the engine has failed (1)."""
        async with asyncio.TaskGroup() as tasks:
            drained = tasks.create_task(self._drained())
            failed = tasks.create_task(self._backend.wait_failed())
            hurried = tasks.create_task(self._hurried.wait())
            await asyncio.wait({drained, failed, hurried}, return_when=asyncio.FIRST_COMPLETED)
            for task in (drained, failed, hurried):
                task.cancel()
        if not failed.cancelled():
            log.critical("the engine has failed; the server ends", exc_info=failed.result())
            await self._health.enter_graceful_shutdown()
        return 0 if not drained.cancelled() and failed.cancelled() else 1

    async def stop(self) -> None:
        """Ends every call that is still there and frees the port."""
        await self._grpc.stop(LAST_WORDS_S if not self._hurried.is_set() else None)

    async def _drained(self) -> None:
        await self._drain_begun.wait()
        await self._health.enter_graceful_shutdown()
        await self._backend.drain(self._grace_s)


def _channel_options(options: ServerOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server behind the same one
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        # A prefill may last minutes without a byte: both sides ping through it, and neither calls that abuse.
        ("grpc.keepalive_time_ms", 45_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            9_000,
        ),  # clients may ping every 10 s; one for jitter
    ]


def _bind(server: grpc.aio.Server, address: Address, options: ServerOptions) -> int:
    credentials = tls_credentials(options)
    try:
        if credentials is None:
            return server.add_insecure_port(str(address))
        return server.add_secure_port(str(address), credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address}: the port is taken or the address is not this machine's; "
            "choose another with --listen (port 0 = any free one)"
        ) from error


@contextmanager
def _signals(first: Callable[[], None], second: Callable[[], None]) -> Iterator[None]:
    """While inside, the first SIGTERM or Ctrl-C calls `first`, any further one `second`."""
    loop = asyncio.get_running_loop()
    received = 0

    def handle() -> None:
        nonlocal received
        received += 1
        (first if received == 1 else second)()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
