"""Which implementation of the kernels runs: Triton for tensors on a GPU; for others native C, or torch where
that cannot be built.

The latter is decided at the first call, which compiles the C code if nobody has done so before (about a
second).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kernels.native.build import BuildError, InstructionSet, supported
from kernels.native.library import Library, load

Implementation = Literal["native", "torch", "triton"]


@dataclass(frozen=True)
class _Choice:
    library: Library | None
    description: str
    is_triton: bool = False


_override: _Choice | None = None  # set by `use` only


def implementation() -> Implementation:
    """The implementation that kernel calls use now for tensors in the host's memory."""
    if _override and _override.is_triton:
        return "triton"
    return "torch" if library() is None else "native"


def is_triton(x: Tensor) -> bool:
    """Whether the Triton kernels compute what begins with `x`."""
    return x.is_cuda or (_override is not None and _override.is_triton)


def library() -> Library | None:
    """The native kernels, or None where torch runs in their place."""
    return (_override or _default()).library


def covers(dtype: torch.dtype) -> bool:
    """Whether the native kernels compute in it; torch takes the others."""
    return dtype == torch.bfloat16 or dtype == torch.float32


def describe() -> str:
    """One line for people: what runs, and if it is torch, why and what to do about it."""
    return (_override or _default()).description


@contextmanager
def use(name: Implementation, isa: InstructionSet | None = None) -> Iterator[None]:
    """Run the body under another implementation or build.  For tests and benchmarks: it changes the process.
    Triton takes tensors in the host's memory only in its interpreter.

    Raises BuildError or OSError where `isa`, by default the best one, cannot be built or loaded.
    """
    global _override
    if name != "native":
        choice = _Choice(None, f"{name} (asked for)", is_triton=name == "triton")
    else:
        choice = _native(isa or supported()[0])
    before, _override = _override, choice
    try:
        yield
    finally:
        _override = before


@functools.cache
def _native(isa: InstructionSet) -> _Choice:
    return _Choice(load(isa), f"native {isa.title}")


@functools.cache
def _default() -> _Choice:
    failures: list[str] = []
    for isa in supported():
        try:
            choice = _native(isa)
        except (BuildError, OSError) as error:
            failures.append(f"{isa.title}: {error}")
        else:
            return replace(choice, description="; ".join((choice.description, *failures)))
    reason = failures[0].partition(": ")[2] if failures else "native kernels need Linux on x86-64 with AVX2"
    return _Choice(None, f"torch ({reason})")
