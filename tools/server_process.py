"""A server in a process of its own, for what needs one beside it: `continuo chat MODEL`, the demo, tests."""

import asyncio
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import IO, Self

ROOT = Path(__file__).resolve().parents[1]


class ServerFailed(Exception):
    """A server ended instead of serving; says why."""


class ServerProcess:
    """`continuo serve` as a child process that ends with this one, however this one ends.

    Made by `start`; leaving its `async with` closes it.  Paths among the arguments are absolute.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes]) -> None:
        self.address = ""
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, *arguments: str) -> Self:
        """Returns once it listens, on `address`.  Raises ServerFailed with the server's own last words."""
        log = tempfile.TemporaryFile()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tools.cli", "serve", "--until-eof", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C at the terminal is not meant for it
        )
        server = cls(process, log)
        try:
            await server._wait_until_ready()
        except BaseException:
            await server.kill()
            log.close()
            raise
        return server

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def close(self) -> None:
        """Drains it, unless it has ended already."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        self._log.close()

    async def kill(self) -> None:
        """kill -9."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    def check(self) -> None:
        """Raises ServerFailed with its last words if it has ended."""
        if self._process.returncode is not None:
            raise ServerFailed(f"the server has ended: {self._last_words(self._process.returncode)}")

    async def _wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode()
        if not line.startswith("listening on "):
            code = await self._process.wait()
            raise ServerFailed(f"the server did not start: {self._last_words(code)}")
        self.address = line.removeprefix("listening on ").strip()

    def _last_words(self, code: int) -> str:
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").splitlines()
        return (
            said[-1].removeprefix("error: ") if said else f"it ended with exit code {code} and said nothing"
        )
