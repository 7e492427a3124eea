"""What fork, rewind, update and regenerate cost in a conversation of 2,000 tokens.

    python -m tools.bench_operations [--model DIR] [--folder .] [--repeats 200]

In process, llama-160m shape with random weights, token log on disk: each operation is answered once it is
there, so the disk's fsync is in it.  Every round forks the conversation, attaches to the fork, changes a
default, rewinds it to where most is lost, says one token, and has another reply to that.  `recomputed` counts
tokens of the history whose KV that took, `kv_tokens_taken` the KV memory that a fork costs before it says
something.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from engine import EngineConfig, load_engine
from engine.async_engine import AsyncEngine
from engine.attachment import Attachment
from engine.types import (
    ForkRequest,
    OpenRequest,
    Point,
    RegenerateRequest,
    ResumeRequest,
    SamplingParams,
    Tenant,
    TurnDone,
    TurnId,
    TurnRequest,
    UpdateRequest,
)
from tools.measure import median, model_of_shape, percentile, write_result
from tools.workload import prompt_ids

TENANT = Tenant("bench")
TOKENS, TURNS = 2000, 10
CUT = 1983  # inside the last reply; of the block of 32 there 31 tokens stay
VOCAB = 30_000
ONE_TOKEN = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)
TARGETS_MS = {"fork": 2.0, "rewind": 1.0}

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a folder that tools.random_model has written before")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write: the disk to measure")
    parser.add_argument("--repeats", type=int, default=200)
    chosen = parser.parse_args()
    with (
        model_of_shape("llama-160m", chosen.model) as model,
        tempfile.TemporaryDirectory(dir=chosen.folder, prefix=".bench_operations-") as data_dir,
    ):
        figures = asyncio.run(_measure(model, Path(data_dir), chosen.repeats))
    print(figures)
    print(write_result("operations", figures))


async def _measure(model: Path, data_dir: Path, repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {}
    recomputed: dict[str, list[int]] = {}
    taken = []
    async with load_engine(EngineConfig(model, device_kv_tokens=8192, data_dir=data_dir)) as engine:
        chat = await _conversation(engine)

        async def timed(name: str, operation: Awaitable[T]) -> T:
            begun = time.perf_counter()
            result = await operation
            times.setdefault(name, []).append(1000 * (time.perf_counter() - begun))
            return result

        for number in range(repeats + 1):
            free = engine.load().device.free_tokens
            record = await timed("fork", engine.fork(TENANT, ForkRequest(chat.conversation_id)))
            fork = await timed("attach", engine.resume(TENANT, ResumeRequest(record.id)))
            taken.append(free - engine.load().device.free_tokens)
            changed = SamplingParams(temperature=number / 1000)
            await timed("update", fork.update(UpdateRequest(sampling=changed)))
            standing = await timed("rewind", fork.rewind(Point(num_tokens=CUT)))
            assert standing.committed_tokens == CUT
            said = await timed("say", _turn(fork, TurnRequest(TurnId("said"), (), (7,), ONE_TOKEN)))
            recomputed.setdefault("after_fork_and_rewind", []).append(said.usage.recomputed_tokens)
            again = RegenerateRequest(TurnId("again"), sampling=ONE_TOKEN)
            done = await timed("regenerate", _turn(fork, again))
            recomputed.setdefault("by_regenerate", []).append(done.usage.recomputed_tokens)
            await fork.close(delete=True)
            if not number:  # the first round warms up
                times.clear()
    return {
        "shape": "llama-160m",
        "history_tokens": TOKENS,
        "rewound_to": CUT,
        "repeats": repeats,
        "ms_p50": {name: round(median(values), 3) for name, values in times.items()},
        "ms_p95": {name: round(percentile(values, 0.95), 3) for name, values in times.items()},
        "kv_tokens_taken_by_a_fork": max(taken),
        "most_recomputed": {name: max(counts) for name, counts in recomputed.items()},
        "target_ms": TARGETS_MS,
        "reached": all(median(times[name]) <= target for name, target in TARGETS_MS.items()),
    }


async def _conversation(engine: AsyncEngine) -> Attachment:
    """Of `TOKENS` tokens in `TURNS` turns, half of them said by the model."""
    half = TOKENS // TURNS // 2
    chat = await engine.open(TENANT, OpenRequest())
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=half)
    for number in range(TURNS):
        ids = tuple(prompt_ids(0, number, half, VOCAB))
        done = await _turn(chat, TurnRequest(TurnId(str(number)), (), ids, sampling))
    assert done.committed_tokens == TOKENS
    return chat


async def _turn(chat: Attachment, request: TurnRequest | RegenerateRequest) -> TurnDone:
    await (chat.turn(request) if isinstance(request, TurnRequest) else chat.regenerate(request))
    async for event in chat.events():
        if isinstance(event, TurnDone):
            return event
    raise AssertionError("the events ended before the turn")


if __name__ == "__main__":
    main()
