"""Models and servers for the tests of the command line: real processes, tiny models."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tools.talking_models import write_endless_model, write_talking_model

ROOT = Path(__file__).resolve().parents[2]
Continuo = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def talking_model(tmp_path_factory) -> Path:
    return write_talking_model(tmp_path_factory.mktemp("models") / "talking")


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("models") / "endless")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tools.cli", *map(str, arguments)]


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Of a user whose state and profiles are the test's own."""
    homes = {"XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return {**os.environ, **homes, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def continuo(environment) -> Continuo:
    """Runs `continuo ARGUMENTS` to its end."""

    def run(*arguments: object, input: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            cwd=ROOT,
            env=environment,
            input=input,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


class Server:
    """`continuo serve`, ready, on a port of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], arguments: tuple[object, ...]) -> None:
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                command("serve", "--listen", "127.0.0.1:0", *arguments),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while not self.stdout.endswith("\n"):
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.05)
        self.address = self.stdout.removeprefix("listening on ").strip()

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serve(tmp_path, environment) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*arguments: object) -> Server:
        folder = tmp_path / f"server-{len(servers)}"
        folder.mkdir()
        servers.append(Server(folder, environment, arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
