"""Packed linears: right, independent of how many rows there are, and no second copy of the weight."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from kernels.linear import PackedLinear, rows_are_independent
from tests.kernels.cases import DTYPES, assert_within_noise


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_agree_with_float64(dtype: torch.dtype, with_bias: bool) -> None:
    weight = torch.randn(100, 72).to(dtype)
    bias = torch.randn(100).to(dtype) if with_bias else None
    linear = PackedLinear(weight, bias)
    for rows in (0, 1, 3, 4, 33):
        x = torch.randn(rows, 80).to(dtype)[:, :72]
        assert_within_noise(linear(x), F.linear, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    if not rows_are_independent(dtype):
        pytest.skip(f"{dtype} products of this CPU split sums by the number of rows (kernels/linear.py)")
    for out_features, in_features in ((2304, 768), (768, 2048), (100, 64)):
        linear = PackedLinear(torch.randn(out_features, in_features).to(dtype))
        x = torch.randn(130, in_features).to(dtype)
        together = linear(x)
        for rows in (1, 2, 3, 5, 16, 33, 64, 129):
            assert torch.equal(linear(x[:rows]), together[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_packed_form_does_not_keep_the_weight_alive(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64).to(dtype)
    kept = weakref.ref(weight)
    linear = PackedLinear(weight)
    storage = weight.untyped_storage().data_ptr()
    assert linear._weight.is_mkldnn or linear._weight.untyped_storage().data_ptr() != storage
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
