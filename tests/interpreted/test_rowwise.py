"""Norms and gated activations: against float64, each row for itself, and nothing else touched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_ref
from kernels.silu_mul import gelu_mul, gelu_mul_ref, silu_mul, silu_mul_ref
from tests.kernels.cases import assert_within_noise

SIZES = [1, 8, 100, 896, 1024, 4096]  # part of a program's tile, a program's, several vectors to a thread
GATES = [(silu_mul, silu_mul_ref), (gelu_mul, gelu_mul_ref)]


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN: what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        assert torch.empty(3).isnan().all()
        yield


def strided(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Two halves of one fused tensor with columns of NaN behind them, as a fused product leaves them."""
    gap = -2 * size % 4 + 4
    wide = torch.full((rows, 2 * (size + gap)), torch.nan)
    first, second = wide[:, :size], wide[:, size + gap :][:, :size]
    for x in (first, second):
        x.copy_(3 * torch.randn(rows, size))
    return first, second


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("size", SIZES)
def test_norms_agree_with_float64(size: int, rows: int) -> None:
    (x, residual), weight = strided(rows, -(-size // 4) * 4), torch.randn(size)
    x, residual = x[:, :size], residual[:, :size]
    out = rms_norm(x, weight, 1e-5)
    assert out.is_contiguous()
    assert_within_noise(out, rms_norm_ref, x, weight, 1e-5)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual) and normed.is_contiguous() and total.is_contiguous()
    assert_within_noise(normed, rms_norm_ref, total, weight, 1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("size", [2560, 3584, 5120, 8192, 16384])
def test_norms_of_large_models_agree_with_float64(size: int) -> None:
    x, residual, weight = torch.randn(3, size), torch.randn(3, size), torch.randn(size)
    assert_within_noise(rms_norm(x, weight, 1e-5), rms_norm_ref, x, weight, 1e-5)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert_within_noise(normed, rms_norm_ref, total, weight, 1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=str)
def test_half_precision_is_rounded_where_the_reference_rounds(weight_dtype: torch.dtype) -> None:
    """In float16; the interpreter computes bfloat16 wrongly."""
    x, residual, weight = 3 * torch.randn(5, 200), torch.randn(5, 200), torch.randn(200).to(weight_dtype)
    x, residual = x.half(), residual.half()
    assert_within_noise(rms_norm(x, weight, 1e-5), rms_norm_ref, x, weight, 1e-5)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual) and normed.dtype == torch.float16
    assert_within_noise(normed, rms_norm_ref, total, weight, 1e-5)
    assert (normed == rms_norm_ref(total, weight, 1e-5)).float().mean() > 0.99
    for gate, ref in GATES:
        assert_within_noise(gate(x), ref, x)


def test_a_norm_works_on_the_last_axis_of_any_shape() -> None:
    x, weight = torch.randn(2, 3, 24), torch.randn(24)
    for given in (x, x[0, 0], x.view(1, 2, 3, 24), x[:, :0]):
        assert_within_noise(rms_norm(given, weight, 1e-6), rms_norm_ref, given, weight, 1e-6)


def test_epsilon_keeps_a_row_of_nothing_finite() -> None:
    x, weight = torch.zeros(2, 40), torch.randn(40)
    assert torch.equal(rms_norm(x, weight, 1e-6), x)
    x[1] = 1e-4
    assert_within_noise(rms_norm(x, weight, 1e-6), rms_norm_ref, x, weight, 1e-6)


@pytest.mark.parametrize(("gate", "ref"), GATES)
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("size", SIZES)
def test_activations_agree_with_float64(
    size: int, rows: int, gate: Callable[[Tensor], Tensor], ref: Callable[[Tensor], Tensor]
) -> None:
    wide = torch.full((rows, 2 * size + 4), torch.nan)
    x = wide[:, : 2 * size]
    x.copy_(3 * torch.randn(rows, 2 * size))
    out = gate(x)
    assert out.is_contiguous()
    assert_within_noise(out, ref, x)


def test_activations_are_finite_where_the_exponential_is_not() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e30])
    both = torch.cat([gate, torch.ones(len(gate))])[None]
    near = gate.double().clamp_min(-200)
    torch.testing.assert_close(silu_mul(both)[0], near.sigmoid().float() * gate, rtol=1e-5, atol=1e-7)
    expected = torch.nn.functional.gelu(near, approximate="tanh").float()
    torch.testing.assert_close(gelu_mul(both)[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [40, 896])
def test_rows_have_the_same_bits_alone_and_among_others(size: int) -> None:
    x, residual, weight = torch.randn(40, 2 * size), torch.randn(40, size), torch.randn(size)
    ops: list[Callable[[slice], Tensor]] = [
        lambda rows: rms_norm(x[rows, :size], weight, 1e-6),
        lambda rows: add_rms_norm(x[rows, :size], residual[rows], weight, 1e-6)[0],
        lambda rows: silu_mul(x[rows]),
        lambda rows: gelu_mul(x[rows]),
    ]
    for op in ops:
        together = op(slice(0, 40))
        for begin, end in ((0, 1), (39, 40), (3, 29)):
            assert torch.equal(together[begin:end], op(slice(begin, end)))


def test_rows_may_lie_beyond_the_elements_that_32_bits_count(tmp_path: Path) -> None:
    """In a file of holes, of which only the rows take space."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(4 * (2**31 + 4096))
    memory = torch.from_file(file.name, shared=True, size=2**31 + 4096, dtype=torch.float32)
    x, weight = memory.as_strided((3, 100), (2**30, 1)).copy_(torch.randn(3, 100)), torch.randn(100)
    assert_within_noise(rms_norm(x, weight, 1e-6), rms_norm_ref, x, weight, 1e-6)
    normed, total = add_rms_norm(weight.expand(3, 100), x, weight, 1e-6)
    assert torch.equal(total, x + weight)
    assert_within_noise(normed, rms_norm_ref, total, weight, 1e-6)
    assert_within_noise(silu_mul(x), silu_mul_ref, x)


def test_inputs_stay_as_they_are() -> None:
    x, residual, weight = torch.randn(3, 100), torch.randn(3, 100), torch.randn(100)
    before = [t.clone() for t in (x, residual, weight)]
    rms_norm(x, weight, 1e-6)
    add_rms_norm(x, residual, weight, 1e-6)
    silu_mul(x)
    for now, was in zip((x, residual, weight), before, strict=True):
        assert torch.equal(now, was)


ROW = torch.zeros(4, 24)
SHIFTED = torch.zeros(4 * 24 + 1)[1:].view(4, 24)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rms_norm(ROW.double(), ROW[0].double(), 1e-6),
            r"x must be float32, .* got float64 \[4, 24\]",
        ),
        (lambda: rms_norm(torch.zeros(2, 16385), torch.zeros(16385), 1e-6), r"1 to 16384 .* \[2, 16385\]"),
        (lambda: rms_norm(torch.zeros(2, 0), torch.zeros(0), 1e-6), r"1 to 16384 elements, .* \[2, 0\]"),
        (lambda: rms_norm(ROW.T.contiguous().T, ROW[0], 1e-6), r"x must .* side by side, .* \(1, 4\)"),
        (lambda: rms_norm(SHIFTED, ROW[0], 1e-6), "x must begin at a multiple of 16 bytes"),
        (lambda: rms_norm(ROW, SHIFTED[0], 1e-6), "weight must begin at a multiple of 16 bytes"),
        (lambda: rms_norm(ROW, ROW[0, :8], 1e-6), r"weight must be contiguous \[24\].* got float32 \[8\]"),
        (lambda: add_rms_norm(ROW, ROW.T.contiguous().T, ROW[0], 1e-6), "residual must have the elements"),
        (lambda: add_rms_norm(ROW, SHIFTED, ROW[0], 1e-6), "residual must begin at a multiple of 16"),
        (lambda: add_rms_norm(ROW, ROW[:3], ROW[0], 1e-6), r"residual must be \[T, N\] like x .* \[3, 24\]"),
        (lambda: silu_mul(ROW.double()), r"x must be float32, bfloat16 or float16 on a GPU, got float64"),
        (lambda: silu_mul(ROW.T.contiguous().T), "x must have the elements of a row side by side"),
        (lambda: gelu_mul(SHIFTED), "x must begin at a multiple of 16 bytes"),
        (lambda: gelu_mul(ROW[:, :23]), r"x must be \[T, 2F\]"),
    ],
)
def test_what_the_kernels_are_not_made_for_is_refused_by_name(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call()
