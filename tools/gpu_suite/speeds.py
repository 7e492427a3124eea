"""How fast the kernels are, beside what the device could do at best and beside the kernels of others."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kernels.paged_attention import paged_attention
from kernels.rms_norm import add_rms_norm
from kernels.rope import rope_kv_write
from kernels.sampling import SamplingRows
from kernels.silu_mul import silu_mul
from tools.gpu_suite.inputs import PagedStep, make_meta, paged_steps
from tools.gpu_suite.rivals import Works, rivals
from tools.gpu_suite.sections import MISSED, PASSED, Context
from tools.gpu_suite.targets import (
    ATTENTION,
    COPY_TBPS,
    MATMUL_TFLOPS,
    ROWWISE,
    Attention,
    RowWise,
)
from tools.gpu_suite.timing import BEYOND_L2, ceilings, time_works

SLOTS = 32
_MOST_SETS = 64  # of inputs that are rotated
_RIVALS_S = 2.0  # left out where less is left for each


def run(context: Context) -> dict[str, Any]:
    device = torch.device("cuda")
    found: dict[str, float] = {}
    context.case("ceilings", lambda: found.update(ceilings(device)) or dict(found))
    for target in ATTENTION:
        context.case(target.name, lambda t=target: time_attention(t, found, device, context))
    for row_wise in ROWWISE:
        context.case(row_wise.name, lambda r=row_wise: time_row_wise(r, device))
    for slots in (16, 64):
        target = ATTENTION[0]
        context.case(f"{target.name}, blocks of {slots}", lambda s=slots: other_blocks(s, found, device))
    return found


def dry_run(context: Context) -> dict[str, Any]:
    """Every input small and filled; and every launch of the real sizes compiled, on memory never touched."""
    from tools.gpu_suite.compiling import compile_what

    device = torch.device("cpu")

    def left() -> float:
        return context.left_s

    for target in ATTENTION:
        small = replace(
            target,
            new=tuple(min(new, 64) for new in target.new[:3]),
            cached=tuple(cached // 64 for cached in target.cached[:3]),
        )
        context.case(f"inputs: {target.name}", lambda s=small: small_attention(s, device))
        context.case(f"compiles: {target.name}", lambda t=target: compile_what(lambda: launch_once(t), left))
    for row_wise in ROWWISE:
        works = lambda r=row_wise: row_works(replace(r, rows=8), device, 1, is_filled=False)  # noqa: E731
        context.case(
            f"compiles: {row_wise.name}",
            lambda w=works: compile_what(lambda: [work() for work in w()[0]], left),
        )
    return {}


def launch_once(target: Attention) -> None:
    """At its real size, in memory that is never touched."""
    (step,) = attention_steps(target, torch.device("cpu"), 0.0, is_filled=False)
    _attend(step)


def small_attention(target: Attention, device: torch.device) -> dict[str, Any]:
    """Ours in torch, and that of others as far as it needs no GPU."""
    steps = attention_steps(target, device, 1e5)
    out = [_attend(step)[0] for step in steps]
    assert all(each.isfinite().all() for each in out)
    ran = []
    for name, make in rivals(target, steps):
        if name == "sdpa":
            make()[0]()
            ran.append(name)
    return {"steps": len(steps), "rivals": ran}


def attention_steps(
    target: Attention, device: torch.device, least_bytes: float, *, slots: int = SLOTS, is_filled: bool = True
) -> list[PagedStep]:
    arguments = target.new, target.cached, target.heads, slots, device
    return paged_steps(*arguments, least_bytes, is_filled=is_filled)[:_MOST_SETS]


def _attend(step: PagedStep) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_attention(step.q, step.kv, step.meta, step.scale)


def work_of(target: Attention) -> tuple[float, float]:
    """Bytes of KV read once, and FLOPs of the causal products."""
    heads, kv_heads, size = target.heads
    ends = [new + cached for new, cached in zip(target.new, target.cached, strict=True)]
    pairs = sum(n * c + n * (n + 1) / 2 for n, c in zip(target.new, target.cached, strict=True))
    return sum(ends) * 2 * kv_heads * size * 2, 4 * size * heads * pairs


def time_attention(
    target: Attention, found: dict[str, float], device: torch.device, context: Context
) -> dict[str, Any]:
    num_bytes, flops = work_of(target)
    steps = attention_steps(target, device, max(BEYOND_L2, 1.01 * num_bytes))
    ours = time_works([lambda s=step: _attend(s) for step in steps])  # the plans are made by the first round
    floor_us = max(num_bytes / COPY_TBPS, flops / found.get("matmul_tflops", MATMUL_TFLOPS)) / 1e6
    figures = _figures(ours.us, floor_us, target.accept_us, target.good_us)
    figures |= {
        "spread": round(ours.spread, 3),
        "is_graph": ours.is_graph,
        "tbps": round(num_bytes / ours.us / 1e6, 2),
        "tflops": round(flops / ours.us / 1e6, 1),
        "rivals_us": {},
    }
    for name, make in rivals(target, steps):
        if context.left_s > _RIVALS_S:
            figures["rivals_us"][name] = _rival(make)
    return figures


def _rival(make: Callable[[], Works]) -> float | str:
    """Its time, or why there is none."""
    begun = time.monotonic()
    try:
        return round(time_works(make()).us, 1)
    except ModuleNotFoundError as error:
        return f"needs {error.name}"
    except Exception as error:  # another project's kernel: what it says is all there is to know
        torch.cuda.synchronize()
        return f"{type(error).__name__} after {time.monotonic() - begun:.1f} s: {error}"[:160]


def other_blocks(slots: int, found: dict[str, float], device: torch.device) -> dict[str, Any]:
    """The first shape in blocks of another size, to be compared with it."""
    target = ATTENTION[0]
    num_bytes, _ = work_of(target)
    steps = attention_steps(target, device, 1.01 * num_bytes, slots=slots)
    ours = time_works([lambda s=step: _attend(s) for step in steps])
    return _figures(ours.us, num_bytes / COPY_TBPS / 1e6, None, None)


def time_row_wise(target: RowWise, device: torch.device) -> dict[str, Any]:
    works, num_bytes = row_works(target, device, BEYOND_L2)
    ours = time_works(works)
    floor_us = num_bytes / COPY_TBPS / 1e6
    return _figures(ours.us, floor_us, target.accept_us, target.good_us) | {
        "spread": round(ours.spread, 3),
        "is_graph": ours.is_graph,
        "tbps": round(num_bytes / ours.us / 1e6, 2),
    }


def _figures(us: float, floor_us: float, accept_us: float | None, good_us: float | None) -> dict[str, Any]:
    is_slow = accept_us is not None and us > accept_us
    return {
        "status": MISSED if is_slow else PASSED,
        "us": round(us, 2),
        "floor_us": round(floor_us, 2),
        "ratio": round(us / floor_us, 2),
        "accept_us": accept_us and round(accept_us, 1),
        "good_us": good_us and round(good_us, 1),
        "is_good": good_us is None or us <= good_us,
    }


def row_works(
    target: RowWise, device: torch.device, least_bytes: float, *, is_filled: bool = True
) -> tuple[Works, float]:
    """Calls of the kernel on inputs of at least so many bytes together, and the bytes that one moves."""
    dtype = torch.bfloat16

    def values(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty.normal_() if is_filled else empty

    rows, width = target.rows, target.width
    if target.kernel == "add_rms_norm":
        weight, num_bytes = values(width), 4.0 * rows * width * dtype.itemsize

        def one() -> Callable[[], object]:
            x, residual = values(rows, width), values(rows, width)
            return lambda: add_rms_norm(x, residual, weight, 1e-5)

    elif target.kernel == "silu_mul":
        num_bytes = 3.0 * rows * width * dtype.itemsize

        def one() -> Callable[[], object]:
            x = values(rows, 2 * width)
            return lambda: silu_mul(x)

    elif target.kernel == "rope_kv_write":
        heads, kv_heads = 32, 8
        num_bytes = 2.0 * rows * (heads + 2 * kv_heads) * width * dtype.itemsize
        cos_sin = values(rows, width, dtype=torch.float32)

        def one() -> Callable[[], object]:
            return _rope_work(rows, (heads, kv_heads, width), cos_sin, values, device)

    else:
        num_bytes = 4.0 * rows * width

        def one() -> Callable[[], object]:
            return _sampling_work(values(rows, width, dtype=torch.float32), target.kernel == "drawn")

    return [one() for _ in range(max(1, min(_MOST_SETS, round(least_bytes / num_bytes + 0.5))))], num_bytes


def _rope_work(
    rows: int,
    heads: tuple[int, int, int],
    cos_sin: torch.Tensor,
    values: Callable[..., torch.Tensor],
    device: torch.device,
) -> Callable[[], object]:
    num_heads, kv_heads, size = heads
    fused = values(rows, (num_heads + 2 * kv_heads) * size)
    q, k, v = (
        part.unflatten(1, (-1, size))
        for part in fused.split([num_heads * size, kv_heads * size, kv_heads * size], dim=1)
    )
    blocks = -(-rows // SLOTS)
    tables = torch.randperm(blocks).int()[None]
    meta = make_meta((rows,), (0,), tables, SLOTS, device)
    kv = values(blocks, 2, kv_heads, SLOTS, size)
    return lambda: rope_kv_write(q, k, v, cos_sin, kv, meta)


def _sampling_work(logits: torch.Tensor, is_drawn: bool) -> Callable[[], object]:
    from kernels.gpu import sampling

    rows, device = len(logits), logits.device
    how = SamplingRows(
        temperature=torch.full((rows,), 0.8 * is_drawn, device=device),
        top_k=torch.full((rows,), 50 * is_drawn, dtype=torch.int64, device=device),
        top_p=torch.full((rows,), 0.9 if is_drawn else 1.0, device=device),
        min_p=torch.zeros(rows, device=device),
        seed=torch.arange(rows, device=device),
        position=torch.arange(rows, device=device),
    )
    return lambda: sampling.sample(logits, how)
