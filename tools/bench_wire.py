"""What the wire costs: the same batch through gRPC and in process, and how late the event loop ever is.

    python -m tools.bench_wire [--model DIR] [--pairs 10]

8 conversations decode at once, llama-160m shape, random weights.  Engine and server run in this process, the
client in another.  A probe on the event loop measures how much later than planned it wakes, while steps run
and while a history of 16K tokens is opened beside them.
"""

import argparse
import asyncio
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import uvloop

from engine import AsyncEngine, EngineConfig, load_engine
from engine.types import Delta, OpenRequest, SamplingParams, Tenant, TurnDone, TurnId, TurnRequest
from rpc.client import ContinuoClient
from rpc.listen import ServerOptions
from rpc.server import Server
from tools.measure import median, model_of_shape, percentile, write_result
from tools.serve import favour_latency
from tools.workload import OverGrpc, Workload, drive, prompt_ids

BATCH = Workload(conversations=8, turns=1, new_tokens=32, reply_tokens=128)
VOCAB = 30_000
LONG = 16_384
PROBE_S = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a folder that tools.random_model has written before")
    parser.add_argument("--pairs", type=int, default=10)
    chosen = parser.parse_args()
    with model_of_shape("llama-160m", chosen.model) as folder:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            figures = runner.run(_measure(folder, chosen.pairs))
    print(write_result("wire", figures))


async def _measure(folder: Path, pairs: int) -> dict[str, Any]:
    engine = load_engine(EngineConfig(folder, device_kv_tokens=40_000))
    spawn = multiprocessing.get_context("spawn")
    favour_latency()  # as `continuo serve` does
    async with engine:
        server = Server(engine, ServerOptions(listen="127.0.0.1:0"))
        await server.start()
        with ProcessPoolExecutor(1, mp_context=spawn) as client:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(client, through_grpc, server.address, 99, False)
            wire, inside, late, late_long = [], [], [], []
            for pair in range(pairs):
                async with _probe(late):
                    wire.append(await loop.run_in_executor(client, through_grpc, server.address, pair, False))
                inside.append(await _in_process(engine, pair))
            async with _probe(late_long):
                await loop.run_in_executor(client, through_grpc, server.address, 77, True)
        await server.stop()
    ratios = sorted(a / b for a, b in zip(wire, inside, strict=True))
    figures = {
        "shape": "llama-160m",
        "conversations": BATCH.conversations,
        "grpc_tokens_per_s": round(median(wire), 1),
        "in_process_tokens_per_s": round(median(inside), 1),
        "grpc_over_in_process": round(median(ratios), 3),
        "ratios": [round(value, 3) for value in ratios],
        "loop_lag_p99_ms": round(1000 * percentile(late, 0.99), 2),
        "loop_lag_p99_ms_opening_16k": round(1000 * percentile(late_long, 0.99), 2),
        "loop_lag_max_ms_opening_16k": round(1000 * max(late_long), 2),
    }
    print(figures)
    return figures


class _probe:
    """While inside, appends to `late` by how many seconds each short sleep overshot."""

    def __init__(self, late: list[float]) -> None:
        self._late = late

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            due = time.perf_counter() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self._late.append(max(0.0, time.perf_counter() - due))


def through_grpc(address: str, seed: int, with_long: bool) -> float:
    """Runs in the client's process: tokens per second.  `with_long` opens a long history meanwhile."""

    async def run() -> float:
        async with ContinuoClient(address) as client:
            driving = asyncio.create_task(drive(OverGrpc(client), BATCH, VOCAB, seed))
            if with_long:
                await asyncio.sleep(0.3)
                chat = await client.open(ignore_eos=True, temperature=0.0, max_tokens=4)
                await chat.say(token_ids=prompt_ids(5, 5, LONG, VOCAB))
                await chat.close(delete=True)
            return (await driving).tokens_per_s

    return asyncio.run(run())


async def _in_process(engine: AsyncEngine, seed: int) -> float:
    async def converse(number: int) -> None:
        chat = await engine.open(Tenant("bench"), OpenRequest())
        ids = tuple(prompt_ids(seed * 100 + number, 0, BATCH.new_tokens, VOCAB))
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=BATCH.reply_tokens)
        await chat.turn(TurnRequest(TurnId("1"), token_ids=ids, sampling=sampling))
        async for event in chat.events():
            if isinstance(event, TurnDone):
                break
            assert isinstance(event, Delta) or event.seq
        await chat.close(delete=True)

    begun = time.perf_counter()
    await asyncio.gather(*(converse(number) for number in range(BATCH.conversations)))
    return BATCH.conversations * BATCH.reply_tokens / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
