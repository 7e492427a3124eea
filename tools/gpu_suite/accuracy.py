"""Results against float64: nobody may be off by much more than plain torch in the same dtype."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_NOISE, _WORST = 2.0, 4.0  # times what torch loses: over all elements, and at the worst one
_SMALLEST = 1e-5  # relative: what fp32 sums in another order may differ by

Values = Tensor | Sequence[Tensor]


class Wrong(Exception):
    """A result is not what it should be."""


def compare(outs: Values, ref: Callable[..., Values], *args: object) -> dict[str, Any]:
    """Relative Frobenius errors of all results together, where -inf is only equal to -inf.  Raises Wrong."""
    exact = _flat(ref(*(_wide(arg) for arg in args)))
    usual = _flat(ref(*args))
    found = _flat(outs)
    errors, noises = [], []
    for number, (out, plain, right) in enumerate(zip(found, usual, exact, strict=True)):
        error, worst = _distances(out, right, f"result {number}")
        noise, worst_noise = _distances(plain, right, f"the reference's result {number}")
        size = float(right[~right.isinf()].norm()) or 1.0
        if error > _NOISE * noise + _SMALLEST * size or worst > _WORST * worst_noise + _SMALLEST:
            raise Wrong(
                f"result {number} is off by {error / size:.2e} (worst {worst:.2e}), "
                f"torch by {noise / size:.2e} (worst {worst_noise:.2e})"
            )
        errors.append(error / size)
        noises.append(noise / size)
    return {"error": float(f"{max(errors):.3g}"), "noise": float(f"{max(noises):.3g}")}


def require_equal(a: Tensor, b: Tensor, what: str) -> None:
    """Bit for bit.  Raises Wrong."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Wrong(f"{what}: {a.dtype} {list(a.shape)} is not {b.dtype} {list(b.shape)}")
    if not torch.equal(a, b):
        raise Wrong(f"{what}: {int((a != b).sum())} of {a.numel()} elements differ")


@contextmanager
def poisoned() -> Iterator[None]:
    """In the body, memory that torch hands out is full of NaN, or of the largest integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _wide(arg: object) -> object:
    return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg


def _flat(values: Values) -> list[Tensor]:
    return [values.cpu()] if isinstance(values, Tensor) else [value.cpu() for value in values]


def _distances(a: Tensor, b: Tensor, what: str) -> tuple[float, float]:
    """Frobenius norm and maximum of the difference."""
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        raise Wrong(f"{what} holds NaN, or has the wrong shape {list(a.shape)} for {list(b.shape)}")
    infinite = b.isinf()
    if not torch.equal(a.isinf(), infinite):
        raise Wrong(f"{what} is infinite where it should not be, or the reverse")
    difference = (a.double() - b.double()).masked_fill(infinite | b.isnan(), 0.0)
    return float(difference.norm()), float(difference.abs().max()) if difference.numel() else 0.0
