"""The examples and the tables of rpc/README.md."""

import asyncio
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from google.protobuf import json_format, symbol_database

from rpc._generated import continuo_pb2 as pb
from rpc.status import STATUS, error_message

RPC = Path(__file__).parents[2] / "rpc"
README = (RPC / "README.md").read_text()


def block(language):
    (code,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return code


async def test_the_python_example_runs(server, capsys):
    code = block("python").replace("localhost:50051", server.address)
    names: dict = {}
    exec(compile(code.replace("asyncio.run(main())", ""), "README.md", "exec"), names)
    await names["main"]()
    shown = capsys.readouterr().out
    assert shown.startswith("You said: My cat is called Miso.FinishReason.STOP_TOKEN 0 ")
    assert "[reads 22 tokens]\n0 0.0\n" in shown
    assert "2 ['You said: My cat is called Miso.', 'You said: What is my cat called?']" in shown


async def test_the_node_example_runs(server, tmp_path):
    """CONTINUO_TEST_NODE names a folder in which `npm install @grpc/grpc-js @grpc/proto-loader` was run."""
    node, modules = shutil.which("node"), os.environ.get("CONTINUO_TEST_NODE")
    if not node or not modules:
        pytest.skip("needs node, and CONTINUO_TEST_NODE naming a folder with the two @grpc packages")
    (tmp_path / "continuo.proto").write_text((RPC / "continuo.proto").read_text())
    (tmp_path / "chat.js").write_text(block("js").replace("localhost:50051", server.address))
    environment = {"NODE_PATH": str(Path(modules) / "node_modules"), "PATH": os.environ["PATH"]}
    ran = await asyncio.create_subprocess_exec(
        node, "chat.js", cwd=tmp_path, env=environment, stdout=-1, stderr=-1
    )
    out, err = await asyncio.wait_for(ran.communicate(), 30)
    assert ran.returncode == 0 and not err, err.decode()
    first, second = out.decode().split("\n", 1)
    assert first == "You said: My cat is called Miso."
    assert second.startswith("FINISH_REASON_STOP_TOKEN {") and "promptTokens: 22" in second


def test_the_grpcurl_lines_name_methods_and_fields_that_exist():
    lines = [shlex.split(line) for line in block("sh").splitlines()]
    ours = [words for words in lines if words[-1].startswith("continuo.v1.")]
    assert len(ours) >= 4
    for words in ours:
        service, method = words[-1].removeprefix("continuo.v1.").split("/")
        described = pb.DESCRIPTOR.services_by_name[service].methods_by_name[method]
        request = symbol_database.Default().GetSymbol(described.input_type.full_name)
        sent = words[words.index("-d") + 1] if "-d" in words else "{}"
        while sent := sent.strip():
            body, end = json.JSONDecoder().raw_decode(sent)
            json_format.ParseDict(body, request())
            sent = sent[end:]


def test_the_table_of_errors_is_the_table_of_the_code():
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", README, re.MULTILINE)
    written = {(status, reason) for status, reasons in rows for reason in re.findall(r"`(\w+)`", reasons)}
    real = {(code.name, error_message(kind("")).reason) for kind, code in STATUS.items()}
    assert written == real | {("INTERNAL", "INTERNAL")}
