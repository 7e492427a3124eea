"""Gated activations: silu or gelu of one half times the other, over one fused tensor."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.checks import described


def silu_mul_ref(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up.  x: [T, 2F], the gate first -> [T, F] in x's dtype.  ValueError for another x."""
    return _gate(x, silu_mul_ref, is_gelu=False)


def gelu_mul_ref(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def gelu_mul(x: Tensor) -> Tensor:
    """The same with gelu in its tanh approximation."""
    return _gate(x, gelu_mul_ref, is_gelu=True)


def _gate(x: Tensor, ref: Callable[[Tensor], Tensor], *, is_gelu: bool) -> Tensor:
    if x.dim() != 2 or x.shape[1] % 2 or not x.is_floating_point() or x.data_ptr() % x.itemsize:
        raise ValueError(f"x must be [T, 2F] of a float dtype, gate and up side by side, got {described(x)}")
    if dispatch.is_triton(x):
        from kernels.gpu import gate

        return gate.gate_mul(x, is_gelu=is_gelu)
    rows, width = x.shape
    library = dispatch.library()
    if library is None or not dispatch.covers(x.dtype):
        return ref(x)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((rows, width // 2), dtype=x.dtype)
    is_bf16, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    library.gate(is_gelu, x.data_ptr(), out.data_ptr(), rows, width // 2, x.stride(0), is_bf16, threads)
    return out
