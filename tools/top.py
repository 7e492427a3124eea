"""`continuo top`: what a server does, live in the terminal; piped, a line per interval.

A client only: neither torch nor the engine is imported.
"""

import asyncio
import shutil
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from rpc._generated import continuo_pb2 as pb
from rpc.client import ContinuoClient, ContinuoError, Unauthenticated, Unavailable
from tools.connection import UsageError, credentials, nobody_answers
from tools.top_view import line, page, since_start

ANSWER_S = 5.0
NUM_INTERVALS = 10  # that rates and times of the live view look back over
T = TypeVar("T")


class NoAnswer(Exception):
    """Nobody answers where the server should be."""


EXPECTED: tuple[type[Exception], ...] = (UsageError, NoAnswer, ContinuoError)
USAGE: tuple[type[Exception], ...] = (UsageError,)


def run(chosen: Namespace) -> int:
    try:
        asyncio.run(watch(chosen))
    except KeyboardInterrupt:  # that is how one leaves it
        pass
    return 0


async def watch(chosen: Namespace) -> None:
    """Until the first look if `once`; else until the server is gone or, on a terminal, forever."""
    is_terminal = sys.stdout.isatty()
    token, tls = credentials(chosen)
    async with ContinuoClient(chosen.server, token=token, tls=tls) as client:
        name = (await _answer(client.model_info(), chosen.server)).name
        view = Page(f"{name} at {chosen.server}") if is_terminal else Lines()
        seen: deque[pb.GetLoadResponse] = deque(maxlen=NUM_INTERVALS if is_terminal else 1)
        while True:
            try:
                now = await _answer(client.load(), chosen.server)
                if seen and now.uptime_s < seen[-1].uptime_s:
                    seen.clear()  # it was started anew
                view.show(now, seen[0] if seen else since_start(now))
                seen.append(now)
            except NoAnswer as error:
                if not (seen and is_terminal):
                    raise
                view.failed(str(error))
            if chosen.once:
                return
            await asyncio.sleep(chosen.interval)


async def _answer(asked: Awaitable[T], address: str) -> T:
    try:
        async with asyncio.timeout(ANSWER_S):
            return await asked
    except TimeoutError:
        raise NoAnswer(f"the server at {address} has not answered for {ANSWER_S:g} s") from None
    except Unavailable as error:
        raise NoAnswer(nobody_answers(error, address)) from None
    except Unauthenticated as error:
        raise UsageError(f"{error}; --token-file FILE sends the token in FILE") from None


class Lines:
    def show(self, now: pb.GetLoadResponse, before: pb.GetLoadResponse) -> None:
        print(_printable(line(now, before)), flush=True)


class Page:
    """Drawn over itself; what was shown last stays on the screen."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._height = 0
        self._rows: Sequence[str] = ()

    def show(self, now: pb.GetLoadResponse, before: pb.GetLoadResponse) -> None:
        self._rows = page(self._title, now, before)
        self._draw(self._rows)

    def failed(self, why: str) -> None:
        """Below what is known."""
        self._draw([*self._rows, "", why])

    def _draw(self, rows: Sequence[str]) -> None:
        width, height = shutil.get_terminal_size()
        rows = rows[: height - 1]  # what scrolls away cannot be drawn over
        up = f"\x1b[{self._height}F" if self._height else ""
        text = "".join(f"{_printable(row)[: width - 1]}\x1b[K\n" for row in rows)
        print(f"{up}{text}\x1b[J", end="", flush=True)
        self._height = len(rows)


def _printable(text: str) -> str:
    """A server must not drive the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
