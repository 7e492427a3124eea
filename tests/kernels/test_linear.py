"""Packed linears: right, independent of how many rows there are, and no second copy of the weight."""

import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.linear import PackedLinear, rows_are_independent
from kernels.native.build import supported
from tests.kernels.cases import DTYPES, assert_within_noise, threads, why_not_native

BUILDS = [] if why_not_native() else [isa for isa in supported() if "avx512_bf16" in isa.cpu_flags]
needs_dots = pytest.mark.skipif(
    not BUILDS,
    reason=why_not_native()
    or "no bf16 dots in this CPU; oneDNN runs in place of the native kernel and is tested by itself",
)
# [N, K] of the linears of llama-160m and qwen2.5-0.5b, their vocabularies cut short.
MODEL_SHAPES = [
    *[(2304, 768), (768, 768), (6144, 768), (768, 3072), (3200, 768)],
    *[(1152, 896), (896, 896), (9728, 896), (896, 4864), (1519, 896)],
]
# Ends inside a tile in every way, and more than the kernel takes at once.
ODD_SHAPES = [(1, 1), (1, 33), (15, 31), (17, 32), (33, 34), (100, 72), (65, 1025)]


def builds() -> Iterator[None]:
    """Runs the loop's body once under every build that has the native kernel."""
    for isa in BUILDS:
        with dispatch.use("native", isa):
            yield


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("implementation", ["default", "torch"])
def test_products_agree_with_float64(dtype: torch.dtype, with_bias: bool, implementation: str) -> None:
    weight = torch.randn(100, 72).to(dtype)
    bias = torch.randn(100).to(dtype) if with_bias else None
    if implementation == "torch":
        with dispatch.use("torch"):
            linear = PackedLinear(weight, bias)
    else:
        linear = PackedLinear(weight, bias)
    for rows in (0, 1, 3, 4, 33):
        x = torch.randn(rows, 80).to(dtype)[:, :72]
        assert_within_noise(linear(x), F.linear, x, weight, bias)


@needs_dots
@pytest.mark.parametrize(("outputs", "inputs"), [*MODEL_SHAPES, *ODD_SHAPES])
def test_the_native_kernel_agrees_with_float64_at_every_height(outputs: int, inputs: int) -> None:
    weight, bias = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    heights = (*range(1, 34), 79) if (outputs, inputs) in ODD_SHAPES else (1, 14, 33, 79)
    for _ in builds():
        for given in (bias, None):
            linear = PackedLinear(weight, given)
            for rows in heights:
                x = torch.randn(rows, inputs).bfloat16()
                assert_within_noise(linear(x), F.linear, x, weight, given)


@needs_dots
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (70, 4864)])
def test_many_rows_are_cut_without_a_seam(outputs: int, inputs: int) -> None:
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(1100, inputs).bfloat16()
    for _ in builds():
        assert_within_noise(PackedLinear(weight)(x), F.linear, x, weight)


@needs_dots
def test_what_lies_behind_the_operands_is_not_read() -> None:
    weight, x = torch.full((50, 90), torch.nan).bfloat16(), torch.full((40, 90), torch.nan).bfloat16()
    weight[:, :71], x[:, :71] = torch.randn(50, 71), torch.randn(40, 71)
    weight, x = weight[:33, :71], x[:19, :71]
    for _ in builds():
        out = PackedLinear(weight)(x)
        # Not so torch's own product of such views: its NaN here come from behind them.
        assert_within_noise(out, F.linear, x.contiguous(), weight.contiguous())


