"""Conversations that outgrow the device's KV while people think: two tiers, one, and re-reading it all."""

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

from tools.gpu_suite import talking
from tools.gpu_suite.random_engine import random_engine
from tools.gpu_suite.sections import Context
from tools.measure import percentile

_KINDS = ("cached_device_tokens", "cached_host_tokens", "recomputed_tokens", "new_tokens")


@dataclass(frozen=True)
class Load:
    """All begin within one think time; `think_s` is the mean of exponential pauses."""

    shape: str
    conversations: int
    turns: int
    first_tokens: int  # of the first prompt
    tokens: int  # of each later one
    reply_tokens: int
    think_s: float
    device_kv_tokens: int
    host_kv_tokens: int
    more: dict[str, Any]

    def settings(self, configuration: str) -> dict[str, Any]:
        tiers = self.host_kv_tokens if configuration == "two tiers" else 0
        own = {"device_kv_tokens": self.device_kv_tokens, "host_kv_tokens": tiers}
        return self.more | own | {"stateless": configuration == "stateless"}


CONFIGURATIONS = ("two tiers", "device only", "stateless")
LOAD = Load("8B", 24, 6, 2000, 100, 64, 1.0, 24 * 1024, 96 * 1024, {"max_step_tokens": 4096})
SMALL = Load("tiny", 4, 3, 60, 8, 6, 0.01, 256, 1024, {"threads": 1})


def run(context: Context) -> dict[str, Any]:
    for name in CONFIGURATIONS:
        context.case(f"8B, {name}", lambda n=name: talking.run(_held(LOAD, n, "cuda")))
    return {}


def dry_run(context: Context) -> dict[str, Any]:
    for name in CONFIGURATIONS:
        context.case(name, lambda n=name: talking.run(_held(SMALL, n, "cpu")))
    return {}


async def _held(load: Load, configuration: str, device: str) -> dict[str, Any]:
    begun = time.monotonic()
    with random_engine(load.shape, device, **load.settings(configuration)) as made:
        async with made as engine:
            started_s = time.monotonic() - begun
            vocab = engine.model_info().vocab_size

            async def converse(number: int) -> list[talking.Turn]:
                chance = random.Random(number)
                chat = await talking.opened(engine)
                await asyncio.sleep(chance.random() * load.think_s)
                turns = []
                for turn in range(load.turns):
                    size = load.tokens if turn else load.first_tokens
                    ids = talking.prompt(size, vocab, 1000 * number + turn)
                    turns.append(await talking.say(chat, turn, ids, load.reply_tokens))
                    await asyncio.sleep(chance.expovariate(1 / load.think_s))
                return turns

            begun = time.perf_counter()
            every = await asyncio.gather(*(converse(number) for number in range(load.conversations)))
    turns = [turn for each in every for turn in each]
    seconds = max(turn.times_s[-1] for turn in turns) - begun
    later = [1e3 * turn.ttft_s for each in every for turn in each[1:]]
    return {
        "turns_per_s": round(len(turns) / seconds, 2),
        "ttft_ms_p50": round(percentile(later, 0.5), 1),
        "ttft_ms_p90": round(percentile(later, 0.9), 1),
        "start_s": round(started_s, 1),
        "tokens": {
            kind.removesuffix("_tokens").replace("_", " "): sum(getattr(turn.usage, kind) for turn in turns)
            for kind in _KINDS
        },
    }
