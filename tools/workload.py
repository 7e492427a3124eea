"""Multi-turn workloads of random token ids, and a driver that takes any server through them.

Lengths are fixed, end-of-sequence is ignored, decoding greedy; a turn follows the one before at once.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rpc.client import Chat as GrpcChat
from rpc.client import ContinuoClient


class Chat(Protocol):
    """A conversation at a server, whoever keeps its history."""

    def say(self, token_ids: Sequence[int], reply_tokens: int) -> AsyncIterator[list[int]]:
        """The ids of the reply as they arrive, one or more at a time."""
        ...

    async def close(self) -> None: ...


class Client(Protocol):
    async def open(self) -> Chat: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Workload:
    conversations: int  # at once
    turns: int
    new_tokens: int  # a turn brings
    reply_tokens: int

    @property
    def context_tokens(self) -> int:
        return self.turns * (self.new_tokens + self.reply_tokens)


ONE = Workload(conversations=1, turns=8, new_tokens=200, reply_tokens=64)
MANY = Workload(conversations=16, turns=6, new_tokens=100, reply_tokens=64)


@dataclass(frozen=True, slots=True)
class Reply:
    """One turn as the client saw it: seconds of `time.perf_counter`, and the ids of every delta."""

    conversation: int
    turn: int
    sent_s: float
    deltas: tuple[tuple[float, tuple[int, ...]], ...]
    done_s: float

    @property
    def ids(self) -> list[int]:
        return [each for _, ids in self.deltas for each in ids]

    @property
    def ttft_s(self) -> float:
        return self.deltas[0][0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.done_s - self.sent_s

    @property
    def itl_s(self) -> list[float]:
        """Gaps between deltas divided by the tokens of the later one, one for each token."""
        gaps: list[float] = []
        for (before, _), (at, ids) in zip(self.deltas, self.deltas[1:], strict=False):
            gaps += [(at - before) / len(ids)] * len(ids)
        return gaps


@dataclass(slots=True)
class Outcome:
    """A whole run: every reply, in the order of their ends."""

    wall_s: float = 0.0
    replies: list[Reply] = field(default_factory=list)

    @property
    def reply_tokens(self) -> int:
        return sum(len(reply.ids) for reply in self.replies)

    @property
    def tokens_per_s(self) -> float:
        return self.reply_tokens / self.wall_s

    @property
    def ttft_s(self) -> list[float]:
        return [reply.ttft_s for reply in self.replies]

    @property
    def itl_s(self) -> list[float]:
        return [gap for reply in self.replies for gap in reply.itl_s]

    @property
    def e2e_s(self) -> list[float]:
        return [reply.e2e_s for reply in self.replies]


class WorkloadFailed(Exception):
    """Some turns failed, or a reply had not as many tokens as were asked for."""


class OverGrpc:
    """Continuo as a `Client`: its server keeps the history."""

    def __init__(self, client: ContinuoClient) -> None:
        self._client = client

    async def open(self) -> Chat:
        return _ContinuoChat(await self._client.open(ignore_eos=True, temperature=0.0))

    async def close(self) -> None:
        await self._client.close()


class _ContinuoChat:
    def __init__(self, chat: GrpcChat) -> None:
        self._chat = chat

    async def say(self, token_ids: Sequence[int], reply_tokens: int) -> AsyncIterator[list[int]]:
        async for delta in self._chat.say(token_ids=token_ids, max_tokens=reply_tokens):
            yield list(delta.token_ids)

    async def close(self) -> None:
        await self._chat.close(delete=True)


def prompt_ids(conversation: int, turn: int, count: int, vocab: int) -> list[int]:
    return random.Random(conversation * 1000 + turn).choices(range(10, vocab), k=count)


@asynccontextmanager
async def opened(client: Client) -> AsyncIterator[Chat]:
    """A new conversation, closed at the end however it ends."""
    chat = await client.open()
    try:
        yield chat
    finally:
        await chat.close()


async def say(
    chat: Chat, token_ids: Sequence[int], reply_tokens: int, conversation: int = 0, turn: int = 0
) -> Reply:
    """One turn.  Raises WorkloadFailed unless the reply has exactly `reply_tokens`."""
    deltas = []
    sent = time.perf_counter()
    async for ids in chat.say(token_ids, reply_tokens):
        if ids:
            deltas.append((time.perf_counter(), tuple(ids)))
    reply = Reply(conversation, turn, sent, tuple(deltas), time.perf_counter())
    if len(reply.ids) != reply_tokens:
        raise WorkloadFailed(f"a reply has {len(reply.ids)} tokens; {reply_tokens} were asked for")
    return reply


async def drive(client: Client, workload: Workload, vocab: int, seed: int = 0) -> Outcome:
    """All conversations at once, each turn as soon as the one before is done.

    Raises WorkloadFailed after all have ended, when any turn failed: what such a run measured means nothing.
    """
    outcome = Outcome()

    async def converse(number: int) -> None:
        async with opened(client) as chat:
            for turn in range(workload.turns):
                ids = prompt_ids(seed * 100 + number, turn, workload.new_tokens, vocab)
                outcome.replies.append(await say(chat, ids, workload.reply_tokens, number, turn))

    begun = time.perf_counter()
    ended = await asyncio.gather(
        *(converse(number) for number in range(workload.conversations)), return_exceptions=True
    )
    outcome.wall_s = time.perf_counter() - begun
    failures = [error for error in ended if error is not None]
    if failures:
        told = f"{len(failures)} of {workload.conversations} conversations failed"
        raise WorkloadFailed(f"{told}; the first: {failures[0]!r}") from failures[0]
    return outcome
