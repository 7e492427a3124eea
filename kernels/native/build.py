"""Compiles the C kernels: one shared library per instruction set, about a second each, kept under a name that
changes with source and flags.  `python -m kernels.native.build` builds the best for this CPU.

The libraries use the OpenMP runtime that torch has loaded: two runtimes in one process would each keep a
thread per core.
"""

import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_SOURCES = ("attention.c", "decoder_layers.c", "linear.c", "rowwise.c")
_HEADERS = ("kernels.h", "load.h", "product.h", "simd.h", "team.h")
_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno"),
    "-ffp-contract=off",  # products are fused where the source says so, never where the compiler likes
)
_SANITIZER_FLAGS: tuple[str, ...] = ()  # of compiler and linker; tools/sanitize.sh builds with some
_TIMEOUT_S = 120
HOW_TO_GET_ONE = "for native kernels: apt install gcc, or dnf, pacman, apk; then start again"


class BuildError(Exception):
    """The kernels could not be compiled here; the message says why and what to do."""


@dataclass(frozen=True)
class InstructionSet:
    """A build of the kernels.  cpu_flags as in /proc/cpuinfo; all are needed."""

    name: str
    title: str
    compiler_flags: tuple[str, ...]
    cpu_flags: frozenset[str]


def _set(name: str, title: str, *flags: str) -> InstructionSet:
    cpu_flags = frozenset(flag.replace("-", "_").replace("avx512bf16", "avx512_bf16") for flag in flags)
    return InstructionSet(name, title, tuple(f"-m{flag}" for flag in flags), cpu_flags)


_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
INSTRUCTION_SETS = (  # best first
    _set("amx_bf16", "AMX BF16", *_AVX512, "avx512bf16", "amx-tile", "amx-bf16"),
    _set("avx512_bf16", "AVX-512 BF16", *_AVX512, "avx512bf16"),
    _set("avx512", "AVX-512", *_AVX512),
    _set("avx2", "AVX2", *_AVX2),
)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, in the words of /proc/cpuinfo; empty on anything but Linux on x86-64."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return frozenset()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


def supported() -> tuple[InstructionSet, ...]:
    """The instruction sets this machine can run, best first; none where the kernels do not apply at all."""
    return tuple(isa for isa in INSTRUCTION_SETS if isa.cpu_flags <= cpu_flags())


def build(isa: InstructionSet) -> Path:
    """The library for `isa`, compiled now unless it is there already.  Raises BuildError."""
    name = f"{isa.name}-{_fingerprint(isa)}.so"
    folders = [_HERE / "_build", Path(tempfile.gettempdir()) / f"continuo-kernels-{os.getuid()}"]
    for folder in folders:
        if (folder / name).exists() and _only_ours(folder):
            return folder / name
    compiler = shutil.which("gcc")
    if compiler is None:
        raise BuildError(f"no C compiler found; {HOW_TO_GET_ONE}")
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and _only_ours(folder):
            _compile(compiler, isa, folder / name)
            return folder / name
    raise BuildError(f"no folder to build in: make {folders[0]} or {folders[1]} yours and writable")


def _compile(compiler: str, isa: InstructionSet, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        sources = [str(_HERE / source) for source in _SOURCES]
        objects = [Path(source).with_suffix(".o").name for source in _SOURCES]
        _run([compiler, *_FLAGS, *isa.compiler_flags, *_SANITIZER_FLAGS, "-c", *sources], work)
        linking = ("-shared", "-Wl,-z,defs", *_SANITIZER_FLAGS)
        _run([compiler, *linking, *objects, openmp_runtime(), "-lm", "-o", "kernels.so"], work)
        os.replace(Path(work) / "kernels.so", target)  # whole or not at all, whoever else builds it now


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"compiling the kernels failed: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"compiling the kernels failed: {' | '.join(errors[:3])} (by {' '.join(command)})")


def openmp_runtime() -> str:
    """The runtime torch was shipped with, whatever its name; the system's, as a linker calls it, where torch
    uses that.
    """
    root = Path(torch.__file__).parent
    shipped = [*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")]
    return str(shipped[0]) if shipped else "-lgomp"


def _fingerprint(isa: InstructionSet) -> str:
    digest = hashlib.sha256(
        repr((*_FLAGS, *_SANITIZER_FLAGS, *isa.compiler_flags, openmp_runtime())).encode()
    )
    for file in (*_SOURCES, *_HEADERS):
        digest.update((_HERE / file).read_bytes())
    return digest.hexdigest()[:16]


def _only_ours(folder: Path) -> bool:
    """Whether nobody but this user (or root) can have put a library there."""
    info = folder.lstat()
    writable_by_others = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(info.st_mode) and info.st_uid in (os.getuid(), 0) and not writable_by_others


def main() -> int:
    """Builds the best set that compiles, as kernels.dispatch will choose it."""
    if not supported():
        print(f"kernels: torch only ({platform.machine()} on {sys.platform} has no native build)")
        return 0
    for isa in supported():
        begin = time.monotonic()
        try:
            path = build(isa)
        except BuildError as error:
            print(f"kernels: no {isa.title} build: {error}", file=sys.stderr)
            continue
        print(f"kernels: native {isa.title}, {path.name}, {time.monotonic() - begin:.1f} s")
        return 0
    print("kernels: torch only", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
