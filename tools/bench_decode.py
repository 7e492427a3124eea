"""Decoding one conversation, against the time that reading weights and KV from DRAM takes.

    python -m tools.bench_decode SHAPE [--model DIR] [--context 512] [--repeats 5]

In process, greedy, batch 1.  The floor of a step is (weights that it reads + KV of the context) / DRAM
bandwidth.  Machines shared with others change from one minute to the next, so bandwidth is measured just
before and after every run, and each run is judged by the better of the two.
"""

import argparse
import asyncio
import math
import time
from pathlib import Path
from typing import Any

from engine import EngineConfig, load_engine
from engine.models.config import ModelConfig
from engine.models.weights import expected_tensors
from engine.types import Delta, OpenRequest, SamplingParams, Tenant, TurnDone, TurnId, TurnRequest
from tools.measure import DramRead, median, model_of_shape, write_result
from tools.workload import prompt_ids

NEW_TOKENS = 96
VOCAB = 30_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=("llama-160m", "qwen2.5-0.5b"))
    parser.add_argument("--model", type=Path, help="a folder that tools.random_model has written before")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    with model_of_shape(chosen.shape, chosen.model) as folder:
        figures = asyncio.run(_measure(chosen.shape, folder, chosen.context, chosen.repeats))
    print(write_result(f"decode_{chosen.shape}", figures))


async def _measure(shape: str, folder: Path, context: int, repeats: int) -> dict[str, Any]:
    model = ModelConfig.from_dir(folder)
    bytes_per_step = weight_bytes(model) + kv_bytes(model, context + NEW_TOKENS // 2)
    steps_ms: list[float] = []
    gbps: list[float] = []  # of each run: the better of just before and just after
    dram = DramRead()
    engine = load_engine(EngineConfig(folder, device_kv_tokens=8192))
    async with engine:
        for repeat in range(repeats + 1):
            before = dram.measure()
            chat = await engine.open(Tenant("bench"), OpenRequest())
            sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=NEW_TOKENS)
            ids = tuple(prompt_ids(repeat, 0, context, VOCAB))
            await chat.turn(TurnRequest(TurnId("1"), token_ids=ids, sampling=sampling))
            times = []
            async for event in chat.events():
                if isinstance(event, Delta):
                    times.append(time.perf_counter())
                if isinstance(event, TurnDone):
                    break
            await chat.close(delete=True)
            if repeat:
                gbps.append(max(before, dram.measure()))
                steps_ms.append(1000 * (times[-1] - times[0]) / (len(times) - 1))
    shares = [bytes_per_step / g / 1e6 / ms for g, ms in zip(gbps, steps_ms, strict=True)]
    figures = {
        "shape": shape,
        "context": context,
        "bytes_per_step": bytes_per_step,
        "dram_read_gbps": round(median(gbps), 1),
        "step_ms": round(median(steps_ms), 2),
        "share_of_bandwidth": round(median(shares), 3),
        "runs": [
            {"dram_read_gbps": round(g, 1), "step_ms": round(ms, 2), "share": round(share, 3)}
            for g, ms, share in zip(gbps, steps_ms, shares, strict=True)
        ],
    }
    print(figures)
    return figures


def weight_bytes(model: ModelConfig) -> int:
    """What a step reads in bfloat16: every matrix but those of which it only looks up rows."""
    looked_up = ["embed_positions.weight", *([] if model.tied_embeddings else ["embed_tokens.weight"])]
    return sum(
        2 * math.prod(shape)
        for name, shape in expected_tensors(model).items()
        if len(shape) == 2 and not name.endswith(tuple(looked_up))
    )


def kv_bytes(model: ModelConfig, tokens: int) -> int:
    return 2 * tokens * 2 * model.num_layers * model.num_kv_heads * model.head_dim


if __name__ == "__main__":
    main()
