"""continuo.proto: it only grows, it stands alone, and what is committed was made from it."""

import filecmp
import os
import re
import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from rpc._generated import continuo_pb2 as pb
from tests.rpc.surface import SNAPSHOT, surface

ROOT = Path(__file__).parents[2]
PROTO = (ROOT / "rpc/continuo.proto").read_text()
PIN = re.search(r"^grpcio-tools==(\S+)$", (ROOT / "tools/constraints.txt").read_text(), re.MULTILINE)


def test_nothing_that_clients_rely_on_is_removed_renamed_or_renumbered():
    known = SNAPSHOT.read_text().splitlines()
    assert len(known) > 200 and "field continuo.v1.Turn.turn_id = 1 string" in known
    missing = set(known) - set(surface())
    assert not missing, "version 1 only grows: bring these back"


def test_everything_new_is_recorded():
    new = set(surface()) - set(SNAPSHOT.read_text().splitlines())
    assert not new, "record what is new: python -m tests.rpc.surface"


def test_the_file_imports_nothing_so_that_any_client_can_compile_it_as_it_stands():
    assert not pb.DESCRIPTOR.dependencies


def test_generated_code_is_what_the_pinned_compiler_makes_of_the_proto(tmp_path):
    assert PIN, "tools/constraints.txt pins no grpcio-tools"
    if not (ROOT / f".venv/protoc/grpcio_tools-{PIN[1]}.dist-info").exists():
        pytest.skip(f"grpcio-tools {PIN[1]} is not in .venv/protoc; run ./tools/setup.sh --dev")
    environment = {"PATH": os.environ["PATH"]}
    subprocess.run([ROOT / "tools/generate_proto.sh", tmp_path], check=True, env=environment)
    names = {path.name for path in (tmp_path / "rpc/_generated").iterdir()}
    assert names == {"continuo_pb2.py", "continuo_pb2.pyi", "continuo_pb2_grpc.py"}
    _, differing, unreadable = filecmp.cmpfiles(
        tmp_path / "rpc/_generated", ROOT / "rpc/_generated", names, shallow=False
    )
    assert not differing and not unreadable, "run tools/generate_proto.sh and commit what it makes"


def test_generated_code_and_proto_agree_even_without_the_compiler():
    """Every name and number of the committed descriptor stands in the proto's text."""
    described = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(described)
    text = re.sub(r"//.*", "", PROTO)
    for message in described.message_type:
        body = re.search(rf"^message {message.name} \{{(?:\}}|(.*?)^\}})", text, re.DOTALL | re.MULTILINE)
        assert body, message.name
        fields = dict(re.findall(r"(\w+) = (\d+);", body[1] or ""))
        assert fields == {field.name: str(field.number) for field in message.field}, message.name
    methods = {method.name for service in described.service for method in service.method}
    assert methods == set(re.findall(r"rpc (\w+)\(", text))
