"""RMSNorm over the last axis, alone or together with the residual addition before it."""

import ctypes

import torch
from torch import Tensor

from kernels import dispatch
from kernels.native.library import NormArgs


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight.  x: [..., N], weight: [N], same dtype -> as x, contiguous.

    Normalised in fp32, rounded to x's dtype, then multiplied by weight: the order models are trained in.
    """
    library = dispatch.library()
    if library is None or not dispatch.covers(x):
        return rms_norm_ref(x, weight, eps)
    rows = _rows(x, "x", weight)
    out = torch.empty_like(rows)
    args = _arguments(rows, rows, eps)
    library.rms_norm(args, rows.data_ptr(), None, weight.data_ptr(), out.data_ptr(), None)
    return out if x.dim() == 2 else out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + residual; returns (rms_norm(s), s).  x, residual: [T, N], neither is written."""
    library = dispatch.library()
    if library is None or not dispatch.covers(x):
        total = x + residual
        return rms_norm_ref(total, weight, eps), total
    if x.dim() != 2 or residual.shape != x.shape:
        raise ValueError(f"x and residual must be [T, N], got {list(x.shape)} and {list(residual.shape)}")
    rows, added = _rows(x, "x", weight), _rows(residual, "residual", weight)
    out, total = torch.empty_like(rows), torch.empty_like(rows)
    args = _arguments(rows, added, eps)
    library.rms_norm(
        args, rows.data_ptr(), added.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr()
    )
    return out, total


def _rows(x: Tensor, name: str, weight: Tensor) -> Tensor:
    """x as [rows, N] with neighbouring elements side by side."""
    if x.dtype != weight.dtype or x.shape[-1:] != weight.shape or not weight.is_contiguous():
        raise ValueError(
            f"{name} {x.dtype} {list(x.shape)} does not fit weight {weight.dtype} {list(weight.shape)}"
        )
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _arguments(rows: Tensor, residual: Tensor, eps: float) -> object:
    count, size = rows.shape
    is_bf16 = rows.dtype == torch.bfloat16
    threads = torch.get_num_threads()
    return ctypes.byref(NormArgs(count, size, rows.stride(0), residual.stride(0), is_bf16, threads, eps))
