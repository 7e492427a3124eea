"""Gated activation: silu of one half times the other, over one fused tensor."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch


def silu_mul_ref(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up.  x: [T, 2F], the gate first -> [T, F] in x's dtype."""
    rows, width = x.shape
    if width % 2:
        raise ValueError(f"x must have two halves, gate and up, got {width} columns")
    library = dispatch.library()
    if library is None or not dispatch.covers(x):
        return silu_mul_ref(x)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((rows, width // 2), dtype=x.dtype)
    is_bf16, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    library.silu_mul(x.data_ptr(), out.data_ptr(), rows, width // 2, x.stride(0), is_bf16, threads)
    return out
