"""RMSNorm over the last axis, alone or together with the residual addition before it."""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight.  x: [T, N], rows may be strided; weight: [N] -> [T, N].

    Normalised in fp32, rounded to x's dtype, then multiplied by weight: the order in which the models were trained.
    """
    return rms_norm_ref(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + residual; returns (rms_norm(s), s).  x, residual: [T, N], neither is written."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total
