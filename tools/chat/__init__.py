"""`continuo chat`: a conversation in the terminal, with a server that is there or with one started for it.

`talk` holds the conversation, `commands` is what begins with a slash, `screen` is a terminal or a pipe,
`line_editor` the keyboard, `wording` the sentences.  With a server that is there it needs what the client
needs and no more: neither torch nor the engine, so that it runs where only the client is installed.
"""

import asyncio
import io
import os
import random
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from rpc.client import Aborted, ContinuoClient, ContinuoError, OutOfRange, Unauthenticated, Unavailable
from tools.chat.commands import complete, parse, perform
from tools.chat.line_editor import LineEditor
from tools.chat.screen import Pipe, Screen, Terminal
from tools.chat.talk import Mistake, Talk
from tools.connection import UsageError, credentials, nobody_answers
from tools.server_process import ServerFailed, ServerProcess


class NoServer(Exception):
    """Nobody listens where the server should be, or none can be started."""


EXPECTED: tuple[type[Exception], ...] = (UsageError, NoServer, ServerFailed, ContinuoError)
USAGE: tuple[type[Exception], ...] = (UsageError,)


def run(chosen: Namespace) -> int:
    token, tls = credentials(chosen)
    if isinstance(chosen.model, str):
        folder = _fetched(chosen.model, chosen.revision, chosen.offline)
    else:
        folder = chosen.model and chosen.model.resolve()
    return asyncio.run(_run(chosen, folder, _screen(chosen.data_dir), token, tls))


def _fetched(hub_id: str, revision: str | None, offline: bool) -> Path:
    """The folder of a model from the hub; its download is shown here, not hidden in the server's log."""
    from engine.errors import EngineError
    from tools import logs
    from tools.hub import HubError, resolve_model

    logs.configure("info" if sys.stderr.isatty() else "warning", as_json=False)
    try:
        return resolve_model(hub_id, revision, offline)
    except (EngineError, HubError) as error:
        raise NoServer(str(error)) from None


def _screen(data_dir: Path | None) -> Screen:
    for stream in (sys.stdin, sys.stdout):  # what is no text in the user's encoding must not end the chat
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Pipe()
    plain = os.environ.get("TERM", "") in ("", "dumb")
    history = data_dir / "chat_history" if data_dir else None
    return Terminal(
        LineEditor(history, complete, plain), colours=not plain and not os.environ.get("NO_COLOR", "")
    )


async def _run(
    chosen: Namespace, folder: Path | None, screen: Screen, token: str | None, tls: Path | bool
) -> int:
    """`folder`: of the model for a server of one's own."""
    address, server = chosen.server, None

    def jitter() -> float:
        """Called before each attempt to get a lost connection back: the moment to say so."""
        if server is not None:
            server.check()  # nobody would start it again
        screen.reconnecting()
        return random.random()

    async with AsyncExitStack() as stack:
        if folder is not None:
            screen.note(f"starting a server for {chosen.model} ...")
            arguments = (str(folder), "--listen", "127.0.0.1:0", "--data-dir", str(chosen.data_dir or "none"))
            server = await ServerProcess.start(*arguments)
            await stack.enter_async_context(server)
            address = server.address
        client = ContinuoClient(address, token=token, tls=tls, jitter=jitter)
        await stack.enter_async_context(client)
        talk = Talk(client, screen, chosen.system)
        await _greet(client, screen, address)
        if chosen.conversation is not None:
            await talk.resume(chosen.conversation)
        try:
            await converse(talk)
        except Unavailable as error:
            raise NoServer(nobody_answers(error, address)) from None
        finally:
            if talk.is_kept and not (chosen.model is not None and chosen.data_dir is None):
                screen.farewell(f"To go on: {_command(chosen, talk.id)}")
    return 0


async def _greet(client: ContinuoClient, screen: Screen, address: str) -> None:
    try:
        info = await client.model_info()
    except Unavailable as error:
        start = "start one with 'continuo serve', or talk to one of your own with 'continuo chat MODEL'"
        raise NoServer(nobody_answers(error, address, start)) from None
    except Unauthenticated as error:
        raise UsageError(f"{error}; --token-file FILE sends the token in FILE") from None
    screen.note(
        f"{info.name}, context of {info.limits.context_tokens:,} tokens.  /help says what can be done."
    )


async def converse(talk: Talk) -> None:
    """Until the user ends it; piped, also at the first error."""
    while not talk.has_ended and (text := await talk.screen.read()) is not None:
        if not talk.screen.is_interactive:
            await talk.say(text)
        elif text.strip():
            await _answer_interactively(talk, text)


async def _answer_interactively(talk: Talk, text: str) -> None:
    """The first Ctrl-C ends what is being done, a second one the program."""
    command = parse(text)
    doing = asyncio.create_task(perform(talk, *command) if command else talk.say(text))
    interrupting: asyncio.Task[None] | None = None

    def interrupt() -> None:
        nonlocal interrupting
        if interrupting is not None:
            raise KeyboardInterrupt
        interrupting = asyncio.create_task(talk.interrupt(doing))

    with _on_ctrl_c(interrupt):
        await asyncio.wait([doing])
    if interrupting is not None:
        await interrupting
    try:
        await doing
    except (ContinuoError, Mistake) as error:
        talk.screen.failed(_with_advice(error))
    except asyncio.CancelledError:
        talk.screen.failed("interrupted")


def _with_advice(error: Exception) -> str:
    """What happened, and what to do about it in a chat."""
    match error:
        case Unavailable():
            why = "" if "Connection refused" in str(error) else f" ({error})"
            return f"the server does not answer{why}; say it again when it is back"
        case OutOfRange():
            return f"{error} (/rewind makes room, /new begins anew)"
        case Aborted():
            return f"{error}; saying it again takes it back"
    return str(error)


@contextmanager
def _on_ctrl_c(act: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, act)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)


def _command(chosen: Namespace, id: str) -> str:
    """The command that resumes this conversation, from whatever folder."""
    words = ["continuo", "chat", "--conversation", id]
    if chosen.model is not None:
        words += [chosen.model if isinstance(chosen.model, str) else str(chosen.model.resolve())]
        words += ["--revision", chosen.revision] if chosen.revision else []
        words += ["--offline"] if chosen.offline else []
        words += ["--data-dir", str(chosen.data_dir)]
    else:
        words += ["--server", chosen.server]
    for flag, value in (("--token-file", chosen.token_file), ("--tls-ca", chosen.tls_ca)):
        words += [flag, str(value.absolute())] if value else []
    return shlex.join(words)
