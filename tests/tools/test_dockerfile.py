"""The image without Docker: every command of the Dockerfile is run here, in a temporary prefix.

What would download is run with a stand-in for pip; what needs root is read only.
"""

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from kernels.native.build import INSTRUCTION_SETS, cpu_flags
from rpc.client import ContinuoClient, Unauthenticated
from tests.tools.conftest import ROOT
from tools import image_entry

STATE = "/var/lib"


class Instruction(NamedTuple):
    word: str
    text: str


def stages() -> list[list[Instruction]]:
    """The instructions of each stage; lines that go on are joined as Docker joins them."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n", "", "\n".join(lines))
    found: list[list[Instruction]] = []
    for line in filter(None, text.splitlines()):
        instruction = Instruction(*line.split(maxsplit=1))
        if instruction.word == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def texts(stage: list[Instruction], word: str) -> list[str]:
    return [instruction.text for instruction in stage if instruction.word == word]


def run_with(word: str) -> str:
    """The one RUN that contains `word`."""
    (text,) = [text for stage in stages() for text in texts(stage, "RUN") if word in text]
    return text


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-ec", command],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder of stand-ins: pip and apt-get say their arguments, python is this one."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in ("pip", "apt-get"):
        (folder / name).write_text('#!/bin/sh\nprintf "%s\\n" "$*"\n')
        (folder / name).chmod(0o755)
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    return folder


def test_the_image_that_is_left_is_slim_has_no_compiler_and_runs_as_nobody_special():
    build, image = stages()
    assert [texts(stage, "FROM")[0].split()[0] for stage in (build, image)] == ["python:3.11-slim"] * 2
    _, *always = texts(image, "RUN")
    assert not re.search(r"gcc|apt|pip install", " ".join(always))
    (user,) = texts(image, "USER")
    assert user in run_with("useradd").split() and user != "root"
    assert texts(image, "VOLUME") == [f"{STATE}/continuo"]
    kept = re.findall(r"(HF_HOME|TRITON_CACHE_DIR)=(\S+)", texts(image, "ENV")[0])
    assert len(kept) == 2 and all(folder.startswith(f"{STATE}/continuo/") for _, folder in kept)
    assert f"XDG_STATE_HOME={STATE} " in texts(image, "ENV")[0]


def test_both_stages_have_the_environment_in_one_place():
    """Kernels are found by the path of the OpenMP runtime that they were built with."""
    build, image = stages()
    (copied,) = texts(image, "COPY")
    assert copied == "--from=build /opt/continuo /opt/continuo"
    assert "python -m venv /opt/continuo" in texts(build, "RUN")
    assert all("PATH=/opt/continuo/bin:$PATH" in texts(stage, "ENV")[0] for stage in (build, image))


@pytest.mark.parametrize(
    ("device", "source"),
    [("cpu", " --no-deps --index-url https://download.pytorch.org/whl/cpu"), ("cuda", "")],
)
def test_torch_is_the_pinned_one_in_the_build_that_was_asked_for(commands, device, source):
    done = shell(run_with("--no-deps"), ROOT, PATH=f"{commands}:{os.environ['PATH']}", DEVICE=device)
    pin = next(
        line for line in (ROOT / "tools/constraints.txt").read_text().splitlines() if "torch==" in line
    )
    assert done.stdout == f"install -c tools/constraints.txt{source} {pin}\n"


@pytest.mark.parametrize(
    ("device", "called"),
    [("cpu", ""), ("cuda", "update\ninstall -y --no-install-recommends gcc libc6-dev\n")],
)
def test_only_the_image_for_gpus_has_the_compiler_that_triton_needs(commands, device, called):
    to_image = texts(stages()[-1], "RUN")[0]
    done = shell(to_image, ROOT, PATH=f"{commands}:{os.environ['PATH']}", DEVICE=device)
    assert (done.returncode, done.stdout) == (0, called)


def test_an_unknown_device_ends_the_build(commands):
    done = shell(run_with("--no-deps"), ROOT, PATH=f"{commands}:{os.environ['PATH']}", DEVICE="abacus")
    assert (done.returncode, done.stderr) == (2, "DEVICE is abacus; it must be cpu or cuda\n")


def test_packages_are_installed_as_tested(commands):
    done = shell(run_with(".[server]"), ROOT, PATH=f"{commands}:{os.environ['PATH']}")
    assert done.stdout == "install -c tools/constraints.txt .[server]\n"


def test_what_the_build_copies_is_what_is_installed():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(kept) == sorted(
        ["LICENSE", "README.md", "engine", "kernels", "pyproject.toml", "rpc", "tools"]
    )
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.skipif(
    not cpu_flags() or shutil.which("gcc") is None, reason="kernels need gcc and x86-64 Linux"
)
def test_kernels_of_every_instruction_set_are_built_and_found_without_a_compiler(commands, tmp_path):
    ignored = shutil.ignore_patterns("_build", "__pycache__")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignored)
    built = shell(run_with("INSTRUCTION_SETS"), tmp_path, PATH=f"{commands}:{os.environ['PATH']}")
    assert built.returncode == 0, built.stderr
    folder = tmp_path / "kernels/native/_build"
    names = {path.name.rpartition("-")[0] for path in folder.iterdir()}
    assert names == {isa.name for isa in INSTRUCTION_SETS}
    assert all(path.stat().st_mode & stat.S_IROTH for path in (folder, *folder.iterdir()))

    choose = "from kernels import dispatch; dispatch.library(); print(dispatch.describe())"
    chosen = subprocess.run(
        [sys.executable, "-c", choose], cwd=tmp_path, env={"PATH": "/nowhere"}, capture_output=True, text=True
    )
    assert chosen.stdout.startswith("native "), chosen.stdout + chosen.stderr


def test_a_token_is_made_once_for_its_owner_alone_and_is_never_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first = image_entry.serve_arguments(["org/name"])
    folder = tmp_path / "continuo"
    tokens, token = folder / "tokens", folder / "token"
    expected = ["--listen", "0.0.0.0:50051", "--insecure", "--token-file", str(tokens), "org/name"]
    assert first == expected
    secret = token.read_text().strip()
    assert tokens.read_text() == f"local {secret} admin\n" and len(secret) == 48
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tokens, token)} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert image_entry.serve_arguments(["org/name"]) == expected and token.read_text().strip() == secret
    assert secret not in capsys.readouterr().err


def test_what_is_given_is_not_added(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    given = ["--listen=[::]:1", "--token-file", "t", "--tls-cert", "c", "--tls-key", "k"]
    assert image_entry.serve_arguments(given) == given
    for flag in ("-h", "--help"):
        assert image_entry.serve_arguments([flag]) == ["--listen", image_entry.LISTEN, "--insecure", flag]
    assert (list(tmp_path.iterdir()), capsys.readouterr().err) == ([], "")


def test_a_volume_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "continuo").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(
        SystemExit, match="error: no token can be kept: .* mount a volume that this user may write"
    ):
        image_entry.main([])


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def image_command(word: str) -> list[str]:
    """ENTRYPOINT's or HEALTHCHECK's words, with this Python in the place of the image's."""
    text = texts(stages()[-1], word)[0]
    program, *rest = json.loads(text[text.index("[") :])
    return [sys.executable, *(["-m", "tools.cli"] if program == "continuo" else []), *rest]


