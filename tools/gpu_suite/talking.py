"""Clients of an engine in this process: turns of token ids, and when their tokens came."""

import asyncio
import random
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from engine.async_engine import AsyncEngine
from engine.attachment import Attachment
from engine.types import (
    Delta,
    OpenRequest,
    SamplingParams,
    Tenant,
    TurnDone,
    TurnFailed,
    TurnId,
    TurnRequest,
    Usage,
)

TENANT = Tenant("local")


@dataclass
class Turn:
    """What one turn's client saw; times of time.perf_counter."""

    said_s: float
    ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)  # of the tokens
    usage: Usage = field(default_factory=Usage)

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.said_s


def prompt(length: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(vocab_size), k=length))


async def opened(engine: AsyncEngine) -> Attachment:
    return await engine.open(TENANT, OpenRequest())


async def say(chat: Attachment, number: int, ids: tuple[int, ...], num_tokens: int) -> Turn:
    """A greedy reply of exactly so many tokens."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    turn = Turn(time.perf_counter())
    await chat.turn(TurnRequest(TurnId(str(number)), token_ids=ids, sampling=sampling))
    async for event in chat.events():
        if isinstance(event, Delta):
            turn.ids += event.token_ids
            turn.times_s += [time.perf_counter()] * len(event.token_ids)
        elif isinstance(event, TurnFailed):
            raise event.error
        elif isinstance(event, TurnDone):
            assert len(turn.ids) == num_tokens, f"{len(turn.ids)} tokens came, not {num_tokens}"
            turn.usage = event.usage
            return turn
    raise AssertionError("the events ended before the turn")


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """On an event loop like the server's."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