@needs_dots
def test_infinite_and_lost_numbers_stay_in_their_rows() -> None:
    weight, x = torch.ones(40, 64).bfloat16(), torch.ones(35, 64).bfloat16()
    x[3, 5], x[20, 7] = torch.inf, torch.nan
    for _ in builds():
        out = PackedLinear(weight)(x)
        assert out[3].isposinf().all() and out[20].isnan().all()
        out[3] = out[20] = 64
        assert (out == 64).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    if not rows_are_independent(dtype):
        pytest.skip(f"{dtype} products of this CPU split sums by the number of rows (kernels/linear.py)")
    for outputs, inputs in ((2304, 768), (768, 2048), (100, 64)):
        linear = PackedLinear(torch.randn(outputs, inputs).to(dtype))
        x = torch.randn(130, inputs).to(dtype)
        together = linear(x)
        for rows in (1, 2, 3, 5, 16, 33, 64, 129):
            assert torch.equal(linear(x[:rows]), together[:rows]), rows


@needs_dots
def test_bits_depend_neither_on_the_number_of_rows_nor_on_that_of_threads() -> None:
    for _ in builds():
        assert rows_are_independent(torch.bfloat16)
        for outputs, inputs in ((96, 768), (160, 4864), (35, 71)):
            linear = PackedLinear(torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16())
            x = torch.randn(1100, inputs).bfloat16()
            with threads(1):
                together = linear(x)
                for rows in range(1, 301):
                    assert torch.equal(linear(x[:rows]), together[:rows]), rows
                    assert torch.equal(linear(x[-rows:]), together[-rows:]), rows
            for count in (2, 3):
                with threads(count):
                    for rows in (1, 13, 31, 300, 1100):
                        assert torch.equal(linear(x[:rows]), together[:rows]), rows


@needs_dots
@pytest.mark.parametrize(("outputs", "inputs"), MODEL_SHAPES)
def test_in_the_shapes_of_models_a_row_has_the_same_bits_alone(outputs: int, inputs: int) -> None:
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(80, inputs).bfloat16()
    for _ in builds():
        linear = PackedLinear(weight)
        together = linear(x)
        for rows in (1, 8, 14, 15, 16, 17, 28, 32, 33, 79):
            assert torch.equal(linear(x[:rows]), together[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_packed_form_does_not_keep_the_weight_alive(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64).to(dtype)
    kept = weakref.ref(weight)
    x, linear = torch.randn(5, 64).to(dtype), PackedLinear(weight)
    before = linear(x)
    weight.zero_()
    assert torch.equal(linear(x), before)
    del weight
    assert kept() is None


def test_operands_that_do_not_fit_are_refused_with_their_shapes() -> None:
    linear = PackedLinear(torch.randn(6, 4))
    with pytest.raises(ValueError, match=r"x must be torch.float32 \[T, 4\], got torch.float32 \[2, 5\]"):
        linear(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"x must be torch.float32 \[T, 4\], got torch.bfloat16 \[2, 4\]"):
        linear(torch.randn(2, 4).bfloat16())
    with pytest.raises(ValueError, match=r"bias \[N\] of its dtype, got \[6, 4\] and torch.float32 \[4\]"):
        PackedLinear(torch.randn(6, 4), torch.randn(4))


@needs_dots
def test_a_weight_without_rows_or_columns_gives_what_torch_gives() -> None:
    assert PackedLinear(torch.empty(0, 4).bfloat16())(torch.ones(2, 4).bfloat16()).shape == (2, 0)
    bias: Tensor = torch.randn(3).bfloat16()
    assert torch.equal(PackedLinear(torch.empty(3, 0).bfloat16(), bias)(torch.ones(2, 0).bfloat16())[1], bias)


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="this torch has no oneDNN")
def test_onednn_meets_few_numbers_of_rows_and_none_that_wastes_much(monkeypatch: pytest.MonkeyPatch) -> None:
    met: set[int] = set()

    def product(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        met.add(len(x))
        return F.linear(x, matrix)

    monkeypatch.setattr("kernels.linear._native_library", lambda dtype: None)
    matrix = torch.randn(5, 7)
    linear = PackedLinear(matrix, None)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
    for rows in range(1, 513):
        x = torch.randn(rows, 7)
        torch.testing.assert_close(linear(x), F.linear(x, matrix))
        assert max(met) < rows + 32
    assert len(met) <= 32
