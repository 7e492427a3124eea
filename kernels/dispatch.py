"""Which implementation of the kernels runs on this machine: native C, or torch where no compiler is at hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Implementation = Literal["native", "torch"]

_chosen: Implementation = "torch"


def implementation() -> Implementation:
    """The implementation every kernel call uses."""
    return _chosen


def describe() -> str:
    """One line for people: what runs, and if it is not the fastest, why and what to do."""
    return "torch"


@contextmanager
def use(name: Implementation) -> Iterator[None]:
    """Run the body under another implementation.  For tests and benchmarks: it changes the whole process."""
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before
