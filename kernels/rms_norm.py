"""RMSNorm over the last axis, alone or together with the residual addition before it."""

import ctypes
import functools

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import described
from kernels.native.library import NormArgs


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight.  x: [..., N], weight: [N] in x's dtype or fp32 -> as x, contiguous.

    Normalised in fp32, rounded to the weight's dtype, then multiplied by it: the order models are trained in.
    Raises ValueError for arguments that do not fit together.
    """
    _check(x, weight)
    if dispatch.is_triton(x):
        from kernels.gpu import norm

        return norm.rms_norm(x, weight, eps)
    library = dispatch.library()
    if library is None or not dispatch.covers(x.dtype):
        return rms_norm_ref(x, weight, eps)
    rows = _rows(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
    out = torch.empty_like(rows)
    args = _arguments(*rows.shape, rows.stride(0), 0, x.dtype, weight.dtype, torch.get_num_threads(), eps)
    library.rms_norm(args, rows.data_ptr(), None, weight.data_ptr(), out.data_ptr(), None)
    return out if x.dim() == 2 else out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + residual; returns (rms_norm(s), s).  x, residual: [T, N], neither is written.

    Raises ValueError for arguments that do not fit together.
    """
    _check(x, weight)
    if x.dim() != 2 or residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(f"residual must be [T, N] like x {described(x)}, got {described(residual)}")
    if dispatch.is_triton(x):
        from kernels.gpu import norm

        return norm.add_rms_norm(x, residual, weight, eps)
    library = dispatch.library()
    if library is None or not dispatch.covers(x.dtype):
        total = x + residual
        return rms_norm_ref(total, weight, eps), total
    x, residual = _rows(x), _rows(residual)
    out, total = torch.empty_like(x), torch.empty_like(x)
    strides = x.stride(0), residual.stride(0)
    args = _arguments(*x.shape, *strides, x.dtype, weight.dtype, torch.get_num_threads(), eps)
    addresses = x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr()
    library.rms_norm(args, *addresses)
    return out, total


def _check(x: Tensor, weight: Tensor) -> None:
    if not x.is_floating_point() or not x.dim() or x.data_ptr() % x.itemsize:
        raise ValueError(f"x must be [..., N] of a float dtype, got {described(x)}")
    dtype = weight.dtype
    if (
        weight.shape != x.shape[-1:]
        or not (dtype == x.dtype or dtype == torch.float32)
        or not weight.is_contiguous()
        or weight.device != x.device
    ):
        wanted = f"contiguous [{x.shape[-1]}] in float32 or x's dtype"
        raise ValueError(f"weight must be {wanted}, got {described(weight)} for x {described(x)}")


def _rows(x: Tensor) -> Tensor:
    """x with the elements of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


@functools.lru_cache(maxsize=256)  # a step asks for the same two dozens of times
def _arguments(
    rows: int,
    size: int,
    x_stride: int,
    residual_stride: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    threads: int,
    eps: float,
) -> object:
    are_bf16 = dtype == torch.bfloat16, weight_dtype == torch.bfloat16
    return ctypes.pointer(NormArgs(rows, size, x_stride, residual_stride, *are_bf16, threads, eps))
