"""Join two attention results over disjoint keys into the result over their union."""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import described


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from attention over each.

    out: [T, H, D], any float dtype; lse: [T, H] fp32, natural log of the sum of exponentials.
    (0, -inf) - a row that saw no key - is the identity; two empty rows stay empty.
    Returns (out in out_a's dtype, lse).  Bits of a row do not depend on T.
    Raises ValueError for arguments that do not fit together.
    """
    for name, out, lse in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        if out.shape != out_a.shape or out.dim() != 3 or not out.is_floating_point():
            raise ValueError(f"out_a and out_b must be [T, H, D], got out_{name} {described(out)}")
        if lse.shape != out.shape[:2] or lse.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"lse_{name} must be float32 {list(out.shape[:2])}, got {described(lse)}")
    if dispatch.is_triton(out_a):
        from kernels.gpu import merge

        return merge.merge_state(out_a, lse_a, out_b, lse_b)
    largest = torch.maximum(lse_a, lse_b)
    base = largest.masked_fill(largest == -torch.inf, 0.0)  # both empty: exp(-inf - 0) = 0, never NaN
    weight_a, weight_b = (lse_a - base).exp(), (lse_b - base).exp()
    total = weight_a + weight_b
    scale = total.clamp_min(torch.finfo(total.dtype).tiny).reciprocal()
    out = out_a * (weight_a * scale)[..., None] + out_b * (weight_b * scale)[..., None]
    return out.to(out_a.dtype), base + total.log()
