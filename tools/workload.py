"""The two multi-turn workloads that peers were measured with, and a client that drives them through a server.

Token ids are random, lengths fixed, end-of-sequence ignored, decoding greedy, no think time.
"""

import asyncio
import random
import time
from dataclasses import dataclass, field

from rpc.client import ContinuoClient


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


@dataclass(slots=True)
class Outcome:
    """Seconds, over all turns; `itl_s` are gaps between deltas divided by their tokens."""

    wall_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)
    reply_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.reply_tokens / self.wall_s


def prompt_ids(conversation: int, turn: int, count: int, vocab: int) -> list[int]:
    return random.Random(conversation * 1000 + turn).choices(range(10, vocab), k=count)


async def drive(client: ContinuoClient, workload: Workload, vocab: int, seed: int = 0) -> Outcome:
    """All conversations at once, each turn as soon as the one before is done."""
    outcome = Outcome()

    async def converse(number: int) -> None:
        chat = await client.open(ignore_eos=True, temperature=0.0, max_tokens=workload.reply_tokens)
        for turn in range(workload.turns):
            ids = prompt_ids(seed * 100 + number, turn, workload.new_tokens, vocab)
            sent = last = time.perf_counter()
            first = True
            async for delta in chat.say(token_ids=ids):
                now = time.perf_counter()
                if not delta.token_ids:
                    continue
                if first:
                    outcome.ttft_s.append(now - sent)
                    first = False
                else:
                    outcome.itl_s += [(now - last) / len(delta.token_ids)] * len(delta.token_ids)
                outcome.reply_tokens += len(delta.token_ids)
                last = now
            outcome.e2e_s.append(time.perf_counter() - sent)
        await chat.close(delete=True)

    begun = time.perf_counter()
    await asyncio.gather(*(converse(number) for number in range(workload.conversations)))
    outcome.wall_s = time.perf_counter() - begun
    return outcome
