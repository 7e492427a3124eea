"""What `pip install .` gives a client, and what it gives a server: the wheel, looked into and used."""

import re
import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.tools.conftest import ROOT
from tests.tools.talking_models import REPLY

CLIENT_PACKAGES = {"continuo", "grpcio", "protobuf", "typing_extensions"}
CLIENT_ONLY = """
import sys
from importlib.abc import MetaPathFinder

class OnlyTheClient(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        here = {"rpc", "tools", "engine", "kernels", "grpc", "google", "typing_extensions"}
        if root not in here | sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {root!r}", name=root)

sys.meta_path.insert(0, OnlyTheClient())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build leaves its own folders beside the sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns("_build", "__pycache__")
    for folder in ("engine", "kernels", "rpc", "tools"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(built), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    ZipFile(wheel).extractall(folder)
    return folder


def continuo(installed: Path, *arguments: str, input: str = "") -> subprocess.CompletedProcess[str]:
    """`continuo` where nothing but the wheel and the base dependencies can be imported."""
    code = (
        f"{CLIENT_ONLY}\nsys.path.insert(0, {str(installed)!r})\nfrom tools import cli\nsys.exit(cli.main())"
    )
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(command, cwd=installed, input=input, capture_output=True, text=True, timeout=60)


def test_a_client_needs_grpc_and_protobuf_only(wheel):
    with ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        requires = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    base = {re.match(r"[\w.-]+", line)[0] for line in requires if "extra ==" not in line}
    assert base == {"grpcio", "protobuf"}
    assert any(
        line.startswith("torch") and "extra == 'server'" in line.replace('"', "'") for line in requires
    )


@pytest.mark.parametrize(
    "name",
    [
        "rpc/py.typed",
        "rpc/continuo.proto",
        "rpc/_generated/continuo_pb2.pyi",
        "kernels/native/attention.c",
        "kernels/native/simd.h",
        "tools/chat/__init__.py",
        "tools/image_entry.py",
        "tools/demo_model/model/config.json",
    ],
)
def test_the_wheel_holds_what_is_read_beside_the_code(wheel, name):
    if name.startswith("tools/demo_model/model/") and not (ROOT / name).exists():
        pytest.skip("this checkout has no bundled model")
    assert name in ZipFile(wheel).namelist()


def test_the_wheel_holds_no_tests_and_nothing_built(wheel):
    names = ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith("tests/") or name.endswith((".so", ".pyc"))]


def test_chat_talks_to_a_server_from_a_client_only_installation(serve, talking_model, installed):
    server = serve(talking_model)
    said = continuo(installed, "chat", "--server", server.address, input="Hello.\n")
    assert (said.returncode, said.stdout.strip()) == (0, REPLY), said.stderr


def test_serving_from_a_client_only_installation_says_what_to_install(installed):
    ended = continuo(installed, "serve", str(installed))
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: continuo serve needs the server's packages, and ")
    assert line.endswith(" is not here; install them with: pip install '.[server]'")


@pytest.mark.heavy
def test_pip_installs_a_client_that_chats_and_brings_no_torch(serve, talking_model, wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    commands, constraints = tmp_path / "venv" / "bin", str(ROOT / "tools/constraints.txt")
    pip = [str(commands / "pip"), "install", "--quiet", "--disable-pip-version-check", "-c", constraints]
    done = subprocess.run([*pip, str(wheel)], cwd=tmp_path, capture_output=True, text=True)
    if re.search("connection broken|Could not find a version", done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr

    brought = {path.name for path in (tmp_path / "venv").glob("lib/*/site-packages/*.dist-info")}
    assert {name.partition("-")[0] for name in brought} <= CLIENT_PACKAGES | {"pip", "setuptools"}
    server = serve(talking_model)
    chat = [str(commands / "continuo"), "chat", "--server", server.address]
    said = subprocess.run(chat, cwd=tmp_path, input="Hello.\n", capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout.strip()) == (0, REPLY), said.stderr
