"""Time to the first token of a short turn, by the length of the history: kept on the device, and read again.

    python -m tools.bench_history [--model DIR] [--repeats 7]

32 new tokens after 128 to 2,048 tokens of history, llama-160m shape with random weights, through the gRPC
stream.  Kept and re-read turns alternate, so that a drifting machine disturbs both alike.
"""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rpc.client import ContinuoClient
from rpc.outcome import Delta
from tools.measure import median, model_of_shape, server_arguments, write_result
from tools.server_process import ServerProcess
from tools.workload import prompt_ids

HISTORIES = (128, 512, 1024, 2048)
NEW_TOKENS = 32
VOCAB = 30_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a folder that tools.random_model has written before")
    parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args()
    with model_of_shape("llama-160m", chosen.model) as folder:
        figures = asyncio.run(_measure(folder, chosen.repeats))
    print(write_result("history", figures))


async def _measure(folder: Path, repeats: int) -> dict[str, Any]:
    kept: dict[int, list[float]] = {history: [] for history in HISTORIES}
    reread: dict[int, list[float]] = {history: [] for history in HISTORIES}
    async with (
        await ServerProcess.start(*server_arguments(folder, "--device-kv-tokens", "20000")) as server,
        ContinuoClient(server.address) as client,
    ):
        for repeat in range(repeats + 1):  # the first round warms up
            for history in HISTORIES:
                past = prompt_ids(repeat, history, history, VOCAB)
                new = prompt_ids(repeat, history + 1, NEW_TOKENS, VOCAB)
                chat = await client.open(ignore_eos=True, temperature=0.0, max_tokens=1)
                await chat.say(token_ids=past)
                seconds = await _first_token(chat.say(token_ids=new))
                await chat.close(delete=True)
                again = await _first_token(
                    client.generate(token_ids=past + new, max_tokens=1, ignore_eos=True)
                )
                if repeat:
                    kept[history].append(seconds)
                    reread[history].append(again)
    kept_ms = {history: 1000 * median(values) for history, values in kept.items()}
    reread_ms = {history: 1000 * median(values) for history, values in reread.items()}
    slope, slope_again = _slope(kept_ms), _slope(reread_ms)
    figures = {
        "shape": "llama-160m",
        "new_tokens": NEW_TOKENS,
        "ttft_kept_ms": {str(history): round(value, 1) for history, value in kept_ms.items()},
        "ttft_reread_ms": {str(history): round(value, 1) for history, value in reread_ms.items()},
        "ratio_2048_to_128": round(kept_ms[2048] / kept_ms[128], 2),
        "slope_kept_ms_per_1k": round(slope, 2),
        "slope_reread_ms_per_1k": round(slope_again, 2),
        "slope_ratio": round(slope / slope_again, 4),
    }
    print(figures)
    return figures


async def _first_token(reply: AsyncIterator[Delta]) -> float:
    """Seconds to the first delta with a token; the reply is read to its end."""
    begun, first = time.perf_counter(), 0.0
    async for delta in reply:
        if delta.token_ids and not first:
            first = time.perf_counter() - begun
    return first


def _slope(milliseconds: dict[int, float]) -> float:
    """Least squares, ms per 1,000 tokens."""
    x, y = list(milliseconds), list(milliseconds.values())
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return 1000 * rise / sum((a - mean_x) ** 2 for a in x)


if __name__ == "__main__":
    main()
