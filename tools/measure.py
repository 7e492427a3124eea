"""What the benchmarks share: the machine they ran on, models, percentiles, and the result file."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, versions: what a figure means nothing without."""
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
        "torch": package_version("torch"),
    }


def package_version(name: str) -> str | None:
    """None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The checked-out commit, with `+` behind it when the tree differs from it."""
    run = [["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
    try:
        head, changes = (
            subprocess.run(c, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()
            for c in run
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def write_result(name: str, figures: dict[str, Any], path: Path | None = None) -> Path:
    """`tools/results/NAME.json`, or `path`, with the command, date, commit and machine beside the figures."""
    RESULTS.mkdir(exist_ok=True)
    path = path or RESULTS / f"{name}.json"
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


class DramRead:
    """Sums 3 GiB with all threads: the most that weights and KV can be read with.  On a virtual machine some
    of the memory is nearer than the rest: one GiB was seen at 77 GB/s where most are read at 46.
    """

    def __init__(self) -> None:
        import torch

        self._data = torch.ones(3 * 2**28, dtype=torch.float32)

    def measure(self, seconds: float = 0.5) -> float:
        """GB/s, the best of `seconds`."""
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            begun = time.perf_counter()
            self._data.sum()
            best = min(best, time.perf_counter() - begun)
        return self._data.nbytes / best / 1e9


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of all are not above; nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


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


def median(values: Sequence[float]) -> float:
    return percentile(values, 0.5)


def server_arguments(model: Path | None, *flags: str) -> list[str]:
    """For a server of one's own that keeps nothing on disk."""
    given = [str(model.absolute())] if model else []
    return [*given, "--listen", "127.0.0.1:0", "--data-dir", "none", *flags]
