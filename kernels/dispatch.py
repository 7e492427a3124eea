"""Which implementation of the kernels runs on this machine: native C, or torch where that cannot be built.

Decided at the first call, which compiles the C code if nobody has done so before (about a second).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kernels.native.build import BuildError, InstructionSet, supported
from kernels.native.library import Library, load

Implementation = Literal["native", "torch"]


@dataclass(frozen=True)
class _Choice:
    library: Library | None
    description: str


_override: _Choice | None = None  # set by `use` only


def implementation() -> Implementation:
    """The implementation that kernel calls use now."""
    return "torch" if library() is None else "native"


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

    Raises BuildError or OSError where `isa`, by default the best one, cannot be built or loaded.
    """
    global _override
    if name == "torch":
        choice = _Choice(None, "torch (asked for)")
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
