"""A loop of virtual time, and a server in it that answers after a fixed time: hours pass in a moment."""

import asyncio
import selectors
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

from rpc._generated import continuo_pb2 as pb


class VirtualLoop(asyncio.SelectorEventLoop):
    """Whenever all wait for a later time, it is that time."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits for something that will never happen"
        self._loop.now += timeout
        return super().select(0)


def play(coroutine: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


class VirtualServer:
    """In the client's place.  A turn's first token comes after `ttft_s`, each later one after `token_s`."""

    def __init__(self, ttft_s: float = 0.5, token_s: float = 0.01) -> None:
        self.ttft_s, self.token_s = ttft_s, token_s
        self.failures: dict[int, Exception] = {}  # number of a turn, from 1 -> what it ends with
        self.num_turns = 0
        self.num_resumed = 0
        self.said: list[dict[str, Any]] = []
        self._chats: dict[str, VirtualChat] = {}

    async def open(self, **arguments: Any) -> "VirtualChat":
        chat = VirtualChat(self, f"c-{len(self._chats)}", arguments)
        self._chats[chat.id] = chat
        return chat

    async def resume(self, id: str) -> "VirtualChat":
        assert not self._chats[id].is_attached
        self.num_resumed += 1
        await asyncio.sleep(0.2)
        self._chats[id].is_attached = True
        return self._chats[id]

    async def load(self) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(new_tokens=self.num_turns)


class VirtualChat:
    def __init__(self, server: VirtualServer, id: str, opened_with: dict[str, Any]) -> None:
        self.id = id
        self.opened_with = opened_with
        self.committed_tokens = 0
        self.context_left = 100_000
        self.is_attached = True
        self.is_cancelled = False
        self.server = server

    def say(self, text: str | None = None, **arguments: Any) -> "VirtualReply":
        assert self.is_attached
        self.server.num_turns += 1
        self.server.said.append({"text": text, **arguments})
        new = len(arguments.get("token_ids") or text.split())
        return VirtualReply(self, self.server.num_turns, new, arguments["max_tokens"])

    async def cancel(self) -> None:
        self.is_cancelled = True

    async def close(self) -> None:
        self.is_attached = False


class VirtualReply:
    def __init__(self, chat: VirtualChat, number: int, new: int, wanted: int) -> None:
        self._chat, self._number, self._new, self._left = chat, number, new, wanted
        self._history = chat.committed_tokens
        self._said = 0

    def __aiter__(self) -> "VirtualReply":
        return self

    async def __anext__(self) -> SimpleNamespace:
        server = self._chat.server
        if error := server.failures.get(self._number):
            raise error
        if self._left == 0 or self._chat.is_cancelled:
            raise StopAsyncIteration
        await asyncio.sleep(server.token_s if self._said else server.ttft_s)
        self._said, self._left = self._said + 1, self._left - 1
        return SimpleNamespace(token_ids=(1,))

    def __await__(self) -> Any:
        return self._finish().__await__()

    async def _finish(self) -> SimpleNamespace:
        async for _ in self:
            pass
        self._chat.is_cancelled = False
        self._chat.committed_tokens = self._history + self._new + self._said
        usage = pb.Usage(
            prompt_tokens=self._history + self._new, new_tokens=self._new, cached_device_tokens=self._history
        )
        return SimpleNamespace(usage=usage, timing=pb.Timing(queue_s=0.1, ttft_s=0.4))
