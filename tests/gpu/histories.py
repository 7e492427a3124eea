"""Conversations that go on, are rewound, forked and answered again, at the same time, in a whole engine."""

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path

from engine.async_engine import AsyncEngine
from engine.attachment import Attachment
from engine.config import EngineConfig
from engine.loader import load_engine
from engine.types import (
    ConversationId,
    Delta,
    ForkRequest,
    OpenRequest,
    Point,
    RegenerateRequest,
    ResumeRequest,
    SamplingParams,
    Tenant,
    TurnDone,
    TurnFailed,
    TurnId,
    TurnRequest,
    Usage,
)

TENANT = Tenant("local")
SYSTEM = tuple(range(100, 145))  # every conversation begins with it
VOCAB = 300  # of the 320 tokens that the tiny model has


def load(folder: Path, device: str, **settings: object) -> AsyncEngine:
    """In float32, with blocks of 16 tokens.  Unless told otherwise, all conversations of a test fit."""
    given = {"block_size": 16, "device_kv_tokens": 8192, "host_kv_tokens": 0, "max_step_tokens": 48}
    settings = given | {"max_concurrent": 6, "threads": 1} | settings
    return load_engine(EngineConfig(folder, device=device, dtype="float32", **settings))  # type: ignore[arg-type]


@dataclass
class Played:
    """All replies, in an order that does not depend on time, and where the prompts' tokens came from."""

    replies: list[tuple[str, list[int]]] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)

    def total(self, name: str) -> int:
        return sum(getattr(usage, name) for usage in self.usages)


async def play(engine: AsyncEngine, seed: int, conversations: int = 5, turns: int = 5) -> Played:
    """`turns` of every conversation; those that are forked off have as many left as their origin."""
    ids = [f"{seed}-{number}" for number in range(conversations)]
    parts = await asyncio.gather(*(_converse(engine, id, random.Random(id), turns) for id in ids))
    every = Played()
    for part in parts:
        every.replies += part.replies
        every.usages += part.usages
    return every


async def _converse(engine: AsyncEngine, id: str, chance: random.Random, turns: int) -> Played:
    played = Played()
    chat = await engine.open(TENANT, OpenRequest(ConversationId(id)))
    committed = 0
    for number in range(turns):
        prompt = tuple(chance.choices(range(VOCAB), k=chance.randrange(1, 40)))
        name = f"{id}/{number}"
        await _said(chat, played, name, SYSTEM * (number == 0) + prompt, chance.randrange(2, 20))
        committed += 1
        what = chance.random()
        if what < 0.25:
            request = RegenerateRequest(TurnId(f"{name} again"), None, greedy(chance.randrange(2, 20)))
            await chat.regenerate(request)
            await _heard(chat, played, f"{name} again")
        elif what < 0.45 and committed > 1:
            back = chance.randrange(1, committed)
            await chat.rewind(Point(num_turns=back))
            committed = back
        elif what < 0.6:
            fork = ForkRequest(ConversationId(id), ConversationId(f"{name}-fork"))
            record = await engine.fork(TENANT, fork)
            other = await engine.resume(TENANT, ResumeRequest(record.id))
            await _said(other, played, f"{name} fork", prompt[:5], 6)
    return played


async def _said(chat: Attachment, played: Played, name: str, ids: tuple[int, ...], num_tokens: int) -> None:
    await chat.turn(TurnRequest(TurnId(name), token_ids=ids, sampling=greedy(num_tokens)))
    await _heard(chat, played, name)


async def _heard(chat: Attachment, played: Played, name: str) -> None:
    reply, usage = await heard(chat)
    played.replies.append((name, reply))
    played.usages.append(usage)


async def heard(chat: Attachment) -> tuple[list[int], Usage]:
    """One reply to its end."""
    ids: list[int] = []
    async for event in chat.events():
        if isinstance(event, Delta):
            ids[event.offset :] = event.token_ids
        elif isinstance(event, TurnFailed):
            raise event.error
        elif isinstance(event, TurnDone):
            return ids, event.usage
    raise AssertionError("the events ended before the turn")


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
