"""Programs seen from outside: on a pseudo-terminal, where keys are pressed; and by process id."""

import codecs
import os
import pty
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.tools.conftest import ROOT


class Terminal:
    def __init__(self, command: Sequence[str], environment: dict[str, str], term: str = "xterm") -> None:
        self._main, other = pty.openpty()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "TERM": term},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            preexec_fn=lambda: os.close(
                os.open(os.ttyname(other), os.O_RDWR)
            ),  # makes it the controlling terminal
        )
        os.close(other)
        self._shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def until(self, text: str) -> str:
        """What it shows next, up to `text`."""
        deadline = time.monotonic() + 60
        while text not in self._shown:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self._shown}"
            if select.select([self._main], [], [], 1)[0]:
                self._shown += self._decoder.decode(os.read(self._main, 4096))
        before, text, self._shown = self._shown.partition(text)
        return before + text

    def press(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)


def pids_of(*arguments: object) -> list[int]:
    """The processes that have all of `arguments` on their command line."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if {str(argument) for argument in arguments} <= set(_read(path).split("\0"))
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has just ended
        return ""
