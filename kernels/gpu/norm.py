"""RMSNorm over the last axis, alone or of a sum: contracts and references are in kernels/rms_norm.py."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import described
from kernels.gpu.arguments import require_aligned, require_float, require_rows
from kernels.gpu.launch import Launch, pointer, require_gpu

_MOST_COLUMNS = 16384


@triton.jit(do_not_specialize=["num_rows"])
def _norm_rows(
    x,
    residual,
    weight,
    out,
    total,
    num_rows,
    COLUMNS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program: ROWS rows, as one tile [ROWS, WIDTH], whose sums take the same order in every row.
    `residual` and `total` are touched only where the kernel ADDS.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    # The weight as often as there are rows: each thread loads its own part of it.
    column = tl.broadcast_to(tl.arange(0, WIDTH)[None, :], [ROWS, WIDTH])
    inside = (row < num_rows) & (column < COLUMNS)
    factor = tl.load(weight + column, mask=column < COLUMNS, other=0.0)
    values = tl.load(x + row * X_STRIDE + column, mask=inside, other=0.0)
    if ADDS:
        added = tl.load(residual + row * RESIDUAL_STRIDE + column, mask=inside, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(total + row * COLUMNS + column, values, mask=inside)
    wide = values.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1, keep_dims=True) / COLUMNS
    normed = (wide * tl.rsqrt(mean + EPS)).to(factor.dtype).to(tl.float32)
    tl.store(out + row * COLUMNS + column, (normed * factor.to(tl.float32)).to(values.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., N] -> as x, contiguous.  Raises ValueError for what the kernels are not made for."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    _check(rows, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch = _launch(x.device, x.dtype, weight.dtype, rows.shape[1], rows.stride(0), None, eps)
    # What is not added is not read either; any pointer will do.
    launch((_programs(rows, launch),), rows, rows, weight, out, out, len(rows))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + residual, rounded; returns (rms_norm(s), s).  x, residual: [T, N].  ValueError likewise."""
    _check(x, weight)
    require_rows("residual", residual)
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    strides = x.stride(0), residual.stride(0)
    launch = _launch(x.device, x.dtype, weight.dtype, x.shape[1], *strides, eps)
    launch((_programs(x, launch),), x, residual, weight, out, total, len(x))
    return out, total


def _check(x: Tensor, weight: Tensor) -> None:
    """What the kernel takes for granted beyond what kernels/rms_norm.py checks."""
    require_float("x", x)
    if not 1 <= x.shape[1] <= _MOST_COLUMNS:
        raise ValueError(f"x must have rows of 1 to {_MOST_COLUMNS} elements, got {described(x)}")
    require_rows("x", x)
    require_aligned("weight", weight)


def _programs(x: Tensor, launch: Launch) -> int:
    rows: int = launch.constants["ROWS"]
    return -(-len(x) // rows)


@functools.cache
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    columns: int,
    x_stride: int,
    residual_stride: int | None,
    eps: float,
) -> Launch:
    """Strides in elements; no `residual_stride`: nothing is added."""
    require_gpu(device)
    adds = residual_stride is not None
    width = triton.next_power_of_2(columns)
    # A thread takes 16 elements, a program at least 1024 and at most 16 warps: unmeasured.
    rows = max(1, 1024 // width)
    x = pointer(dtype)
    signature = {"x": x, "residual": x, "weight": pointer(weight_dtype), "out": x, "total": x}
    return Launch(
        _norm_rows,
        signature | {"num_rows": "i32"},
        {
            "COLUMNS": columns,
            "X_STRIDE": x_stride,
            "RESIDUAL_STRIDE": residual_stride or 0,
            "EPS": eps,
            "ADDS": adds,
            "ROWS": rows,
            "WIDTH": width,
        },
        num_warps=min(16, rows * width // 512),
        name=f"{'add_' * adds}rms_norm {x[1:]} weight {pointer(weight_dtype)[1:]} N={columns}"
        f"{'' if x_stride == columns else f' stride {x_stride}'}",
    )


def shipped() -> list[Launch]:
    """The forms that the shapes of real models give: hidden sizes of 0.5B to 70B models."""
    cpu, bf16, fp16, fp32 = torch.device("cpu"), torch.bfloat16, torch.float16, torch.float32
    forms = [
        (bf16, bf16, 4096),
        (bf16, bf16, 896),
        (bf16, fp32, 2560),
        (bf16, bf16, 8192),
        (bf16, bf16, 16384),
        (bf16, bf16, 128),
        (fp16, fp16, 4096),
        (fp32, fp32, 4096),
    ]
    adding = [_launch(cpu, *form, form[2], form[2], 1e-5) for form in forms]
    return [_launch(cpu, bf16, bf16, size, size, None, 1e-5) for size in (896, 4096)] + adding
