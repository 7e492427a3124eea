"""The port: what may be exposed, binding, TLS, health, signals, drain, failure."""

import asyncio
import os
import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.errors import ConfigError, EngineStopped
from rpc.client import ContinuoClient, PermissionDenied, Unavailable
from rpc.listen import Address, ServerOptions, check_exposure
from rpc.server import SERVICES, Server, serve
from tests.rpc.conftest import eventually, running
from tests.rpc.fakes import FakeEngine

TLS = Path(__file__).parent / "tls"  # of localhost, made for these tests, valid for a hundred years
CERT, KEY = TLS / "cert.pem", TLS / "key.pem"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", "[::1]:50051", "127.8.8.8:1"])
def test_loopback_needs_neither_tokens_nor_tls(listen):
    assert check_exposure(ServerOptions(listen=listen)).is_loopback


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:50051", "10.0.0.7:50051", "my.host:50051"])
@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "--token-file and --tls-cert and --tls-key"),
        ({"token_file": Path("t")}, "--tls-cert and --tls-key"),
        ({"tls_cert": CERT, "tls_key": KEY}, "--token-file"),
    ],
)
def test_any_other_address_needs_tokens_and_tls_or_insecure(listen, given, missing):
    with pytest.raises(ConfigError) as failure:
        check_exposure(ServerOptions(listen=listen, **given))
    assert str(failure.value) == (
        f"{listen} can be reached from other machines; add {missing}, listen on 127.0.0.1, "
        "or accept the risk with --insecure"
    )
    assert not check_exposure(ServerOptions(listen=listen, insecure=True, **given)).is_loopback


def test_any_other_address_is_fine_with_tokens_and_tls():
    options = ServerOptions(listen="0.0.0.0:1", token_file=Path("t"), tls_cert=CERT, tls_key=KEY)
    assert check_exposure(options) == Address("0.0.0.0", 1)


@pytest.mark.parametrize(
    "listen", ["", "50051", "localhost", "localhost:", ":50051", "h:65536", "h:-1", "h:x"]
)
def test_an_address_that_is_none_is_refused_with_an_example(listen):
    with pytest.raises(ConfigError) as failure:
        Address.parse(listen)
    assert str(failure.value) == f"cannot listen on {listen!r}; give HOST:PORT, for example 127.0.0.1:50051"


def test_an_ipv6_address_without_brackets_is_refused():
    with pytest.raises(ConfigError, match=r"stands in brackets: \[::1\]:50051"):
        Address.parse("::1:50051")


def test_a_certificate_without_its_key_is_refused():
    with pytest.raises(ConfigError, match="--tls-cert was given without --tls-key; TLS needs both"):
        check_exposure(ServerOptions(tls_cert=CERT))


@pytest.mark.parametrize(
    ("cert", "key", "problem"),
    [
        (Path("nowhere.pem"), KEY, "No such file or directory"),
        (Path(__file__), KEY, "NO_START_LINE|no start line|PEM lib"),
        (CERT, TLS / "other_key.pem", "KEY_VALUES_MISMATCH|key values mismatch"),
        (CERT, TLS / "encrypted_key.pem", "."),
    ],
)
async def test_tls_files_that_do_not_work_are_named_with_the_reason(engine, cert, key, problem):
    with pytest.raises(ConfigError, match=problem) as failure:
        Server(engine, ServerOptions(listen="127.0.0.1:0", tls_cert=cert, tls_key=key))
    assert str(failure.value).startswith(f"{cert} and {key} do not work for TLS: ")


async def test_a_taken_port_is_a_clear_error_and_not_a_second_server(engine, server):
    with pytest.raises(ConfigError) as failure:
        Server(engine, ServerOptions(listen=server.address))
    assert str(failure.value) == (
        f"cannot listen on {server.address}: the port is taken or the address is not this machine's; "
        "choose another with --listen (port 0 = any free one)"
    )


