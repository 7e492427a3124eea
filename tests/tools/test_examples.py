"""Every example runs, against a real server, where its runtime exists."""

import functools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format, symbol_database
from google.protobuf.message import Message

from rpc._generated import continuo_pb2 as pb
from rpc._generated import continuo_pb2_grpc as pb_grpc
from tests.tools.conftest import ROOT
from tests.tools.talking_models import REPLY

EXAMPLES = ROOT / "tools" / "examples"
TLS = ROOT / "tests" / "rpc" / "tls"
TOKEN = "0123456789abcdef0123"
LONGEST = 40  # lines that a stranger reads before copying


@pytest.fixture
def example(environment):
    """Runs an example to its end; stdout, line by line."""

    def run(command: str, *arguments: object, input: str = "", **more: str) -> list[str]:
        ran = subprocess.run(
            [command, *map(str, arguments)],
            cwd=EXAMPLES,
            env={**environment, "PYTHONPATH": str(ROOT), **more},
            input=input,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr + ran.stdout
        return ran.stdout.splitlines()

    return run


def test_every_example_is_short_and_run_here():
    here = Path(__file__).read_text()
    installed = {"node_modules", "package-lock.json", "__pycache__", ".gitignore"}
    files = [path for path in EXAMPLES.rglob("*") if path.is_file() and not installed & set(path.parts)]
    assert len(files) >= 7
    for path in files:
        assert len(path.read_text().splitlines()) <= LONGEST, path
        assert path.name in here, f"no test names {path}"


def test_chat(serve, example, talking_model):
    server = serve(talking_model)
    lines = example(sys.executable, "chat.py", server.address, input="One.\nTwo.\n")
    assert lines[0] == f"> {REPLY}" and lines[2] == f"> {REPLY}"
    first, second = (re.fullmatch(r"\[(\d+) of (\d+) tokens were .*]", lines[n]) for n in (1, 3))
    assert (int(first[1]), int(second[1])) >= (0, int(first[2]))
    assert lines[4].startswith("> c-") and lines[4].endswith("goes on with it")


def test_fork_and_rewind(serve, example, talking_model):
    server = serve(talking_model)
    lines = example(sys.executable, "fork_and_rewind.py", server.address)
    said = [line for line in lines if line.endswith(f": {REPLY}")]
    assert [line.partition(":")[0] for line in said] == [
        *("told", "asked", "told the fork alone", "asked after that", "another reply")
    ]
    reused = [int(re.search(r"(\d+) of", line)[1]) for line in lines if line.startswith("    ")]
    assert reused[0] == 0 and all(tokens > 0 for tokens in reused[1:])
    assert re.fullmatch(r"the first: c-\S+, 3 turns, \d+ tokens", lines[-2])
    assert re.fullmatch(r"its fork: c-\S+, 2 turns, \d+ tokens", lines[-1])


def test_resume_after_a_crash(example, endless_model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    source = (EXAMPLES / "resume_after_a_crash.py").read_text()
    (tmp_path / "here.py").write_text(source.replace("50077", str(port)))
    shown, end = example(sys.executable, tmp_path / "here.py", endless_model)[-2:]
    assert shown.removeprefix("[again]") == "ab" * 10
    assert re.fullmatch(r"c-\S+: 2 turns are on disk", end)


def test_token_and_tls(serve, example, talking_model, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {TOKEN}\n")
    tokens.chmod(0o600)
    server = serve(
        *(talking_model, "--token-file", tokens),
        *("--tls-cert", TLS / "cert.pem", "--tls-key", TLS / "key.pem"),
    )
    address = server.address.replace("127.0.0.1", "localhost")
    refused, reply, mine = example(sys.executable, "token_and_tls.py", address, TLS / "cert.pem", TOKEN=TOKEN)
    assert refused.startswith("without a token: no token was sent") and reply == REPLY
    assert re.fullmatch(r"c-\S+ \d+", mine)


@pytest.fixture
def node(example):
    """Runs a program of Node with the packages of package.json."""
    program, folder = shutil.which("node"), os.environ.get("CONTINUO_TEST_NODE")
    if not program or not folder:
        pytest.skip("needs node, and CONTINUO_TEST_NODE naming a folder with the packages of package.json")
    wanted = json.loads((EXAMPLES / "node" / "package.json").read_text())["dependencies"]
    modules = Path(folder) / "node_modules"
    assert all((modules / name).is_dir() for name in wanted), f"{modules} lacks some of {list(wanted)}"
    return functools.partial(example, program, NODE_PATH=str(modules))


def test_node_chat_js(serve, node, talking_model):
    lines = node("node/chat.js", serve(talking_model).address, input="One.\nTwo.\n")
    opened, first, first_reuse, second, second_reuse = lines
    assert re.fullmatch(r"c-\S+, 2048 tokens left", opened)
    assert first == second == REPLY
    assert first_reuse.startswith("[0 of") and not second_reuse.startswith("[0 of")


def test_the_lines_for_node_in_the_protocols_readme(serve, node, talking_model, tmp_path):
    """A real server's last delta has a token and no text."""
    server = serve(talking_model)
    (program,) = re.findall(r"```js\n(.*?)```", (ROOT / "rpc" / "README.md").read_text(), re.DOTALL)
    program = program.replace("localhost:50051", server.address)
    (tmp_path / "chat.js").write_text(
        program.replace("'continuo.proto'", repr(str(ROOT / "rpc" / "continuo.proto")))
    )
    reply, ending, *_ = node(tmp_path / "chat.js")
    assert (reply, ending) == (REPLY, "FINISH_REASON_STOP_TOKEN {")


def test_grpcurl_sh_runs(serve, example, talking_model):
    if not shutil.which("grpcurl"):
        pytest.skip("needs grpcurl")
    server = serve(talking_model)
    shown = "\n".join(example("sh", "grpcurl.sh", server.address))
    assert '"FINISH_REASON_APPENDED"' in shown and shown.count(f'"{REPLY}"') == 3


def calls_of_grpcurl_sh() -> Iterator[tuple[str, str, list[Message]]]:
    """Service, method and requests of each line, as the descriptors have them."""
    script = (EXAMPLES / "grpcurl.sh").read_text().replace("\\\n", " ")
    for line in script.splitlines():
        if line.startswith("call "):
            _, name, *requests = shlex.split(line)
            service, method = name.split("/")
            described = pb.DESCRIPTOR.services_by_name[service].methods_by_name[method]
            kind = symbol_database.Default().GetSymbol(described.input_type.full_name)
            assert len(requests) == 1 or described.client_streaming
            yield service, method, [json_format.Parse(request, kind()) for request in requests]


def test_the_calls_of_grpcurl_sh_do_what_they_say(serve, talking_model):
    """Each as grpcurl would make it, which sends all requests at once and then nothing more."""
    server, answers = serve(talking_model), []
    with grpc.insecure_channel(server.address) as channel:
        stubs = {name: getattr(pb_grpc, f"{name}Stub")(channel) for name in ("Conversations", "Engine")}
        for service, method, requests in calls_of_grpcurl_sh():
            call = getattr(stubs[service], method)
            answer = call(iter(requests) if method == "Converse" else requests[0], timeout=30)
            answers += answer if method in ("Converse", "Generate") else [answer]
    shown = "\n".join(map(str, answers))
    assert "error {" not in shown and "turn_failed {" not in shown
    events = [answer for answer in answers if isinstance(answer, pb.ServerEvent)]
    done = [event.turn_done for event in events if event.HasField("turn_done")]
    assert [turn.turn_id for turn in done] == ["t-1", "t-2", "t-3"]
    (got,) = (answer for answer in answers if isinstance(answer, pb.GetResponse))
    assert [turn.turn_id for turn in got.turns] == ["t-1"] and got.conversation.parent_id == "by-hand"
    assert sum(isinstance(answer, pb.DeleteResponse) for answer in answers) == 2
