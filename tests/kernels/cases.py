"""What kernel tests share: the bound on errors, the builds this CPU runs, paged caches with traps in them."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.native.build import supported
from kernels.paged_attention import AttnMeta

DTYPES = [torch.float32, torch.bfloat16]
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler found")


def why_not_native() -> str:
    """Nothing where the native kernels run.  A compiler that fails is no excuse."""
    if not supported():
        return "no native kernels for this CPU and system; the torch path is tested by itself"
    if shutil.which("gcc") is None and dispatch.implementation() == "torch":
        return "no C compiler found; the torch path is tested by itself"
    return ""


needs_native = pytest.mark.skipif(bool(why_not_native()), reason=why_not_native())


def builds() -> Iterator[str]:
    """Runs the loop's body once under every build of the native kernels that this CPU can execute."""
    for isa in supported():
        with dispatch.use("native", isa):
            yield isa.name


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_within_noise(out: Tensor, ref: Callable[..., Tensor], *args: object) -> None:
    """`out` may be off by twice what plain torch loses in the same dtype, against float64."""
    exact = ref(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
    noise = _distance(ref(*args), exact)
    error = _distance(out, exact)
    assert error <= 2 * noise + 1e-5, f"{error=:.2e} {noise=:.2e}"


def _distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and torch.equal(a.isinf(), b.isinf()) and not a.isnan().any()
    return float((a.double() - b.double()).where(~b.isinf(), 0.0).abs().max()) if a.numel() else 0.0


@dataclass(frozen=True)
class Paged:
    """One step's attention: q [T, H, D], kv [B, 2, G, P, D] with NaN wherever no row may look."""

    q: Tensor
    kv: Tensor
    meta: AttnMeta

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    def to(self, dtype: torch.dtype) -> "Paged":
        return replace(self, q=self.q.to(dtype), kv=self.kv.to(dtype))

    def with_tables(self, tables: Tensor) -> "Paged":
        meta = self.meta
        return replace(self, meta=AttnMeta(meta.q_indptr, meta.first_pos, tables, meta.positions, meta.slots))

    def rows(self, segment: int, begin: int, end: int) -> "Paged":
        """The same rows alone: rows begin:end of one segment, as a step of their own."""
        meta = self.meta
        start = int(meta.q_indptr[segment])
        at = slice(start + begin, start + end)
        alone = AttnMeta(
            torch.tensor([0, end - begin], dtype=torch.int32),
            meta.first_pos[segment : segment + 1] + begin,
            meta.block_tables[segment : segment + 1],
            meta.positions[at],
            meta.slots[at],
        )
        return Paged(self.q[at], self.kv, alone)


def paged(
    new: list[int],
    cached: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    slots: int = 16,
    holes: float = 0.0,
) -> Paged:
    """Segments of new[s] rows after cached[s] positions, their blocks in random places, some of them lost."""
    lengths = [n + c for n, c in zip(new, cached, strict=True)]
    counts = [-(-length // slots) for length in lengths]
    blocks = sum(counts) + 3
    places = iter(torch.randperm(blocks).tolist())
    tables = torch.full((len(new), max(counts) + 1), -1, dtype=torch.int32)
    kv = torch.full((blocks, 2, kv_heads, slots, size), torch.nan)
    for segment, length in enumerate(lengths):
        for index in range(counts[segment]):
            place = next(places)
            filled = min(slots, length - index * slots)
            kv[place, :, :, :filled] = torch.randn(2, kv_heads, filled, size)
            tables[segment, index] = place if torch.rand(()) >= holes else -1
    positions = [torch.arange(c, c + n) for n, c in zip(new, cached, strict=True)]
    meta = AttnMeta(
        torch.tensor([0, *accumulate(new)], dtype=torch.int32),
        torch.tensor(cached, dtype=torch.int32),
        tables,
        torch.cat(positions),
        torch.full((sum(new),), -1),
    )
    return Paged(torch.randn(sum(new), heads, size), kv, meta)
