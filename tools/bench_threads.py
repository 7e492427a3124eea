"""What the waiting of OpenMP threads costs: alone, beside a busy process, beside another server.

    python -m tools.bench_threads [--model DIR] [--repeats 3] [--spins 500 1000 2000 10000 300000]

Every parallel region of a step ends with a wait for the next one.  OMP_WAIT_POLICY=PASSIVE sleeps at once,
and every region wakes its threads through the system; GOMP_SPINCOUNT=N looks N times first, 24 ns each on a
Zen 5; GNU OpenMP's own is 300,000.  Under each setting two servers of llama-160m start.  One decodes 1 and 8
conversations of 512 tokens: alone, beside one foreign process that is always busy, and beside its twin, which
does the same.  Then workload (ii) by one thread and by one per core, under the setting that the command line
chooses.  Settings take turns, seconds apart, so that other work on the machine meets them all.

wall_ms is what a client sees per token of a conversation, cpu_ms the server's CPU time per token of all, idle
the CPU time it takes per second without work.
"""

import argparse
import asyncio
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from rpc.client import ContinuoClient
from tools.bench.generator import cpu_seconds
from tools.measure import median, model_of_shape, server_arguments, write_result
from tools.server_process import ServerProcess
from tools.workload import MANY, OverGrpc, Workload, drive

VOCAB = 30_000
IDLE_S = 2.0
DECODING = {f"batch_{batch}": Workload(batch, 1, 512, 48) for batch in (1, 8)}
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="a folder of llama-160m that tools.random_model has written"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--spins", type=int, nargs="+", default=[500, 1000, 2000, 10000, 300_000], metavar="N"
    )
    chosen = parser.parse_args()
    settings = {
        "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
        **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in chosen.spins},
    }
    with model_of_shape("llama-160m", chosen.model) as folder:
        figures = asyncio.run(_measure(folder, settings, chosen.repeats))
    print(write_result("threads", figures))


async def _measure(folder: Path, settings: dict[str, dict[str, str]], repeats: int) -> dict[str, Any]:
    waiting: dict[str, dict[str, list[Figures]]] = {name: defaultdict(list) for name in settings}
    async with AsyncExitStack() as stack:
        servers = {name: await _start(stack, folder, variables) for name, variables in settings.items()}
        for _ in range(repeats):
            for load, workload in DECODING.items():
                for where, neighbourhood in NEIGHBOURHOODS.items():
                    for name, (server, twin) in servers.items():
                        async with neighbourhood(twin, workload):
                            waiting[name][f"{load} {where}"].append(await _decode(server, workload))
                        print(f"{load} {where} {name}: {waiting[name][f'{load} {where}'][-1]}", flush=True)
        for name, (server, _) in servers.items():
            before = server.cpu_s()
            await asyncio.sleep(IDLE_S)
            waiting[name]["idle"].append({"cpu_share": round((server.cpu_s() - before) / IDLE_S, 3)})
    many: dict[str, list[Figures]] = defaultdict(list)
    for _ in range(repeats):
        for threads in ("1", str(len(os.sched_getaffinity(0)))):
            many[threads].append(await _many(folder, threads))
            print(f"workload (ii), --threads {threads}: {many[threads][-1]}", flush=True)
    return {
        "waiting": {
            name: {where: _summary(runs) for where, runs in by_place.items()}
            for name, by_place in waiting.items()
        },
        "workload_ii_by_threads": {threads: _summary(runs) for threads, runs in many.items()},
    }


def _summary(runs: list[Figures]) -> dict[str, Any]:
    return {key: {"median": median(values := [run[key] for run in runs]), "runs": values} for key in runs[0]}


class _Server:
    def __init__(self, process: ServerProcess, client: ContinuoClient) -> None:
        self.client = client
        self._process = process

    def cpu_s(self) -> float:
        used = cpu_seconds(self._process.pid)
        assert used is not None
        return used


async def _start(
    stack: AsyncExitStack, folder: Path, variables: dict[str, str], *flags: str
) -> list[_Server]:
    """Two servers under one setting, warm."""
    started = []
    for _ in range(2):
        with _openmp(variables):
            starting = ServerProcess.start(*server_arguments(folder, "--device-kv-tokens", "5120", *flags))
            process = await stack.enter_async_context(await starting)
        client = await stack.enter_async_context(ContinuoClient(process.address))
        await drive(OverGrpc(client), Workload(2, 1, 100, 8), VOCAB, seed=99)
        started.append(_Server(process, client))
    return started


async def _decode(server: _Server, workload: Workload) -> Figures:
    before = server.cpu_s()
    outcome = await drive(OverGrpc(server.client), workload, VOCAB)
    return {
        "wall_ms": round(1000 * sum(outcome.itl_s) / len(outcome.itl_s), 2),
        "cpu_ms": round(
            1000 * (server.cpu_s() - before) / outcome.reply_tokens, 2
        ),  # with the prompts' share
    }


async def _many(folder: Path, threads: str) -> Figures:
    """Workload (ii) under the command line's own setting."""
    arguments = server_arguments(folder, "--device-kv-tokens", "20000", "--threads", threads)
    with _openmp({}):
        starting = await ServerProcess.start(*arguments)
    async with starting as server, ContinuoClient(server.address) as client:
        await drive(OverGrpc(client), Workload(2, 1, 100, 8), VOCAB, seed=99)  # warm
        outcome = await drive(OverGrpc(client), MANY, VOCAB)
    return {
        "tokens_per_s": round(outcome.tokens_per_s, 1),
        "ttft_mean_ms": round(1000 * sum(outcome.ttft_s) / len(outcome.ttft_s), 1),
        "itl_mean_ms": round(1000 * sum(outcome.itl_s) / len(outcome.itl_s), 1),
    }


@contextmanager
def _openmp(variables: dict[str, str]) -> Iterator[None]:
    """What is started meanwhile has these settings of OpenMP and no others."""
    before = dict(os.environ)
    for name in OPENMP:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@asynccontextmanager
async def _alone(twin: _Server, workload: Workload) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def _beside_busy(twin: _Server, workload: Workload) -> AsyncIterator[None]:
    """One foreign thread that never waits."""
    neighbour = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
    try:
        yield
    finally:
        neighbour.kill()
        await neighbour.wait()


@asynccontextmanager
async def _beside_twin(twin: _Server, workload: Workload) -> AsyncIterator[None]:
    """Another server that decodes all the time."""

    async def go_on() -> None:
        while True:
            await drive(OverGrpc(twin.client), workload, VOCAB)

    decoding = asyncio.create_task(go_on())
    try:
        yield
    finally:
        decoding.cancel()
        await asyncio.gather(decoding, return_exceptions=True)


NEIGHBOURHOODS = {"alone": _alone, "beside a busy process": _beside_busy, "beside a twin": _beside_twin}


if __name__ == "__main__":
    main()
