"""`continuo chat`: a conversation in the terminal, with a server that is there or with one started for it.

A client only: neither torch nor the engine is imported.
"""

import asyncio
import shlex
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

from rpc.client import Aborted, Chat, ContinuoClient, ContinuoError, Unauthenticated, Unavailable
from tools.chat_screen import HELP, Screen, make_screen
from tools.server_process import ServerFailed, ServerProcess


class UsageError(Exception):
    """An argument that cannot work."""


class NoServer(Exception):
    """Nobody listens where the server should be."""


EXPECTED: tuple[type[Exception], ...] = (UsageError, NoServer, ServerFailed, ContinuoError)
USAGE: tuple[type[Exception], ...] = (UsageError,)
ENDS_THE_CHAT = (Unavailable, Aborted)


def run(chosen: Namespace) -> int:
    token, authorities = _token(chosen.token_file), _readable(chosen.tls_ca)
    return asyncio.run(_run(chosen, make_screen(), token, authorities))


async def _run(chosen: Namespace, screen: Screen, token: str | None, authorities: Path | None) -> int:
    async with AsyncExitStack() as stack:
        address = chosen.server
        if chosen.model is not None:
            screen.note(f"starting a server for {chosen.model} ...")
            data_dir = str(chosen.data_dir or "none")
            server = await ServerProcess.start(
                str(chosen.model.resolve()), "--listen", "127.0.0.1:0", "--data-dir", data_dir
            )
            address = (await stack.enter_async_context(server)).address
        client = ContinuoClient(address, token=token, tls=authorities or False)
        await stack.enter_async_context(client)
        talk = Talk(client, screen, system=chosen.system)
        try:
            info = await client.model_info()
        except Unavailable as error:
            reason = "" if "Connection refused" in str(error) else f" ({error})"
            raise NoServer(
                f"no server answers at {address}{reason}; start one with 'continuo serve', "
                "or talk to one of your own with 'continuo chat MODEL'"
            ) from None
        except Unauthenticated as error:
            raise UsageError(f"{error}; --token-file FILE sends the token in FILE") from None
        screen.note(f"{info.name}, context of {info.limits.context_tokens:,} tokens.  {HELP}")
        if chosen.conversation is not None:
            await talk.resume(chosen.conversation)
        try:
            await talk.go_on()
        finally:
            if talk.is_kept and not (chosen.model is not None and chosen.data_dir is None):
                screen.farewell(f"To go on: {_command(chosen, talk.id)}")
    return 0


class Talk:
    """What is said and answered, whatever the screen."""

    def __init__(self, client: ContinuoClient, screen: Screen, system: str | None) -> None:
        self._client, self._screen, self._system = client, screen, system
        self._chat: Chat | None = None
        self._cancelling: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self._chat.id if self._chat else ""

    @property
    def is_kept(self) -> bool:
        return self._chat is not None and self._chat.committed_turns > 0

    async def resume(self, id: str) -> None:
        self._chat = await self._client.resume(id)
        _, turns = await self._client.get(id)
        for turn in turns:
            for message in turn.messages:
                if message.role == "user":
                    self._screen.past(message.content, turn.reply)

    async def go_on(self) -> None:
        """Until the user ends it."""
        while (text := await self._screen.read()) is not None:
            match text.split() if self._screen.is_interactive else [text]:
                case []:
                    pass
                case ["/quit"]:
                    return
                case ["/new"]:
                    self._screen.note(
                        f"{self.id} is left as it is; this is a new conversation" if self.is_kept else ""
                    )
                    self._chat = None
                case [word, *_] if self._screen.is_interactive and word.startswith("/"):
                    self._screen.note(HELP)
                case _:
                    await self._say(text)

    async def _say(self, text: str) -> None:
        try:
            if self._chat is None:
                self._chat = await self._client.open(self._system)
            reply, self._cancelling = self._chat.say(text), None
            with _on_ctrl_c(self._cancel):
                async for delta in reply:
                    self._screen.reply(delta)
            self._screen.turn_ended(await reply)
        except ContinuoError as error:
            if isinstance(error, ENDS_THE_CHAT) or not self._screen.is_interactive:
                raise
            self._screen.failed(str(error))

    def _cancel(self) -> None:
        """The first Ctrl-C ends the reply, a second one the program."""
        if self._cancelling is not None:
            raise KeyboardInterrupt
        self._cancelling = asyncio.create_task(self._cancel_turn())

    async def _cancel_turn(self) -> None:
        assert self._chat is not None
        with suppress(ContinuoError):  # it has just ended by itself
            await self._chat.cancel()


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
    """The command that resumes this conversation."""
    words = ["continuo", "chat", "--conversation", id]
    if chosen.model is not None:
        words += [str(chosen.model), "--data-dir", str(chosen.data_dir)]
    else:
        words += ["--server", chosen.server]
    for flag, value in (("--token-file", chosen.token_file), ("--tls-ca", chosen.tls_ca)):
        words += [flag, str(value)] if value else []
    return shlex.join(words)


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the token file {path} cannot be read: {error}") from error
    if len(token.split()) != 1:
        raise UsageError(f"the token file {path} should hold one token and nothing else")
    return token


def _readable(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise UsageError(f"there is no file {path}; --tls-ca takes a certificate authority in PEM format")
    return path