async def ask_without_a_token(address: str) -> None:
    async with ContinuoClient(address) as stranger:
        await stranger.model_info()


def test_the_container_starts_is_healthy_and_its_chat_line_works(talking_model, environment, tmp_path):
    environment |= {"PYTHONPATH": str(ROOT)}
    port = free_port()
    arguments = [talking_model, "--listen", f"0.0.0.0:{port}"]
    with (tmp_path / "stderr").open("w") as stderr:
        server = subprocess.Popen(
            [*image_command("ENTRYPOINT"), *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    told = tmp_path / "stderr"
    try:
        assert server.stdout.readline() == f"listening on 0.0.0.0:{port}\n", told.read_text()
        health = [*image_command("HEALTHCHECK"), "--server", f"127.0.0.1:{port}"]
        done = subprocess.run(health, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "SERVING\n")

        read, chat = re.findall(r"^  (.+)$", told.read_text(), re.MULTILINE)
        inside = re.sub(r"docker exec \S+ ", "", read)
        assert inside != read
        subprocess.run(["sh", "-ec", inside], cwd=tmp_path, check=True)
        assert stat.S_IMODE((tmp_path / "continuo.token").stat().st_mode) == 0o600
        words = shlex.split(chat)
        assert words[:2] == ["continuo", "chat"]
        said = subprocess.run(
            [sys.executable, "-m", "tools.cli", *words[1:]],
            cwd=tmp_path,
            env=environment,
            input="Hello.\n",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert said.returncode == 0 and said.stdout.strip(), said.stderr
        with pytest.raises(Unauthenticated):
            asyncio.run(ask_without_a_token(f"localhost:{port}"))
        server.terminate()
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.communicate()
    done = subprocess.run(health, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: no server answers at 127.0.0.1:{port}")
