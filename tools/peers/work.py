"""The workloads: what is asked of an engine in one run, and the figures that come out of it.

Conversations and their ids are random, and the same for all engines in the same repeat.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from tools.measure import median, percentile
from tools.workload import MANY, ONE, Client, Outcome, Workload, drive, opened, prompt_ids, say

VOCAB = 30_000
REPLY_TOKENS = 64
LAST_NEW_TOKENS = 1  # of a context to decode from; all before it is kept, so that nobody waits for others
PROMPTS = 5  # that a prefill is measured with
ROUNDS_ALONE = 4  # that one conversation is decoded, because one alone takes less than a second
WARM = Workload(conversations=2, turns=2, new_tokens=48, reply_tokens=4)
Figures = dict[str, Any]
Measure = Callable[[Client, int], Awaitable[Figures]]


def measure_of(workload: str) -> Measure:
    """One run with a seed: `one`, `many`, `decode BxC`, `prefill N`.  Raises ValueError for anything else."""
    kind, _, size = workload.partition(" ")
    if workload == "one":
        return lambda client, seed: _turns(client, ONE, 10 + seed)
    if workload == "many":
        return lambda client, seed: _turns(client, MANY, 400 + seed)  # no beginning is that of ONE
    if kind == "decode":
        batch, context = map(int, size.split("x"))
        return lambda client, seed: _decode(client, batch, context, seed)
    if kind == "prefill":
        count = int(size)
        return lambda client, seed: _prefill(client, count, seed)
    raise ValueError(f"{workload!r} is no workload; there are one, many, decode BxC and prefill N")


async def warm(client: Client, seed: int) -> None:
    await drive(client, WARM, VOCAB, seed=5_000 + seed)


async def greedy_ids(client: Client, prompts: int = 4) -> list[list[int]]:
    """The first 16 ids after a few prompts of 64, alone each."""
    replies = []
    for number in range(prompts):
        async with opened(client) as chat:
            replies.append((await say(chat, prompt_ids(700 + number, 0, 64, VOCAB), 16)).ids)
    return replies


async def fill(client: Client, conversations: int, context: int) -> None:
    """Holds that many conversations of `context` tokens at once."""
    async with AsyncExitStack() as stack:
        for number in range(conversations):
            chat = await stack.enter_async_context(opened(client))
            await say(chat, prompt_ids(50_000 + number, 0, context - 1, VOCAB), 1)


async def _turns(client: Client, workload: Workload, seed: int) -> Figures:
    return turn_figures(await drive(client, workload, VOCAB, seed))


def turn_figures(outcome: Outcome) -> Figures:
    by_turn: dict[int, list[float]] = defaultdict(list)
    for reply in outcome.replies:
        by_turn[reply.turn].append(reply.ttft_s)
    normalised = [reply.e2e_s / len(reply.ids) for reply in outcome.replies]
    return {
        "wall_s": round(outcome.wall_s, 3),
        "tokens_per_s": round(outcome.tokens_per_s, 1),
        **_latency("ttft", outcome.ttft_s),
        "ttft_ms_by_turn": [_ms(sum(by_turn[turn]) / len(by_turn[turn])) for turn in sorted(by_turn)],
        **_latency("itl", outcome.itl_s),
        "e2e_ms_mean": _ms(sum(outcome.e2e_s) / len(outcome.e2e_s)),
        "normalised_ms_p50": _ms(percentile(normalised, 0.5)),
        "normalised_ms_p90": _ms(percentile(normalised, 0.9)),
    }


async def _decode(client: Client, batch: int, context: int, seed: int) -> Figures:
    """Tokens per second while the whole batch decodes, from the last first token to the first last one."""
    rounds = [
        await _decode_once(client, batch, context, 200 * seed + 40 * turn)
        for turn in range(ROUNDS_ALONE if batch == 1 else 1)
    ]
    tokens, seconds = (sum(values) for values in zip(*(together(each) for each in rounds), strict=True))
    itl = [gap for outcome in rounds for gap in outcome.itl_s]
    return {
        "wall_s": round(sum(outcome.wall_s for outcome in rounds), 3),
        "tokens_per_s": round(tokens / seconds, 1),
        **_latency("itl", itl),
    }


async def _decode_once(client: Client, batch: int, context: int, seed: int) -> Outcome:
    numbers = range(first := (batch * 10_000 + context) * 10_000 + seed, first + batch)
    before = context - LAST_NEW_TOKENS - 1  # the token of the first reply is one of the context as well
    outcome = Outcome()
    async with AsyncExitStack() as stack:
        chats = [await stack.enter_async_context(opened(client)) for _ in numbers]
        for chat, number in zip(chats, numbers, strict=True):
            await say(chat, prompt_ids(number, 0, before, VOCAB), 1)
        outcome.replies = await asyncio.gather(
            *(
                say(chat, prompt_ids(number, 1, LAST_NEW_TOKENS, VOCAB), REPLY_TOKENS)
                for chat, number in zip(chats, numbers, strict=True)
            )
        )
    outcome.wall_s = max(r.done_s for r in outcome.replies) - min(r.sent_s for r in outcome.replies)
    return outcome


def together(outcome: Outcome) -> tuple[int, float]:
    """(tokens, seconds) of the time in which every conversation decodes."""
    begin = max(reply.deltas[0][0] for reply in outcome.replies)
    end = min(reply.deltas[-1][0] for reply in outcome.replies)
    tokens = sum(len(ids) for reply in outcome.replies for at, ids in reply.deltas if begin < at <= end)
    if end <= begin:
        raise ValueError("the conversations never decoded all at once")
    return tokens, end - begin


async def _prefill(client: Client, count: int, seed: int) -> Figures:
    replies = []
    for number in range(PROMPTS):
        async with opened(client) as chat:
            ids = prompt_ids(30_000 + 10 * seed + number, count, count, VOCAB)
            replies.append(await say(chat, ids, 1))
    ttft = [reply.ttft_s for reply in replies]
    return {
        "wall_s": round(sum(ttft), 3),
        "tokens_per_s": round(count / median(ttft), 1),
        **_latency("ttft", ttft),
    }


def _latency(name: str, seconds: Sequence[float]) -> Figures:
    return {
        f"{name}_ms_mean": _ms(sum(seconds) / len(seconds)),
        f"{name}_ms_p99": _ms(percentile(seconds, 0.99)),
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
