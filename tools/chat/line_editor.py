"""Messages typed at a terminal: several lines as one message, edited and remembered by the system's readline.

A terminal marks a paste for GNU readline, so its lines come as one message.  Where that is missing (libedit,
old terminals), lines that are there at once belong together, unless they were typed during a reply.
"""

import json
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

PROMPT, MORE = "› ", "… "
NUM_REMEMBERED = 1000
Complete = Callable[[str], Sequence[str]]


class LineEditor:
    """Reads messages from stdin.  `history` is where they are remembered for the next time; None: nowhere.

    With `plain`, the terminal can neither move its cursor nor mark a paste: nothing is edited or remembered.
    """

    def __init__(self, history: Path | None, complete: Complete, plain: bool) -> None:
        self._readline = None if plain else _readline()
        self._history = history
        if self._readline is not None:
            _set_up(self._readline, complete)
            for message in _recall(history):
                self._readline.add_history(message)

    def read(self, suggestion: str = "") -> str:
        """One message; `suggestion` stands on the line to begin with.  Raises EOFError when there is none."""
        typed_ahead = _is_waiting()
        text = self._line(PROMPT, suggestion)
        while text.endswith("\\") or (not typed_ahead and _is_waiting()):
            try:
                text = text.removesuffix("\\") + "\n" + self._line(MORE)
            except EOFError:
                break
        text = text.strip("\n")
        self._remember(text)
        return text

    def _line(self, prompt: str, suggestion: str = "") -> str:
        if self._readline is not None:
            self._readline.set_startup_hook(lambda: self._readline.insert_text(suggestion))
        return input(prompt)

    def _remember(self, text: str) -> None:
        if self._readline is None or not text.strip():
            return
        self._readline.add_history(text)
        if self._history is not None:
            with suppress(OSError):  # a full disk is no reason to end a chat
                _append(self._history, text)


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # some builds of Python leave it out
        return None
    return readline


def _set_up(readline: ModuleType, complete: Complete) -> None:
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    if not is_libedit:
        readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_auto_history(False)  # a message may have several lines
    readline.set_completer_delims("")

    def nth(text: str, state: int) -> str | None:
        offered = complete(text)
        return offered[state] if state < len(offered) else None

    readline.set_completer(nth)


def _is_waiting() -> bool:
    """Whether something was typed or pasted that nobody has read yet."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _recall(history: Path | None) -> list[str]:
    """The messages of the file, one JSON string per line; when they have become many, the last ones stay."""
    messages: list[str] = []
    try:
        lines = history.read_text(errors="replace").splitlines() if history else []
    except OSError:  # none yet
        lines = []
    for line in lines:
        with suppress(ValueError):  # cut off by a full disk
            messages.append(str(json.loads(line)))
    if history is not None and len(lines) > 2 * NUM_REMEMBERED:
        messages = messages[-NUM_REMEMBERED:]
        with suppress(OSError):
            shorter = history.with_suffix(".new")
            shorter.unlink(missing_ok=True)
            _append(shorter, *messages)
            shorter.replace(history)
    return messages


def _append(history: Path, *messages: str) -> None:
    history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
        file.writelines(json.dumps(message) + "\n" for message in messages)
