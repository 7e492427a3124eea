"""Where a chat happens: a terminal with a prompt and a status line, or a pipe: lines in, replies out."""

import signal
import sys
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from rpc.client import Delta, FinishReason, Turn

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

HELP = "Ctrl-C cancels a reply, Alt-Enter makes a new line, /new begins anew, /quit or Ctrl-D ends."
NUM_PAST = 3  # turns shown when a conversation is resumed
_ENDINGS = {
    FinishReason.CANCELLED: "cancelled",
    FinishReason.LENGTH: "at the length limit",
    FinishReason.CONTEXT_FULL: "the context is full: /new begins anew",
    FinishReason.DEADLINE: "out of time",
}
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A reply must not drive the terminal."""


class Screen(Protocol):
    is_interactive: bool

    async def read(self) -> str | None:
        """What the user says next; None when there is nothing more."""
        ...

    def reply(self, delta: Delta) -> None: ...

    def turn_ended(self, turn: Turn) -> None: ...

    def past(self, said: str, answered: str) -> None:
        """A turn from before this chat."""
        ...

    def note(self, text: str) -> None:
        """Something that is nice to know."""
        ...

    def failed(self, text: str) -> None: ...

    def farewell(self, text: str) -> None: ...


def make_screen() -> Screen:
    return Terminal() if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()


class Pipe:
    """Lines in, replies out, and nothing else on stdout."""

    is_interactive = False

    async def read(self) -> str | None:
        # Nothing else has to happen meanwhile, and Ctrl-C must end the wait.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            while line := sys.stdin.readline():
                if line.strip():
                    return line.rstrip("\n")
            return None
        finally:
            signal.signal(signal.SIGINT, before)

    def reply(self, delta: Delta) -> None:
        print("\n" * delta.restarted + delta.text, end="", flush=True)

    def turn_ended(self, turn: Turn) -> None:
        print(flush=True)

    def past(self, said: str, answered: str) -> None: ...

    def note(self, text: str) -> None: ...

    def failed(self, text: str) -> None: ...

    def farewell(self, text: str) -> None:
        print(text, file=sys.stderr)


class Terminal:
    """A prompt, replies as they come, and below each what it cost."""

    is_interactive = True

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._session: PromptSession[str] | None = None
        self._past: list[tuple[str, str]] = []

    async def read(self) -> str | None:
        self._show_past()
        if self._session is None:
            self._session = _prompt_session()
        while True:
            try:
                return await self._session.prompt_async("› ")
            except KeyboardInterrupt:  # clears the line
                continue
            except EOFError:
                return None

    def reply(self, delta: Delta) -> None:
        if delta.restarted:
            self.note("\nthe connection was lost; the reply begins again:")
        print(delta.text.translate(_CONTROLS), end="", flush=True)

    def turn_ended(self, turn: Turn) -> None:
        self._console.print(f"\n{status_line(turn)}\n", style="dim")

    def past(self, said: str, answered: str) -> None:
        self._past.append((said, answered))

    def note(self, text: str) -> None:
        self._console.print(text, style="dim")

    def failed(self, text: str) -> None:
        self._console.print(f"{text}\n", style="red")

    def farewell(self, text: str) -> None:
        self.note(text)

    def _show_past(self) -> None:
        if len(self._past) > NUM_PAST:
            self.note(f"... {len(self._past) - NUM_PAST} earlier\n")
        for said, answered in self._past[-NUM_PAST:]:
            self.note(f"› {said}\n{answered}\n".translate(_CONTROLS))
        self._past.clear()


def status_line(turn: Turn) -> str:
    """What of the history was still there, what it cost, and what is left."""
    usage, timing = turn.usage, turn.timing
    parts = [
        f"{usage.cached_device_tokens:,} tokens reused",
        f"{usage.recomputed_tokens:,} recomputed",
        f"{usage.new_tokens:,} new",
        f"{usage.completion_tokens:,} in {timing.total_s:.1f} s, first after {1000 * timing.ttft_s:.0f} ms",
        f"{turn.context_left:,} left",
    ]
    if turn.finish_reason in _ENDINGS:
        parts.append(_ENDINGS[turn.finish_reason])
    return " · ".join(parts)


def _prompt_session() -> "PromptSession[str]":
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(key_bindings=keys)
