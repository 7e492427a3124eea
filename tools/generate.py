"""`continuo generate`: one prompt, one continuation, in this process."""

import asyncio
import dataclasses
import json
import logging
from argparse import Namespace

from engine import AsyncEngine, EngineConfig, load_engine
from engine.errors import ConfigError, EngineError, InvalidRequest
from engine.types import Delta, GenerateRequest, SamplingParams, Tenant, TurnDone
from tools.hub import HubError, resolve_model

EXPECTED: tuple[type[Exception], ...] = (EngineError, HubError)
USAGE: tuple[type[Exception], ...] = (ConfigError, InvalidRequest)


def run(chosen: Namespace) -> int:
    logging.basicConfig(level=logging.WARNING)
    config = EngineConfig(
        model=resolve_model(chosen.model, chosen.revision, chosen.offline),
        device=chosen.device,
        dtype=chosen.dtype,
        block_size=chosen.block_size,
        device_kv_tokens=chosen.device_kv_tokens,
        device_kv_bytes=chosen.device_kv_memory,
        policy="lru",  # nothing is evicted: costs need not be measured
        threads=chosen.threads,
    )
    request = GenerateRequest(
        prompt=chosen.prompt,
        token_ids=chosen.tokens or (),
        sampling=SamplingParams(
            temperature=chosen.temperature,
            top_k=chosen.top_k,
            top_p=chosen.top_p,
            min_p=chosen.min_p,
            seed=chosen.seed,
            max_tokens=chosen.max_new_tokens,
            stop=tuple(chosen.stop) if chosen.stop else None,
            ignore_eos=chosen.ignore_eos,
        ),
    )
    asyncio.run(_generate(load_engine(config), request, as_json=chosen.json))
    return 0


async def _generate(engine: AsyncEngine, request: GenerateRequest, as_json: bool) -> None:
    token_ids: list[int] = []
    texts: list[str] = []
    async with engine:
        async for event in engine.generate(Tenant("local"), request):
            if isinstance(event, Delta):
                token_ids += event.token_ids
                texts.append(event.text)
                if not as_json:
                    print(event.text, end="", flush=True)
            elif isinstance(event, TurnDone):
                done = event
    if not as_json:
        print()
        return
    answer = {
        "token_ids": token_ids,
        "text": "".join(texts),
        "finish_reason": done.finish_reason.name.lower(),
        "usage": dataclasses.asdict(done.usage),
    }
    print(json.dumps(answer))
