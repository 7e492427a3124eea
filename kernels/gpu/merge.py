"""Joins attention over disjoint keys: the partial results of one step's split rows, or two results of the
same rows.  The contract and the reference are in kernels/merge_state.py.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import described
from kernels.gpu.arguments import require_aligned, require_device, require_float
from kernels.gpu.launch import Launch, pointer, require_gpu
from kernels.gpu.plan import MERGE, WorkPlan

_PROGRAMS = 8  # on a multiprocessor at once; unmeasured
_ELEMENTS = 2048  # that a program of two results takes at once; unmeasured


@triton.jit
def _merge_partials(
    part_out,
    part_lse,
    merges,
    limits,
    out,
    lse,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """A row's chunks in groups of AT_ONCE that begin at multiples of it, counted from position 0: sums within
    a group, and then groups in order, so that the order of additions follows from absolute chunks alone.
    """
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    for work in range(tl.program_id(0), tl.load(limits + 4) * HEADS, tl.num_programs(0)):
        entry = merges + (work // HEADS) * MERGE
        head = work % HEADS
        row = tl.load(entry)
        base = tl.load(entry + 1)
        first = tl.load(entry + 3)
        end = first + tl.load(entry + 2)
        most = float("-inf")
        total = 0.0
        acc = tl.zeros([WIDTH], tl.float32)
        for start in range(first // AT_ONCE * AT_ONCE, end, AT_ONCE):
            chunk = start + tl.arange(0, AT_ONCE)
            exists = (chunk >= first) & (chunk < end)
            at = (base + chunk - first).to(tl.int64) * HEADS + head
            found = tl.load(part_lse + at, mask=exists, other=float("-inf"))
            some = tl.load(
                part_out + at[:, None] * SIZE + column[None, :],
                mask=exists[:, None] & inside[None, :],
                other=0.0,
            )
            highest = tl.maximum(most, tl.max(found, axis=0))
            zero = tl.where(highest == float("-inf"), 0.0, highest)  # all empty: exp2(-inf - 0)
            weight = tl.exp2(found - zero)
            fade = tl.exp2(most - zero)
            total = total * fade + tl.sum(weight, axis=0)
            acc = acc * fade + tl.sum(some * weight[:, None], axis=0)
            most = highest
        is_empty = total == 0.0
        divisor = tl.where(is_empty, 1.0, total)
        to = row.to(tl.int64) * HEADS + head
        tl.store(out + to * SIZE + column, (acc / divisor).to(out.dtype.element_ty), mask=inside)
        natural = (most + tl.log2(divisor)) * 0.6931471805599453
        tl.store(lse + to, tl.where(is_empty, float("-inf"), natural))


@triton.jit(do_not_specialize=["num_rows"])
def _merge_two(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    num_rows,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """num_rows: T * H."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    a = tl.load(lse_a + row, mask=exists, other=float("-inf"))
    b = tl.load(lse_b + row, mask=exists, other=float("-inf"))
    highest = tl.maximum(a, b)
    base = tl.where(highest == float("-inf"), 0.0, highest)  # both empty: exp(-inf - 0) = 0, never NaN
    weight_a = tl.exp(a - base)
    weight_b = tl.exp(b - base)
    total = weight_a + weight_b
    is_empty = total == 0.0
    divisor = tl.where(is_empty, 1.0, total)
    column = tl.arange(0, WIDTH)[None, :]
    inside = exists[:, None] & (column < SIZE)
    at = row[:, None] * SIZE + column
    x = tl.load(out_a + at, mask=inside, other=0.0).to(tl.float32) * (weight_a / divisor)[:, None]
    x += tl.load(out_b + at, mask=inside, other=0.0).to(tl.float32) * (weight_b / divisor)[:, None]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, tl.where(is_empty, float("-inf"), base + tl.log(divisor)), mask=exists)


def merge_partials(
    work: WorkPlan, part_out: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, processors: int
) -> None:
    """Write out [T, H, D] and lse [T, H], natural log, of the split rows of a plan, from their partial
    results [R, H, D] fp32 and [R, H] fp32 in base 2.  Other rows are not touched.
    """
    heads, size = out.shape[1:]
    programs = min(work.bounds.merges * heads, processors * _PROGRAMS)
    launch = _partials_launch(out.dtype, heads, size)
    launch((programs,), part_out, part_lse, work.merges, work.limits, out, lse)


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """As kernels.merge_state, whose checks come first.  Raises ValueError for what this is not made for."""
    require_gpu(out_a.device)
    named = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in named.items():
        require_float(name, x)
        require_device(name, x, out_a.device)
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got {described(x)}")
        if name.startswith("lse") and x.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 on a GPU, got {described(x)}")
        require_aligned(name, x)
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    if out.numel():
        launch = _two_launch(out_a.dtype, out_b.dtype, out.shape[2])
        rows = lse.numel()
        launch((triton.cdiv(rows, launch.constants["ROWS"]),), *named.values(), out, lse, rows)
    return out, lse


@functools.cache
def _partials_launch(dtype: torch.dtype, heads: int, size: int) -> Launch:
    pointers = dict.fromkeys(("part_out", "part_lse"), "*fp32") | dict.fromkeys(("merges", "limits"), "*i32")
    return Launch(
        _merge_partials,
        {**pointers, "out": pointer(dtype), "lse": "*fp32"},
        {"HEADS": heads, "SIZE": size, "WIDTH": triton.next_power_of_2(size), "AT_ONCE": 16},
        num_warps=4,
        name=f"merge partials {pointer(dtype)[1:]} H={heads} D={size}",
    )


@functools.cache
def _two_launch(dtype_a: torch.dtype, dtype_b: torch.dtype, size: int) -> Launch:
    width = triton.next_power_of_2(size)
    a, b = pointer(dtype_a), pointer(dtype_b)
    return Launch(
        _merge_two,
        {
            "out_a": a,
            "lse_a": "*fp32",
            "out_b": b,
            "lse_b": "*fp32",
            "out": a,
            "lse": "*fp32",
            "num_rows": "i32",
        },
        {"SIZE": size, "WIDTH": width, "ROWS": max(1, _ELEMENTS // width)},
        num_warps=4,
        name=f"merge two {a[1:]} {b[1:]} D={size}",
    )


def shipped() -> list[Launch]:
    """Llama 3.1 8B, Qwen 2.5 0.5B, and other head sizes; remote results may come in fp32."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    partials = [
        (bf16, 32, 128),
        (bf16, 14, 64),
        (fp16, 32, 128),
        (fp32, 14, 64),
        (bf16, 32, 80),
        (bf16, 16, 256),
    ]
    two = [(bf16, bf16, 128), (bf16, bf16, 64), (bf16, fp32, 128), (fp16, fp16, 128), (fp32, fp32, 64)]
    return [_partials_launch(*form) for form in partials] + [_two_launch(*form) for form in two]
