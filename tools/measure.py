"""What the benchmarks share: the machine they ran on, a server of their own, percentiles, and the result
file.
"""

import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, versions: what a figure means nothing without."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "isa": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The checked-out commit, with `+` behind it when the tree differs from it."""
    run = [["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
    try:
        head, changes = (
            subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in run
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """`tools/results/NAME.json` with the command, date, commit and machine beside the figures."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    module = Path(sys.argv[0]).stem
    report = {
        "command": " ".join([f"python -m tools.{module}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 2),
        **figures,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


def dram_read_gbps(seconds: float = 1.0) -> float:
    """Best GB/s of summing 1 GiB with all threads: the most that weights and KV can be read with."""
    import torch

    data = torch.ones(2**28, dtype=torch.float32)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begun)
    return data.nbytes / best / 1e9


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of all are not above; nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Sequence[float]) -> float:
    return percentile(values, 0.5)


@contextlib.contextmanager
def model_of_shape(shape: str, folder: Path | None) -> Iterator[Path]:
    """`folder`, or without one a random model of a shape of `tools.random_model`, gone afterwards."""
    if folder is not None:
        yield folder
        return
    from tools.random_model import SHAPES, write_random_model

    with tempfile.TemporaryDirectory() as scratch:
        write_random_model(Path(scratch), SHAPES[shape])
        yield Path(scratch)


@dataclass(frozen=True, slots=True)
class ServerProcess:
    address: str
    pid: int
    ready_s: float  # from the start of the process to its ready line


@contextlib.asynccontextmanager
async def server(model: Path | str | None, *flags: str) -> AsyncIterator[ServerProcess]:
    """A `continuo serve` of its own on a free port, without a data dir unless `flags` give one; stopped at
    the end.
    """
    command = [sys.executable, "-m", "tools.cli", "serve", *([str(model)] if model else [])]
    command += ["--listen", "127.0.0.1:0", *flags]
    if "--data-dir" not in flags:
        command += ["--data-dir", "none"]
    begun = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=sys.stderr
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the server did not start: {' '.join(command)}")
        yield ServerProcess(line.split()[-1], process.pid, time.perf_counter() - begun)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
