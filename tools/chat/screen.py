"""Where a chat happens: a terminal with a prompt and a status line, or a pipe: lines in, replies out."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rpc.client import Delta, ReplyKind, Turn
from tools.chat.line_editor import LineEditor
from tools.chat.wording import status_line

DIM, RED = "2", "31"  # parameters of the terminal's "select graphic rendition"
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A reply must not drive the terminal."""


class Screen(Protocol):
    is_interactive: bool

    async def read(self) -> str | None:
        """What the user says next; None when there is nothing more."""
        ...

    def suggest(self, text: str) -> None:
        """What the user may want to say next, to be edited."""
        ...

    def reply(self, delta: Delta) -> None: ...

    def turn_ended(self, turn: Turn) -> None: ...

    def suspended(self) -> None:
        """The reply waits for memory and goes on by itself."""
        ...

    def reconnecting(self) -> None:
        """The server is not there, and is tried again."""
        ...

    def note(self, text: str) -> None:
        """Something that is nice to know."""
        ...

    def failed(self, text: str) -> None: ...

    def farewell(self, text: str) -> None: ...


class Pipe:
    """Lines in, replies out, and nothing else on stdout."""

    is_interactive = False

    async def read(self) -> str | None:
        with _interruptible():
            while line := sys.stdin.readline():
                if line.strip():
                    return line.rstrip("\n")
            return None

    def suggest(self, text: str) -> None: ...

    def reply(self, delta: Delta) -> None:
        text = delta.text.translate(_CONTROLS) if sys.stdout.isatty() else delta.text
        print("\n" * delta.restarted + text, end="", flush=True)

    def turn_ended(self, turn: Turn) -> None:
        print(flush=True)

    def suspended(self) -> None: ...

    def reconnecting(self) -> None: ...

    def note(self, text: str) -> None: ...

    def failed(self, text: str) -> None: ...

    def farewell(self, text: str) -> None:
        print(text, file=sys.stderr)


class Terminal:
    """A prompt, replies as they come, and below each what it cost."""

    is_interactive = True

    def __init__(self, editor: LineEditor, *, colours: bool) -> None:
        self._editor = editor
        self._colours = colours
        self._suggestion = ""
        self._is_lost = False
        self._at_margin = True

    async def read(self) -> str | None:
        suggestion, self._suggestion, self._at_margin = self._suggestion, "", True
        while True:
            try:
                with _interruptible():
                    return self._editor.read(suggestion)
            except KeyboardInterrupt:  # clears the line
                suggestion = ""
                print()
            except EOFError:
                print()
                return None

    def suggest(self, text: str) -> None:
        self._suggestion = text

    def reply(self, delta: Delta) -> None:
        self._is_lost = False
        if delta.restarted:
            self.note("the reply begins again:")
        self._write(delta.text, DIM if delta.kind is ReplyKind.REASONING else "")

    def turn_ended(self, turn: Turn) -> None:
        self._is_lost = False
        self._line(f"{status_line(turn)}\n", DIM)

    def suspended(self) -> None:
        self.note("others need the memory; the reply goes on by itself when there is room (Ctrl-C ends it)")

    def reconnecting(self) -> None:
        if not self._is_lost:
            self.note("the connection is lost; trying to get it back ... (Ctrl-C gives up)")
        self._is_lost = True

    def note(self, text: str) -> None:
        self._line(text, DIM)

    def failed(self, text: str) -> None:
        self._is_lost = False
        self._line(f"{text}\n", RED)

    def farewell(self, text: str) -> None:
        self.note(text)

    def _line(self, text: str, style: str) -> None:
        self._write(f"{'' if self._at_margin else chr(10)}{text}\n", style)

    def _write(self, text: str, style: str) -> None:
        text = text.translate(_CONTROLS)
        self._at_margin = text.endswith("\n") if text else self._at_margin
        print(f"\x1b[{style}m{text}\x1b[0m" if style and text and self._colours else text, end="", flush=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Waits for input block the loop, as nothing else has to happen meanwhile; Ctrl-C must end them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
