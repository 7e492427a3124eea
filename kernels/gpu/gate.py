"""Gated activations, whose contracts and references are in kernels/silu_mul.py."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.arguments import require_float, require_rows
from kernels.gpu.launch import Launch, pointer, require_gpu

# Elements of a program, for 4 warps: a vector of 8 from each half to a thread.  Unmeasured.
_WIDTH = 1024


@triton.jit
def _sigmoid(x):
    """Of any finite x: the exponential is never of a positive number."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _gate_pieces(
    x,
    out,
    COLUMNS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    IS_GELU: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program: WIDTH elements of one row, the pieces of a row side by side in the grid."""
    PIECES: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    column = (tl.program_id(0) % PIECES) * WIDTH + tl.arange(0, WIDTH)
    inside = column < COLUMNS
    row_of_x = x + row * X_STRIDE
    gate = tl.load(row_of_x + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row_of_x + COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    if IS_GELU:
        # 1 + tanh(u) = 2 * sigmoid(2 * u).  Beyond 16 the sigmoid is 0 or 1, and a cube might overflow.
        near = tl.minimum(tl.maximum(gate, -16.0), 16.0)
        share = _sigmoid(1.5957691216057308 * near * (1.0 + 0.044715 * near * near))
    else:
        share = _sigmoid(gate)
    tl.store(out + row * COLUMNS + column, (gate * share * up).to(out.dtype.element_ty), mask=inside)


def gate_mul(x: Tensor, *, is_gelu: bool) -> Tensor:
    """x: [T, 2F], the gate first -> [T, F]: silu, or gelu in its tanh approximation, of the gate times the
    other half, rounded once.  Rows may be strided.  Raises ValueError for what the kernel is not made for.
    """
    require_float("x", x)
    require_rows("x", x)
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    launch = _launch(x.device, x.dtype, size, x.stride(0), is_gelu)
    launch((rows * triton.cdiv(size, _WIDTH),), x, out)
    return out


@functools.cache
def _launch(device: torch.device, dtype: torch.dtype, size: int, stride: int, is_gelu: bool) -> Launch:
    """size: F; stride: elements from row to row of x."""
    require_gpu(device)
    return Launch(
        _gate_pieces,
        {"x": pointer(dtype), "out": pointer(dtype)},
        {"COLUMNS": size, "X_STRIDE": stride, "IS_GELU": is_gelu, "WIDTH": _WIDTH},
        num_warps=4,
        name=f"{'gelu' if is_gelu else 'silu'}_mul {pointer(dtype)[1:]} F={size}"
        f"{'' if stride == 2 * size else f' stride {stride}'}",
    )


def shipped() -> list[Launch]:
    """The forms that the shapes of real models give."""
    forms = [
        (torch.bfloat16, 14336, False),
        (torch.bfloat16, 4864, False),
        (torch.bfloat16, 10240, True),
        (torch.float16, 14336, False),
        (torch.float32, 4864, False),
    ]
    cpu = torch.device("cpu")
    return [_launch(cpu, dtype, size, 2 * size, is_gelu) for dtype, size, is_gelu in forms]
