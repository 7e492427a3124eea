"""Norms, gated activation, rotation with the cache write: against float64, each row for itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.paged_attention import AttnMeta
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_ref
from kernels.rope import rope_kv_write, rope_kv_write_ref, rope_ref
from kernels.silu_mul import gelu_mul, gelu_mul_ref, silu_mul, silu_mul_ref
from tests.kernels.cases import DTYPES, assert_within_noise, builds, needs_native

SIZES = [8, 90, 768, 1000]  # multiples of no vector, of one, of several
HEADS, KV_HEADS, SLOTS, BLOCKS = 6, 2, 16, 7


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_norms_and_activation_agree_with_float64(size: int, dtype: torch.dtype) -> None:
    wide = (3 * torch.randn(5, 2 * size)).to(dtype)
    x, residual = wide[:, :size], wide[:, size:]  # strided rows, as a fused product leaves them
    weight = torch.randn(size).to(dtype)
    for _ in builds():
        assert_within_noise(rms_norm(x, weight, 1e-5), rms_norm_ref, x, weight, 1e-5)
        normed, total = add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(total, x + residual)
        assert_within_noise(normed, rms_norm_ref, total, weight, 1e-5)
        assert_within_noise(silu_mul(wide), silu_mul_ref, wide)
        assert_within_noise(gelu_mul(wide), gelu_mul_ref, wide)


@needs_native
def test_a_weight_in_float32_multiplies_a_norm_before_it_is_rounded() -> None:
    x, residual = torch.randn(5, 96).bfloat16(), torch.randn(5, 96).bfloat16()
    weight = 1 + torch.randn(96)
    for _ in builds():
        for normed, of in (
            (rms_norm(x, weight, 1e-6), x),
            (add_rms_norm(x, residual, weight, 1e-6)[0], x + residual),
        ):
            assert normed.dtype == torch.bfloat16
            exact = rms_norm_ref(of.double(), weight.double(), 1e-6)
            assert (normed.double() - exact).abs().max() <= 2**-8 * exact.abs().max(), "rounded once"
            torch.testing.assert_close(normed, exact.bfloat16(), rtol=2**-7, atol=0)
            assert (normed == exact.bfloat16()).float().mean() > 0.99


@needs_native
def test_activation_is_finite_where_the_exponential_is_not() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -20.0, 0.0, 90.0, 200.0, 1e30])
    for _ in builds():
        both = torch.cat([gate, torch.ones(8)])[None]
        torch.testing.assert_close(
            silu_mul(both)[0], gate.clamp_min(-200).double().sigmoid().float() * gate, rtol=1e-5, atol=1e-7
        )
        expected = torch.nn.functional.gelu(gate.clamp_min(-200).double(), approximate="tanh").float()
        torch.testing.assert_close(gelu_mul(both)[0], expected, rtol=1e-5, atol=1e-7)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_have_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    x, residual, weight = (
        torch.randn(70, 768).to(dtype),
        torch.randn(70, 768).to(dtype),
        torch.randn(768).to(dtype),
    )
    ops: list[Callable[[slice], Tensor]] = [
        lambda rows: rms_norm(x[rows], weight, 1e-6),
        lambda rows: add_rms_norm(x[rows], residual[rows], weight, 1e-6)[0],
        lambda rows: silu_mul(x[rows]),
        lambda rows: gelu_mul(x[rows]),
    ]
    for _ in builds():
        for op in ops:
            together = op(slice(0, 70))
            for begin, end in ((0, 1), (69, 70), (3, 40)):
                assert torch.equal(together[begin:end], op(slice(begin, end)))


def test_norm_of_heads_works_on_the_last_axis() -> None:
    x, weight = torch.randn(5, 3, 24), torch.randn(24)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6))


def rope_case(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, AttnMeta]:
    """q, k, v as views of one fused row, a cache of NaN, and slots out of order, one of them nowhere."""
    slots = torch.tensor([5, -1, 100, 3, 2, 1, 0, 50, 60])
    rows = len(slots)
    fused = torch.randn(rows, (HEADS + 2 * KV_HEADS) * size).to(dtype)
    widths = [HEADS * size, KV_HEADS * size, KV_HEADS * size]
    q, k, v = (part.view(rows, -1, size) for part in fused.split(widths, dim=1))
    angles = torch.randn(40, size // 2)
    meta = AttnMeta(
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([3], dtype=torch.int32),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.arange(3, 3 + rows),
        slots,
    )
    kv = torch.full((BLOCKS, 2, KV_HEADS, SLOTS, size), torch.nan, dtype=dtype)
    return q, k, v, torch.cat([angles.cos(), angles.sin()], dim=1), kv, meta


def test_the_reference_rotates_as_complex_numbers_turn() -> None:
    q, k, v, cos_sin, kv, meta = rope_case(24, torch.float32)
    turned = rope_ref(q, cos_sin[meta.positions])
    cos, sin = cos_sin[meta.positions].chunk(2, dim=1)
    turn = torch.complex(cos, sin)[:, None]
    expected = torch.complex(*q.chunk(2, dim=-1)) * turn
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], dim=-1))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 24, 64, 80])
def test_rotation_and_write_do_what_the_reference_does(size: int, dtype: torch.dtype) -> None:
    q, k, v, cos_sin, kv, meta = rope_case(size, dtype)
    expected_kv = kv.clone()
    rope_kv_write_ref(q, k, v, cos_sin, expected_kv, meta)
    written = ~expected_kv.isnan()
    assert written.sum() == (len(meta.slots) - 1) * 2 * KV_HEADS * size
    for _ in builds():
        actual = kv.clone()
        rotated = rope_kv_write(q, k, v, cos_sin, actual, meta)
        assert rotated.is_contiguous()
        assert_within_noise(rotated, rope_ref, q, cos_sin[meta.positions])
        assert torch.equal(written, ~actual.isnan()), "wrote elsewhere"
        assert torch.equal(actual[:, 1][written[:, 1]], expected_kv[:, 1][written[:, 1]])
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(actual, expected_kv, rtol=tolerance, atol=tolerance, equal_nan=True)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_angles_queries_and_keys_stay_as_they_are(dtype: torch.dtype) -> None:
    q, k, v, _, kv, meta = rope_case(24, dtype)
    expected_kv = kv.clone()
    assert torch.equal(rope_kv_write_ref(q, k, v, None, expected_kv, meta), q)
    written = ~expected_kv.isnan()
    assert torch.equal(expected_kv[0, 0, :, 5], k[0]) and torch.equal(expected_kv[0, 1, :, 5], v[0])
    for _ in builds():
        actual = kv.clone()
        out = rope_kv_write(q, k, v, None, actual, meta)
        assert torch.equal(out, q) and out.is_contiguous()
        assert torch.equal(written, ~actual.isnan()) and torch.equal(actual[written], expected_kv[written])


@needs_native
def test_a_slot_or_position_out_of_range_is_refused_before_anything_is_written() -> None:
    q, k, v, cos_sin, kv, meta = rope_case(8, torch.float32)
    for _ in builds():
        with pytest.raises(ValueError, match="slot 100 is beyond the 6 blocks of 16 slots"):
            rope_kv_write(q, k, v, cos_sin, kv[:6], meta)
        with pytest.raises(ValueError, match=r"positions 3 \.\. 11 are not all in the 10 rows of cos_sin"):
            rope_kv_write(q, k, v, cos_sin[:10], kv, meta)
        with pytest.raises(ValueError, match="v must be float32"):
            rope_kv_write(q, k, v.double(), cos_sin, kv, meta)
    assert kv.isnan().all()


def test_torch_takes_over_where_it_is_asked_to() -> None:
    x = torch.randn(3, 8)
    with dispatch.use("torch"):
        assert torch.equal(rms_norm(x, x[0], 1e-6), rms_norm_ref(x, x[0], 1e-6))
        assert torch.equal(silu_mul(x), silu_mul_ref(x))
