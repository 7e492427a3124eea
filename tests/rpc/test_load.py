"""`GetLoad`: the engine's snapshot over the wire, for admins."""

from dataclasses import asdict, fields

import pytest
from google.protobuf.json_format import MessageToDict

from engine.load import Load
from rpc import codec
from rpc._generated import continuo_pb2 as pb
from rpc.client import ContinuoClient, PermissionDenied, Unauthenticated
from tests.loads import a_load
from tests.rpc.conftest import running


def as_dict(message: pb.GetLoadResponse) -> dict:
    """With numbers as numbers: JSON writes 64-bit ones as text."""

    def numbers(value):
        if isinstance(value, dict):
            return {key: numbers(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return tuple(numbers(inner) for inner in value)
        return float(value)

    return numbers(
        MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    )


def test_the_message_holds_all_that_a_load_does_and_nothing_else() -> None:
    assert [field.name for field in fields(Load)] == [
        field.name for field in pb.GetLoadResponse.DESCRIPTOR.fields
    ]
    assert as_dict(codec.load(a_load())) == asdict(a_load())


async def test_the_client_reads_what_the_engine_counts(client) -> None:
    assert as_dict(await client.load()) == asdict(a_load())


async def test_only_an_admin_sees_everybodys_load(engine, tmp_path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {'a' * 16}\nroot {'r' * 16} admin\n")
    tokens.chmod(0o600)
    async with running(engine, token_file=tokens) as server:
        async with ContinuoClient(server.address, token="a" * 16) as alice:
            with pytest.raises(PermissionDenied, match="GetLoad needs an admin token; alice has none"):
                await alice.load()
        async with ContinuoClient(server.address) as nobody:
            with pytest.raises(Unauthenticated):
                await nobody.load()
        async with ContinuoClient(server.address, token="r" * 16) as root:
            assert (await root.load()).steps == 400
