"""Says where set-up should get torch: prints the package index (empty: pip's default) and, below it, why.

A machine without an NVIDIA driver should not download gigabytes of CUDA libraries. Which build the default
index would give is not visible in its name, so pip is asked what the wheel that it would take requires.
Run by tools/setup.sh with the Python of .venv before anything is installed there: standard library only.
"""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_DOWNLOAD_GB = 2.7  # torch 2.13.0 and all it requires, Linux x86-64, from the public index
PROBE_S = 3.0
ASK_PIP_S = 15.0  # it takes a second or two, unless the index makes pip fetch the whole wheel to answer


def choose(
    override: str,
    has_driver: Callable[[], bool],
    default_needs_cuda: Callable[[], bool],
    cpu_index_answers: Callable[[], bool],
) -> tuple[str, str]:
    """Return (index, reason); an empty index is pip's default. A fact is asked for only when it decides."""
    if override:
        return override, "from CONTINUO_TORCH_INDEX"
    if has_driver():
        return "", "NVIDIA driver found"
    if not default_needs_cuda():
        return "", "CPU build"
    if cpu_index_answers():
        return CPU_INDEX, "CPU build"
    return "", (
        f"no CPU build in reach: the CUDA build, about {CUDA_DOWNLOAD_GB} GB to download; "
        "stop with Ctrl-C and set CONTINUO_TORCH_INDEX to choose another package index"
    )


def has_nvidia_driver() -> bool:
    """Whether a driver is loaded here; a mere toolkit or card without one cannot run CUDA."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, timeout=30).returncode == 0


def default_index_needs_cuda(requirement: str) -> bool:
    """Whether pip's default torch requires CUDA libraries here; an index too slow to say counts as yes."""
    if sys.platform != "linux":
        return False  # the same metadata serves all platforms, and markers confine those libraries to Linux
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--no-deps", "--report", "-", requirement]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ASK_PIP_S)
    except subprocess.TimeoutExpired:
        return True
    if answer.returncode != 0:
        return True
    (torch,) = json.loads(answer.stdout)["install"]
    return requires_cuda(torch["metadata"].get("requires_dist", []))


def requires_cuda(requirements: list[str]) -> bool:
    """Whether a wheel with these requirements pulls CUDA libraries in."""
    return any(line.startswith(("nvidia-", "cuda-")) for line in requirements)


def answers(url: str) -> bool:
    """Whether the index at `url` can be reached within the probe's time."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=PROBE_S):
            return True
    except OSError:
        return False


def installed(requirement: str) -> bool:
    """Whether the pinned torch is here already, whichever build of it."""
    try:
        return requirement == "torch==" + metadata.version("torch").partition("+")[0]
    except metadata.PackageNotFoundError:
        return False


def pinned(constraints: str) -> str:
    """The line of the constraints that pins torch."""
    return next(line for line in constraints.splitlines() if line.startswith("torch=="))


def main() -> None:
    requirement = pinned(Path(__file__).with_name("constraints.txt").read_text())
    if installed(requirement):
        index, reason = "", "already here"
    else:
        index, reason = choose(
            os.environ.get("CONTINUO_TORCH_INDEX", ""),
            has_nvidia_driver,
            lambda: default_index_needs_cuda(requirement),
            lambda: answers(CPU_INDEX),
        )
    print(f"{index}\n{requirement} ({reason})")


if __name__ == "__main__":
    main()
