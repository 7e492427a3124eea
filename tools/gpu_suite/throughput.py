"""Tokens per second of whole engines, decoding and reading prompts, and what devices idle between steps."""

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from engine.async_engine import AsyncEngine
from tools.gpu_suite import talking
from tools.gpu_suite.random_engine import random_engine, weight_bytes
from tools.gpu_suite.sections import MISSED, PASSED, Context
from tools.gpu_suite.targets import COPY_TBPS, STEP_GAP_MS

BATCHES = (1, 8, 64)
_CONTEXT, _TOKENS = 512, 192
_PROMPTS = ((1, 8192), (8, 2048))  # how many at once, and how long
_SETTINGS = {"device_kv_tokens": 98304, "max_concurrent": 64, "max_step_tokens": 8192}
_GAPS_OF = "0.5B", 64


def run(context: Context) -> dict[str, Any]:
    for shape in ("0.5B", "8B"):
        plan = Plan(shape, "cuda", BATCHES, _CONTEXT, _TOKENS, _PROMPTS, _SETTINGS)
        context.case(f"{shape}: start", lambda plan=plan: talking.run(_measured(context, plan)))
    return {}


def dry_run(context: Context) -> dict[str, Any]:
    settings = {"device_kv_tokens": 2048, "max_concurrent": 4, "threads": 1}
    plan = Plan("tiny", "cpu", (1, 3), 40, 12, ((1, 100), (2, 50)), settings)
    context.case("tiny: start", lambda: talking.run(_measured(context, plan)))
    context.case("bytes of weights", lambda: {"bytes": weight_bytes("8B")})
    return {}


@dataclass(frozen=True)
class Plan:
    """What one engine is measured with."""

    shape: str
    device: str
    batches: tuple[int, ...]
    context: int  # tokens that are kept when decoding begins
    num_tokens: int  # that are decoded by each
    prompts: tuple[tuple[int, int], ...]  # how many at once, and how long
    settings: dict[str, Any]


async def _measured(context: Context, plan: Plan) -> dict[str, Any]:
    """All cases of one engine; its start is one."""
    begun = time.monotonic()
    with random_engine(plan.shape, plan.device, **plan.settings) as made:
        async with made as engine:
            await _decoded(engine, 2, 16, 8)  # whatever is done for the first time
            start_s = round(time.monotonic() - begun, 1)
            for batch in plan.batches:
                name = f"{plan.shape}: decoding {batch} at {plan.context}"
                await context.case_on_loop(name, lambda batch=batch: _decoding(engine, plan, batch))
            for count, size in plan.prompts:
                name = f"{plan.shape}: reading {count} x {size}"
                await context.case_on_loop(name, lambda c=count, s=size: _read(engine, c, s))
    return {"start_s": start_s}


async def _decoding(engine: AsyncEngine, plan: Plan, batch: int) -> dict[str, Any]:
    figures = await _decoded(engine, batch, plan.context, plan.num_tokens)
    figures["weights_ms"] = round(weight_bytes(plan.shape) / COPY_TBPS / 1e9, 2)
    return figures | (_judged(figures) if (plan.shape, batch) == _GAPS_OF else {})


async def _decoded(engine: AsyncEngine, batch: int, length: int, num_tokens: int) -> dict[str, Any]:
    """All of them decode together: their histories are kept from a turn before."""
    vocab = engine.model_info().vocab_size
    chats = [await talking.opened(engine) for _ in range(batch)]
    await asyncio.gather(
        *(talking.say(chat, 0, talking.prompt(length, vocab, at), 1) for at, chat in enumerate(chats))
    )
    with replays() as seen:
        turns = await asyncio.gather(
            *(talking.say(chat, 1, talking.prompt(4, vocab, at), num_tokens) for at, chat in enumerate(chats))
        )
    for chat in chats:
        await chat.close(delete=True)
    begin, end = max(turn.times_s[0] for turn in turns), min(turn.times_s[-1] for turn in turns)
    count = sum(begin < at <= end for turn in turns for at in turn.times_s)
    rate = count / (end - begin) if end > begin else 0.0
    return {"tokens_per_s": round(rate, 1), "step_ms": rate and round(1e3 * batch / rate, 3)} | gaps(seen)


async def _read(engine: AsyncEngine, count: int, size: int) -> dict[str, Any]:
    """Until the last of the first tokens; the best of three."""
    vocab, best = engine.model_info().vocab_size, 0.0
    for attempt in range(3):
        chats = [await talking.opened(engine) for _ in range(count)]
        seeds = [1000 * attempt + at for at in range(count)]
        begun = time.perf_counter()
        turns = await asyncio.gather(
            *(
                talking.say(chat, 0, talking.prompt(size, vocab, seed), 1)
                for chat, seed in zip(chats, seeds, strict=True)
            )
        )
        best = max(best, count * size / (max(turn.times_s[0] for turn in turns) - begun))
        for chat in chats:
            await chat.close(delete=True)
    return {"tokens_per_s": round(best, 1)}


Replays = list[tuple[torch.cuda.Event, torch.cuda.Event]]


@contextmanager
def replays() -> Iterator[Replays]:
    """When each replay of a graph began and ended on the device."""
    seen: Replays = []
    if not torch.cuda.is_available():
        yield seen
        return
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay(graph)
        end.record()
        seen.append((begin, end))

    torch.cuda.CUDAGraph.replay = timed  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]


def gaps(seen: Replays) -> dict[str, Any]:
    """From the end of one step's graph to the beginning of the next one's: all that is not the model."""
    if len(seen) < 3:
        return {"replays": len(seen)}
    torch.cuda.synchronize()
    between = sorted(before[1].elapsed_time(after[0]) for before, after in zip(seen, seen[1:], strict=False))
    return {
        "replays": len(seen),
        "busy_ms": round(statistics.median(begin.elapsed_time(end) for begin, end in seen), 3),
        "gap_ms": round(statistics.median(between), 4),
        "gap_ms_p90": round(between[int(0.9 * len(between))], 4),
    }


def _judged(figures: dict[str, Any]) -> dict[str, Any]:
    accept, good = STEP_GAP_MS
    gap = figures.get("gap_ms")
    is_short = gap is not None and gap <= accept
    return {
        "status": PASSED if is_short else MISSED,
        "accept_ms": accept,
        "good_ms": good,
        "is_good": is_short and gap <= good,
    }