async def test_tls_and_a_token_protect_a_conversation(engine, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text("alice " + "a" * 16)
    async with running(engine, token_file=tokens, tls_cert=CERT, tls_key=KEY) as server:
        async with ContinuoClient(server.address, token="a" * 16, tls=CERT) as client:
            chat = await client.open()
            assert (await chat.say("Hi")).text == "You said: Hi"
        async with ContinuoClient(server.address, token="a" * 16, retry=False) as plain:
            with pytest.raises(Unavailable):
                await plain.open()


async def test_an_exposed_server_without_tokens_has_no_admin(engine):
    async with running(engine, listen="0.0.0.0:0", insecure=True) as server:
        port = server.address.rpartition(":")[2]
        async with ContinuoClient(f"127.0.0.1:{port}") as client:
            with pytest.raises(PermissionDenied, match="Drain needs an admin token; local has none"):
                await client.drain()


@pytest.mark.parametrize("service", ["", *SERVICES])
async def test_health_follows_the_server_from_serving_to_drained(engine, server, service):
    async with grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
        assert (await watch.read()).status == SERVING
        run = asyncio.create_task(server.run())
        server.begin_drain()
        assert (await watch.read()).status == NOT_SERVING
        assert await run == 0


async def test_a_failed_engine_turns_health_off_and_the_exit_code_to_one(engine, server, caplog):
    async with grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        run = asyncio.create_task(server.run())
        engine.failure.set_result(EngineStopped("no step has ended for 60 s"))
        assert (await watch.read()).status == NOT_SERVING
        assert await run == 1
    assert "the engine has failed; the server ends" in caplog.text
    assert "no step has ended for 60 s" in caplog.text


class Served:
    """`serve` in a task, with the address that it announced."""

    def __init__(self, engine, **options):
        self.address = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(
            serve(engine, ServerOptions(**{"listen": "127.0.0.1:0", **options}), self.address.set_result)
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_drains_running_turns_and_exits_with_zero(engine, number):
    served = Served(engine)
    async with ContinuoClient(await served.address, retry=False) as client:
        chat = await client.open()
        engine.hold(3)
        answer = asyncio.ensure_future(chat.say("Hi"))
        await engine.holding.wait()
        os.kill(os.getpid(), number)
        await eventually(lambda: engine.draining)
        with pytest.raises(Unavailable, match="the server is shutting down; reconnect and resume") as failure:
            await client.open()
        assert failure.value.retry_after_s == 2.0
        assert not served.task.done()
        engine.release()
        assert (await answer).text == "You said: Hi"
        assert await served.task == 0


async def test_a_second_signal_ends_without_waiting(engine):
    served = Served(engine, drain_grace_s=600)
    async with ContinuoClient(await served.address, retry=False) as client:
        chat = await client.open()
        engine.hold(3)
        answer = asyncio.ensure_future(chat.say("Hi"))
        await engine.holding.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await eventually(lambda: engine.draining)
        os.kill(os.getpid(), signal.SIGINT)
        assert await asyncio.wait_for(served.task, 5) == 1
        with pytest.raises(Unavailable):
            await answer


async def test_after_the_grace_a_running_turn_is_cut_and_kept(engine):
    served = Served(engine, drain_grace_s=0.2)
    async with ContinuoClient(await served.address, retry=False) as client:
        chat = await client.open()
        engine.hold(3)
        answer = asyncio.ensure_future(chat.say("Hi"))
        await engine.holding.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await answer).text == "You"
        assert await served.task == 0


async def test_signals_are_given_back_when_serve_has_ended(engine):
    before = signal.getsignal(signal.SIGTERM)
    served = Served(engine)
    await served.address
    os.kill(os.getpid(), signal.SIGTERM)
    assert await served.task == 0
    assert signal.getsignal(signal.SIGTERM) == before


async def test_the_port_is_free_again_after_serve(engine):
    served = Served(engine)
    address = await served.address
    os.kill(os.getpid(), signal.SIGTERM)
    await served.task
    async with FakeEngine() as other, running(other, listen=address) as again:
        assert again.address == address


@pytest.mark.heavy
async def test_a_client_that_pings_every_ten_seconds_survives_a_silent_prefill(engine, server):
    options = [("grpc.keepalive_time_ms", 10_000), ("grpc.http2.max_pings_without_data", 0)]
    async with ContinuoClient(server.address, retry=False) as client:
        client._channel = grpc.aio.insecure_channel(server.address, options)
        chat = await client.open()
        engine.hold(0)
        answer = asyncio.ensure_future(chat.say("Hi"))
        await asyncio.sleep(75)
        engine.release()
        assert (await answer).text == "You said: Hi"
