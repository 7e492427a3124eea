"""Rotation with the cache write: against float64, at the right places, and nowhere else."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.paged_attention import AttnMeta
from kernels.rms_norm import rms_norm_ref
from kernels.rope import HeadNorms, rope_kv_write, rope_ref
from tests.kernels.cases import assert_within_noise

SIZES = [8, 40, 80, 96, 128, 256]
BLOCKS = 7


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """New memory is full of NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """q, k, v as views of one fused row, a cache of NaN, and slots out of order, one of them nowhere."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos_sin: Tensor | None
    kv: Tensor
    positions: Tensor
    slots: Tensor
    norms: HeadNorms | None = None

    @classmethod
    def of(
        cls,
        size: int,
        heads: int = 6,
        kv_heads: int = 2,
        per_block: int = 16,
        slots: tuple[int, ...] = (5, -1, 100, 3, 2, 1, 0, 50, 60),
    ) -> "Case":
        rows = len(slots)
        fused = torch.randn(rows, (heads + 2 * kv_heads) * size)
        widths = [heads * size, kv_heads * size, kv_heads * size]
        q, k, v = (x.view(rows, x.shape[1] // size, size) for x in fused.split(widths, dim=1))
        angles = torch.randn(40, size // 2)
        kv = torch.full((BLOCKS, 2, kv_heads, per_block, size), torch.nan)
        positions = torch.randint(40, (rows,))
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        return cls(q, k, v, cos_sin, kv, positions, torch.tensor(slots, dtype=torch.int64))

    @property
    def meta(self) -> AttnMeta:
        return AttnMeta(
            torch.tensor([0, len(self.positions)], dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(1, 1, dtype=torch.int32),
            self.positions,
            self.slots,
        )

    def normed(self) -> "Case":
        q_weight, k_weight = torch.randn(2, self.q.shape[2])
        return replace(self, norms=HeadNorms(q_weight, k_weight, 1e-5))

    def rows(self, begin: int, end: int) -> "Case":
        names = ("q", "k", "v", "positions", "slots")
        return replace(self, **{name: getattr(self, name)[begin:end] for name in names})

    def run(self) -> tuple[Tensor, Tensor]:
        """The rotated queries, and the cache as it is then."""
        kv = self.kv.clone()
        return rope_kv_write(self.q, self.k, self.v, self.cos_sin, kv, self.meta, self.norms), kv


def turned(x: Tensor, cos_sin: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    x = x if weight is None else rms_norm_ref(x, weight, eps)
    return x if cos_sin is None else rope_ref(x, cos_sin)


def assert_right(case: Case) -> None:
    out, kv = case.run()
    assert out.is_contiguous() and out.shape == case.q.shape
    angles = None if case.cos_sin is None else case.cos_sin[case.positions]
    q_weight, k_weight, eps = None, None, 0.0
    if case.norms is not None:
        q_weight, k_weight, eps = case.norms.q_weight, case.norms.k_weight, case.norms.eps
    assert_within_noise(out, turned, case.q, angles, q_weight, eps)
    kept = case.slots >= 0
    at = case.slots[kept] // case.kv.shape[3], case.slots[kept] % case.kv.shape[3]
    keys, values = kv[at[0], 0, :, at[1]], kv[at[0], 1, :, at[1]]
    assert_within_noise(keys, turned, case.k[kept], None if angles is None else angles[kept], k_weight, eps)
    assert torch.equal(values, case.v[kept])
    kv[at[0], :, :, at[1]] = torch.nan
    assert kv.isnan().all(), "wrote elsewhere"


@pytest.mark.parametrize("size", SIZES)
def test_rotation_and_write_agree_with_float64(size: int) -> None:
    assert_right(Case.of(size))


@pytest.mark.parametrize("size", SIZES)
def test_heads_are_normed_before_they_are_rotated(size: int) -> None:
    assert_right(Case.of(size).normed())


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=str)
def test_half_precision_is_rounded_where_the_reference_rounds(weight_dtype: torch.dtype) -> None:
    """In float16; the interpreter computes bfloat16 wrongly."""
    case = Case.of(40).normed()
    norms = replace(
        case.norms, **{name: getattr(case.norms, name).to(weight_dtype) for name in ("q_weight", "k_weight")}
    )
    case = replace(case, **{name: getattr(case, name).half() for name in ("q", "k", "v", "kv")}, norms=norms)
    assert_right(case)
    expected = turned(case.q, case.cos_sin[case.positions], norms.q_weight, norms.eps)
    assert (case.run()[0] == expected).float().mean() > 0.99


def test_without_angles_queries_and_keys_stay_as_they_are() -> None:
    case = replace(Case.of(40), cos_sin=None)
    out, _ = case.run()
    assert torch.equal(out, case.q)
    assert_right(case)
    assert_right(case.normed())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "per_block", "rows"), [(1, 1, 16, 1), (14, 2, 32, 3), (7, 7, 64, 5), (32, 8, 16, 2)]
)
def test_any_numbers_of_heads_rows_and_slots_fit(
    heads: int, kv_heads: int, per_block: int, rows: int
) -> None:
    slots = torch.randperm(BLOCKS * per_block)[:rows].tolist()
    assert_right(Case.of(64, heads, kv_heads, per_block, slots=tuple(slots)))


def test_a_step_of_no_rows_writes_nothing() -> None:
    out, kv = Case.of(64, slots=()).run()
    assert out.shape == (0, 6, 64) and kv.isnan().all()


def test_rows_that_go_nowhere_are_rotated_all_the_same() -> None:
    assert_right(Case.of(64, slots=(-1, -1)))


def test_each_input_may_have_rows_of_its_own() -> None:
    case = Case.of(64)
    wide = torch.full((len(case.q), 6 * 64 + 4), torch.nan)
    q = wide[:, : 6 * 64].view(-1, 6, 64).copy_(case.q)
    assert_right(replace(case, q=q, k=case.k.contiguous()))


def test_blocks_may_stand_apart_in_memory() -> None:
    """As the layers of a block do that lies in one piece."""
    case = Case.of(64)
    layers = torch.full((BLOCKS, 3, *case.kv.shape[1:]), torch.nan)
    rope_kv_write(case.q, case.k, case.v, case.cos_sin, layers[:, 1], case.meta)
    assert torch.equal(layers[:, 1].isnan(), case.run()[1].isnan())
    torch.testing.assert_close(layers[:, 1], case.run()[1], rtol=0, atol=0, equal_nan=True)
    assert layers[:, 0].isnan().all() and layers[:, 2].isnan().all()


def file_of_holes(folder: Path, *shape: int) -> Tensor:
    """Only what is written to takes space."""
    with (folder / "sparse").open("wb") as file:
        file.truncate(4 * math.prod(shape))
    return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)


def test_slots_are_found_beyond_the_elements_that_32_bits_count(tmp_path: Path) -> None:
    case = Case.of(256, kv_heads=4, per_block=64, slots=(2**31 // (2 * 4 * 256) + 70, 3))
    kv = file_of_holes(tmp_path, 2**31 // case.kv[0].numel() + 3, *case.kv.shape[1:])
    rope_kv_write(case.q, case.k, case.v, None, kv, case.meta)
    block, offset = divmod(int(case.slots[0]), 64)
    assert torch.equal(kv[block, :, :, offset], torch.stack((case.k[0], case.v[0])))
    assert torch.equal(kv[0, :, :, 3], torch.stack((case.k[1], case.v[1])))
    assert not kv[0, :, :, 4:].any() and not kv[block, :, :, :offset].any()


def test_rows_may_lie_beyond_the_elements_that_32_bits_count(tmp_path: Path) -> None:
    case = Case.of(8, slots=(1, 2, 3))
    memory = file_of_holes(tmp_path, 2**31 + 4096)
    far = {
        name: memory.as_strided(x.shape, (2**30, 8, 1), at).copy_(x)
        for name, x, at in (("q", case.q, 0), ("k", case.k, 64), ("v", case.v, 96))
    }
    assert_right(replace(case, **far))


def test_rows_have_the_same_bits_alone_and_among_others() -> None:
    case = Case.of(80, slots=tuple(torch.randperm(BLOCKS * 16)[:40].tolist())).normed()
    out, kv = case.run()
    for begin, end in ((0, 1), (39, 40), (3, 29)):
        alone, kv_alone = case.rows(begin, end).run()
        assert torch.equal(out[begin:end], alone)
        written = ~kv_alone.isnan()
        assert written.any() and torch.equal(kv[written], kv_alone[written])


def changed(**changes: Callable[[Case], Any]) -> Callable[[], Case]:
    def make() -> Case:
        case = Case.of(16).normed()
        return replace(case, **{name: change(case) for name, change in changes.items()})

    return make


def shifted(x: Tensor) -> Tensor:
    return torch.zeros(x.numel() + 1)[1:].view(x.shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Case.of(12),
            r"q must be \[T, H, D\] with D a multiple of 8 up to 256, got float32 \[9, 6, 12",
        ),
        (lambda: Case.of(264), r"D a multiple of 8 up to 256, got float32 \[9, 6, 264\]"),
        (changed(q=lambda c: c.q.double()), "q must be float32, bfloat16 or float16 on a GPU, got float64"),
        (
            changed(q=lambda c: c.q.transpose(0, 1)),
            r"q must be float32 \[6, 9, 16\] with strides \(any, 16, 1\)",
        ),
        (changed(q=lambda c: shifted(c.q)), "q must begin at a multiple of 16 bytes"),
        (changed(k=lambda c: c.k[:, :1]), r"k must be float32 \[9, 2, 16\] .* got float32 \[9, 1, 16\]"),
        (changed(k=lambda c: shifted(c.k)), "k must begin at a multiple of 16 bytes"),
        (changed(v=lambda c: c.v.double()), r"v must be float32 \[9, 2, 16\] .* got float64"),
        (changed(v=lambda c: c.v[:8]), r"v must be float32 \[9, 2, 16\] .* got float32 \[8, 2, 16\]"),
        (changed(kv=lambda c: c.kv[:, :1]), r"kv must be \[B, 2, G, P, 16\] to go with q"),
        (changed(kv=lambda c: c.kv.half()), "kv must be contiguous and of q's torch.float32, got float16"),
        (changed(kv=lambda c: c.kv.transpose(2, 3)), "each block of kv must be contiguous"),
        (changed(kv=lambda c: c.kv[:6]), "slot 100 is beyond the 6 blocks of 16 slots"),
        (changed(cos_sin=lambda c: c.cos_sin[:, :8]), r"cos_sin must be contiguous float32 \[M, 16\]"),
        (changed(cos_sin=lambda c: c.cos_sin.half()), r"cos_sin must be contiguous float32 .* got float16"),
        (
            changed(positions=lambda c: torch.arange(32, 41)),
            r"positions 32 \.\. 40 are not all in the 40 rows of cos_sin",
        ),
        (changed(positions=lambda c: torch.arange(-1, 8)), r"positions -1 \.\. 7 are not all"),
        (
            changed(norms=lambda c: replace(c.norms, q_weight=c.norms.q_weight.half())),
            r"q_weight must be contiguous \[16\] in float32 or q's dtype, both alike, got float16 \[16\]",
        ),
        (
            changed(norms=lambda c: replace(c.norms, k_weight=c.norms.k_weight[:8])),
            r"k_weight must be contiguous \[16\] .* got float32 \[8\]",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name_before_anything_is_written(
    make: Callable[[], Case], message: str
) -> None:
    case = make()
    with pytest.raises(ValueError, match=message):
        rope_kv_write(case.q, case.k, case.v, case.cos_sin, case.kv, case.meta, case.norms)
    assert case.kv.isnan().all()


def test_rows_that_the_step_does_not_have_are_refused() -> None:
    case = Case.of(16)
    with pytest.raises(ValueError, match="positions must be of q's 9 rows, got 8"):
        rope_kv_write(case.q, case.k, case.v, case.cos_sin, case.kv, case.rows(0, 8).meta)
    assert case.kv.isnan().all()
