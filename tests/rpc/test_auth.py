"""Tokens: how the file is read, and that nothing is reachable without one."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine.errors import ConfigError
from rpc.auth import Authenticator, read_token_file
from rpc.client import ContinuoClient, NotFound, PermissionDenied, Unauthenticated
from tests.rpc.conftest import running
from tests.rpc.fakes import FakeEngine

ALICE, BOB, OPS = "a" * 16, "b" * 24, "o" * 32
FILE = f"# who may call\nalice {ALICE}\n\nbob {BOB}  # the other one\nops {OPS} admin\n"


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens"
    path.touch(0o600)
    path.write_text(FILE)
    return path


@pytest.fixture
async def guarded(token_file):
    async with FakeEngine() as engine, running(engine, token_file=token_file) as server:
        yield server, engine


def bearer(token):
    return [("authorization", f"Bearer {token}")]


def test_every_line_of_the_file_names_a_tenant(token_file):
    who = Authenticator.of_file(token_file)
    assert [(p.tenant, p.admin) for p in map(who.principal, map(bearer, (ALICE, BOB, OPS)))] == [
        ("alice", False),
        ("bob", False),
        ("ops", True),
    ]


def test_a_hash_inside_a_token_begins_no_comment(token_file):
    token_file.write_text(f"alice {ALICE}#1 # a comment\n")
    assert Authenticator.of_file(token_file).principal(bearer(f"{ALICE}#1")).tenant == "alice"


def test_a_tenant_may_have_two_tokens_to_change_from_one_to_the_other(token_file):
    token_file.write_text(f"alice {ALICE}\nalice {BOB}\n")
    who = Authenticator.of_file(token_file)
    assert who.principal(bearer(ALICE)).tenant == who.principal(bearer(BOB)).tenant == "alice"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("alice\n", "line 1: a line is 'tenant token' or 'tenant token admin'"),
        (f"\nalice {ALICE} root\n", "line 2: a line is 'tenant token' or 'tenant token admin'"),
        (f"alice {ALICE} admin now\n", "line 1: a line is 'tenant token' or 'tenant token admin'"),
        ("alice short\n", "line 1: the token has 5 characters; use at least 16"),
        (f"alice {ALICE}\n#\nbob {ALICE}\n", "line 3: this token stands in line 1 already; make another"),
        (
            f"al/ice {ALICE}\n",
            "line 1: a tenant's name is 1 to 64 letters, digits, dots, dashes or underscores",
        ),
        ("# nobody yet\n", "holds no token; add a line 'tenant token'"),
    ],
)
def test_a_wrong_file_is_refused_naming_the_line_and_never_the_token(token_file, content, message):
    token_file.write_text(content)
    with pytest.raises(ConfigError) as failure:
        read_token_file(token_file)
    assert message in str(failure.value) and str(token_file) in str(failure.value)
    assert "short" not in str(failure.value) and ALICE not in str(failure.value)


def test_a_file_that_everybody_may_open_is_refused(token_file):
    token_file.chmod(0o644)
    with pytest.raises(
        ConfigError, match="everybody on this machine may open the token file; run: chmod o-rwx"
    ):
        read_token_file(token_file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="the token file .*nowhere cannot be read"):
        read_token_file(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([], "no token was sent; add the metadata 'authorization: Bearer TOKEN'"),
        (bearer("c" * 16), "the bearer token is not one of this server's tokens"),
        (bearer(ALICE + "x"), "the bearer token is not one of this server's tokens"),
        (bearer(""), "the bearer token is not one of this server's tokens"),
        ([("authorization", f"Basic {ALICE}")], "the bearer token is not one of this server's tokens"),
    ],
)
@pytest.mark.parametrize(
    "method",
    [
        "continuo.v1.Conversations/Converse",
        "continuo.v1.Conversations/Get",
        "continuo.v1.Conversations/List",
        "continuo.v1.Conversations/Delete",
        "continuo.v1.Engine/Generate",
        "continuo.v1.Engine/Tokenize",
        "continuo.v1.Engine/Detokenize",
        "continuo.v1.Engine/GetModelInfo",
        "continuo.v1.Engine/Drain",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "some.other.Service/Method",
    ],
)
async def test_nothing_answers_a_caller_without_a_right_token(guarded, method, metadata, message):
    server, engine = guarded
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_stream(f"/{method}")(metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
    assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert failure.value.details() == message
    assert engine.seen == []


async def test_unary_calls_hear_the_refusal_too(guarded):
    async with ContinuoClient(guarded[0].address, token="c" * 16) as client:
        with pytest.raises(Unauthenticated, match="not one of this server's tokens"):
            await client.model_info()


async def test_whoever_opens_a_stream_with_a_wrong_token_hears_that_and_not_a_lost_connection(guarded):
    """The refusal may overtake the first write; what grpcio then says of the write hides the reason."""
    async with ContinuoClient(guarded[0].address, token="c" * 16) as client:
        for _ in range(50):
            with pytest.raises(Unauthenticated, match="not one of this server's tokens"):
                await client.open()
        with pytest.raises(Unauthenticated):
            await client.resume("c-1")


async def test_health_needs_no_token(guarded):
    async with grpc.aio.insecure_channel(guarded[0].address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_answers_whoever_has_a_token(guarded):
    async with grpc.aio.insecure_channel(guarded[0].address) as channel:
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([asked]), metadata=bearer(ALICE)
        )
        answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {"continuo.v1.Conversations", "continuo.v1.Engine", "grpc.health.v1.Health"}


async def test_tenants_do_not_see_one_another_and_a_foreign_id_looks_unknown(guarded):
    server, engine = guarded
    async with (
        ContinuoClient(server.address, token=ALICE) as alice,
        ContinuoClient(server.address, token=BOB) as bob,
    ):
        chat = await alice.open()
        assert engine.tenants == ["alice"]
        texts = []
        for id in (chat.id, "c-404"):
            for call in (bob.get, bob.delete, bob.resume):
                with pytest.raises(NotFound) as failure:
                    await call(id)
                texts.append(str(failure.value).replace(id, "ID"))
        assert len(set(texts)) == 1
        assert [c async for c in bob.list()] == []
        assert [c.conversation_id async for c in alice.list()] == [chat.id]


async def test_drain_needs_an_admin(guarded):
    server, engine = guarded
    async with ContinuoClient(server.address, token=ALICE) as client:
        with pytest.raises(PermissionDenied, match="Drain needs an admin token; alice has none"):
            await client.drain()
    async with ContinuoClient(server.address, token=OPS) as client:
        await client.drain(grace_s=1.5)
    assert await server.run() == 0
    assert engine.seen == [("drain", 1.5)]


async def test_no_token_is_ever_logged(guarded, caplog):
    caplog.set_level("DEBUG")
    for token in (OPS, "wrong" * 5):
        async with ContinuoClient(guarded[0].address, token=token) as client:
            try:
                await client.open()
            except Unauthenticated:
                pass
    assert OPS not in caplog.text and "wrong" not in caplog.text


def test_the_message_for_a_wrong_token_does_not_repeat_it(token_file):
    with pytest.raises(Exception, match="bearer") as failure:
        Authenticator.of_file(token_file).principal(bearer("secret-but-wrong"))
    assert "secret" not in str(failure.value)
