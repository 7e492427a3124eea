"""A whole comparison: starts the servers, takes turns among them, and collects every run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from engine.models.config import ModelConfig
from engine.parts import POPULATED_BYTES
from tools.bench_decode import kv_bytes, weight_bytes
from tools.measure import DramRead
from tools.peers import report, setup
from tools.peers.engines import KV_TOKENS, SLOTS, Launch, Running, free_port, launch
from tools.peers.procfs import Watch, family, memory_bytes
from tools.peers.work import Figures, fill, greedy_ids, measure_of, warm

ONCE = ("start", "memory")  # measured around the others
FILLING = "decode 32x2048"  # holds the most tokens at once
HELD_TOKENS = 2048 + 64  # by each of its conversations at the end
ALONE = "decode 1x512"  # is judged by the bandwidth of DRAM
_COMMON = ["start", "one", "many", ALONE, "decode 8x2048"]
_PREFILL = ["prefill 512", "prefill 2048", "memory"]
DEFAULT_WORKLOADS = {
    "llama-160m": [*_COMMON, FILLING, *_PREFILL],
    "qwen2.5-0.5b": [*_COMMON, *_PREFILL],
}
WITH_HISTORY = ("one", "many")  # all that --stateless changes
PAUSE_S = 0.5  # after which the threads of the engine before have stopped waiting for more


class Session:
    """Made, measured once, and asked for its `result`; `failures` says which runs meant nothing."""

    def __init__(
        self, *, shape: str, model: Path, peers: Path, engines: list[str], workloads: list[str], repeats: int
    ) -> None:
        self.shape = shape
        self.model = model
        self.peers = peers
        self.engines = engines
        self.workloads = workloads
        self.repeats = repeats
        self.failures: list[str] = []
        self._config = ModelConfig.from_dir(model)
        self._runs: list[dict[str, Any]] = []
        self._agreement: dict[str, float] = {}
        self._launches: dict[str, Launch] = {}

    async def measure(self) -> None:
        """Raises EngineFailed where a server does not start.  All servers have ended when it returns."""
        if "llama.cpp" in self.engines:
            setup.make_gguf(self.peers, self.shape, self.model)
        async with self._servers() as servers:
            await self._compare_ids(servers)
            for repeat in range(self.repeats):
                first = repeat % len(servers)
                for workload in self.workloads:
                    if workload in ONCE:
                        continue
                    for server in servers[first:] + servers[:first]:
                        if server.name != "stateless" or workload in WITH_HISTORY:
                            await self._run(server, workload, repeat)
            if "memory" in self.workloads:
                for server in servers:
                    if server.name != "stateless":
                        await self._memory(server)

    def result(self) -> dict[str, Any]:
        medians = report.summary(self._runs)
        return {
            "shape": self.shape,
            "versions": setup.versions(self.peers, self.engines),
            "command_lines": {name: self._launches[name].told() for name in self.engines},
            "medians": medians,
            "targets": report.judged(self.shape, medians),
            "equal_ids": self._agreement,
            "failures": self.failures,
            "runs": self._runs,
        }

    @asynccontextmanager
    async def _servers(self) -> AsyncIterator[list[Running]]:
        """All engines, started in turn; as often as there are repeats if starting is to be measured."""
        running: dict[str, Running] = {}
        try:
            for repeat in range(self.repeats if "start" in self.workloads else 1):
                for name in self.engines:
                    if name in running:
                        await running.pop(name).stop()
                    self._launches[name] = launch(name, self.shape, self.model, self.peers, free_port())
                    watch = Watch()
                    running[name] = await Running.start(self._launches[name])
                    if "start" in self.workloads:
                        self._note(
                            "start",
                            running[name],
                            repeat,
                            {"start_s": round(running[name].start_s, 2)},
                            watch.foreign_cores(*family(running[name].pid)),
                        )
            yield [running[name] for name in self.engines]
        finally:
            await asyncio.gather(*(server.stop() for server in running.values()))

    async def _run(self, server: Running, workload: str, repeat: int) -> None:
        alone = server.name == "continuo" and workload == ALONE
        before = await _dram_gbps() if alone else 0.0
        try:
            await warm(server.client, repeat)
            await asyncio.sleep(PAUSE_S)
            watch = Watch(family(server.pid))
            figures = await measure_of(workload)(server.client, repeat)
            foreign = watch.foreign_cores()
            figures["cpu_s"] = round(watch.own_cpu_s(), 2)
        except Exception as error:  # of any engine, whatever its client raises
            self._failed(server, workload, repeat, error)
            return
        if alone:
            gbps = max(before, await _dram_gbps())
            needed = weight_bytes(self._config) + kv_bytes(self._config, 512 + 32)
            figures["dram_read_gbps"] = round(gbps, 1)
            figures["share_of_bandwidth"] = round(needed / gbps / 1e6 / figures["itl_ms_mean"], 3)
        self._note(workload, server, repeat, figures, foreign)

    async def _memory(self, server: Running) -> None:
        """At rest, after as many tokens as any workload has were held at once."""
        if FILLING not in self.workloads:
            try:
                await fill(server.client, SLOTS, HELD_TOKENS)
            except Exception as error:
                self._failed(server, "memory", 0, error)
                return
        await asyncio.sleep(PAUSE_S)
        used = memory_bytes(family(server.pid))
        figures: Figures = {"gb": round(used / 1e9, 3)}
        if server.name == "continuo":
            weights = sum(path.stat().st_size for path in self.model.glob("*.safetensors"))
            figures["weights_gb"] = round(weights / 1e9, 3)
            held = kv_bytes(self._config, SLOTS * HELD_TOKENS)
            taken_ahead = min(POPULATED_BYTES, kv_bytes(self._config, KV_TOKENS))
            figures["kv_gb"] = round(max(held, taken_ahead) / 1e9, 3)
            figures["besides_gb"] = round(figures["gb"] - figures["weights_gb"] - figures["kv_gb"], 3)
        self._note("memory", server, 0, figures, 0.0)

    async def _compare_ids(self, servers: list[Running]) -> None:
        """How many of the first server's greedy ids the others say as well: do all compute the same?"""
        said = {server.name: await greedy_ids(server.client) for server in servers}
        yardstick = said[servers[0].name]
        for name, replies in said.items():
            pairs = zip(replies, yardstick, strict=True)
            self._agreement[name] = round(sum(_same(*pair) for pair in pairs) / len(yardstick), 2)
        print(f"greedy ids equal to those of {servers[0].name}, of 16: {self._agreement}", flush=True)

    def _note(self, workload: str, server: Running, repeat: int, figures: Figures, foreign: float) -> None:
        run = {
            "workload": workload,
            "engine": server.name,
            "repeat": repeat,
            "foreign_cores": round(foreign, 3),
            "figures": figures,
        }
        self._runs.append(run)
        short = {name: value for name, value in figures.items() if not isinstance(value, list)}
        mark = " DISTURBED" if report.disturbed(run) else ""
        print(
            f"[{repeat + 1}/{self.repeats}] {workload}, {server.name}: {short}, foreign {foreign:.2f}{mark}",
            flush=True,
        )

    def _failed(self, server: Running, workload: str, repeat: int, error: Exception) -> None:
        told = f"{workload}, {server.name}, repeat {repeat + 1}: {error}"
        self.failures.append(told)
        self._runs.append(
            {"workload": workload, "engine": server.name, "repeat": repeat, "failure": str(error)}
        )
        print(f"FAILED: {told}", flush=True)


def _same(ids: list[int], others: list[int]) -> int:
    """How many of the first ids are equal."""
    return next((n for n, (a, b) in enumerate(zip(ids, others, strict=True)) if a != b), len(ids))


async def _dram_gbps() -> float:
    return await asyncio.to_thread(lambda: DramRead().measure(0.5))
