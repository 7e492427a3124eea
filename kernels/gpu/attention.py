"""Attention of a step's rows over a paged cache, item by item of plan.py: one kernel for short queries, one
for longer ones; merge.py joins partial results.

Rows of a tile are the query heads of one KV head, token by token: row r is token r // GROUP, head r % GROUP
of the group, so that K and V are read once for all of them.  Scores are base 2: exp2(score * factor - most)
is one FMA and one instruction.  A table's entries are read one tile of keys ahead of the keys: with both in
the same iteration, Triton's pipeline is half as deep.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import described
from kernels.gpu.arguments import require_aligned
from kernels.gpu.attention_checks import check
from kernels.gpu.attention_tiles import Shape
from kernels.gpu.launch import Launch, Unit, pointer
from kernels.gpu.merge import merge_partials
from kernels.gpu.plan import CHUNK, ITEM, KINDS, NO_WINDOW, WorkPlan, plan
from kernels.paged_attention import AttnMeta

_CPU_PROCESSORS = 4  # in the interpreter: few enough that programs take several items
_LN2 = tl.constexpr(math.log(2))
_NOTHING = tl.constexpr(-1e30)  # below every score; finite, for -inf - -inf is not a number
_SCAN = tl.constexpr(256)  # blocks looked at at once for holes


@triton.jit
def _block_of(table, at, end, SHIFT: tl.constexpr):
    """Blocks of positions [N]; -1 for those at and beyond the end, as for holes."""
    return tl.load(table + (at >> SHIFT), mask=at < end, other=-1)


@triton.jit
def _store(out, lse, part_out, part_lse, item, head, most, total, acc, HEADS: tl.constexpr,
           SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """An item's results: final ones, or one of the partial ones of each row, in fp32 and base 2."""
    first_row = tl.load(item)
    num_rows = tl.load(item + 1)
    slot = tl.load(item + 6)
    stride = tl.load(item + 7)
    # Adds nothing, but the compiler cannot know: it would keep rows in registers through the loops, and
    # spill.
    row = tl.arange(0, ROWS) + tl.minimum(stride, 0)
    token, heads = row // GROUP, head * GROUP + row % GROUP
    column = tl.arange(0, WIDTH)[None, :]
    valid = token < num_rows
    inside = valid[:, None] & (column < SIZE)
    is_empty = total == 0.0
    divisor = tl.where(is_empty, 1.0, total)
    acc = acc / divisor[:, None]
    found = tl.where(is_empty, float("-inf"), most + tl.log2(divisor))
    if slot < 0:
        at = (first_row + token).to(tl.int64) * HEADS + heads
        tl.store(out + at[:, None] * SIZE + column, acc.to(out.dtype.element_ty), mask=inside)
        tl.store(lse + at, found * _LN2, mask=valid)
    else:
        at = (slot + token * stride).to(tl.int64) * HEADS + heads
        tl.store(part_out + at[:, None] * SIZE + column, acc, mask=inside)
        tl.store(part_lse + at, found, mask=valid)


@triton.jit
def _over(
    q, kv, table, begin, end, high, first, token, window, most, total, acc, factor, inner,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, V_OFFSET: tl.constexpr, HAS_SOFTCAP: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Keys from begin to end, of which those from high on do not exist: q [BM, WIDTH]; kv at one head of the
    first block; token [BM]: rows' positions behind first.  Running maximum [BM], sum [BM] and output
    [BM, WIDTH], scaled to the maximum.  Not MASKED: all rows see all these keys.
    """
    column = tl.arange(0, WIDTH)[None, :]
    position = first + token
    block = _block_of(table, begin + tl.arange(0, KEYS), high, SHIFT)
    for start in range(begin, end, KEYS):
        at = start + tl.arange(0, KEYS)
        following = _block_of(table, at + KEYS, high, SHIFT)
        address = kv + (block.to(tl.int64) * BLOCK_STRIDE + (at & (SLOTS - 1)) * SIZE)[:, None] + column
        if MASKED:
            # What no row sees may be NaN, and 0 * NaN is NaN: it must come as 0.
            present = (block >= 0) & (at > first - window)
            if SIZE == WIDTH:
                inside = present[:, None]
            else:
                inside = present[:, None] & (column < SIZE)
            k = tl.load(address, mask=inside, other=0.0)
            v = tl.load(address + V_OFFSET, mask=inside, other=0.0)
        elif SIZE == WIDTH:
            k = tl.load(address)
            v = tl.load(address + V_OFFSET)
        else:
            k = tl.load(address, mask=column < SIZE, other=0.0)
            v = tl.load(address + V_OFFSET, mask=column < SIZE, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_SOFTCAP:
            small = tl.exp2(tl.abs(scores) * inner)  # inner is negative: no overflow
            tanh = (1.0 - small) / (1.0 + small)
            scores = tl.where(scores < 0, -tanh, tanh)  # factor is the cap
        if MASKED:
            sees = present[None, :] & (at[None, :] <= position[:, None])
            sees &= at[None, :] > position[:, None] - window
            scores = tl.where(sees, scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, axis=1) * factor)
        weights = tl.exp2(scores * factor - highest[:, None])
        fade = tl.exp2(most - highest)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        most = highest
        block = following
    return most, total, acc


@triton.jit
def _common(table, low, high, first, num_rows, window, KEYS: tl.constexpr, SLOTS: tl.constexpr,
            SHIFT: tl.constexpr):  # fmt: skip
    """Where the tiles of keys end that all of an item's rows see whole: at once if there is a hole, or a
    window that hides a key from a row.
    """
    behind = (high + SLOTS - 1) >> SHIFT
    lowest = 0
    for start in range(low >> SHIFT, behind, _SCAN):
        index = start + tl.arange(0, _SCAN)
        lowest = tl.minimum(lowest, tl.min(tl.load(table + index, mask=index < behind, other=0)))
    is_open = (lowest >= 0) & (low > first + num_rows - 1 - window)
    common = tl.maximum(tl.minimum(high, first + 1) - low, 0) // KEYS * KEYS
    return low + tl.where(is_open, common, 0)


@triton.jit
def _attend_item(
    q, kv, tables, item, head, out, lse, part_out, part_lse, table_stride, window, factor, inner,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, SHIFT: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One item for one KV head.  Unless all of it is MASKED, what all rows see comes first, without masks."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    V_OFFSET: tl.constexpr = KV_HEADS * SLOTS * SIZE
    num_rows = tl.load(item + 1)
    first = tl.load(item + 2)
    low = tl.load(item + 3)
    high = tl.load(item + 4)
    table = tables + tl.load(item + 5).to(tl.int64) * table_stride
    row = tl.arange(0, ROWS)
    token, heads = row // GROUP, head * GROUP + row % GROUP
    column = tl.arange(0, WIDTH)[None, :]
    address = q + ((tl.load(item) + token).to(tl.int64) * HEADS + heads)[:, None] * SIZE + column
    rows = tl.load(address, mask=(token < num_rows)[:, None] & (column < SIZE), other=0.0)
    most = tl.full([ROWS], _NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    kv_head = kv + head * (SLOTS * SIZE)
    masked_from = low
    if not MASKED:
        masked_from = _common(table, low, high, first, num_rows, window, KEYS, SLOTS, SHIFT)
        most, total, acc = _over(
            rows, kv_head, table, low, masked_from, high, first, token, window, most, total, acc,
            factor, inner, SIZE, WIDTH, SLOTS, SHIFT, BLOCK_STRIDE, V_OFFSET, HAS_SOFTCAP, KEYS, False,
        )  # fmt: skip
    most, total, acc = _over(
        rows, kv_head, table, masked_from, high, high, first, token, window, most, total, acc,
        factor, inner, SIZE, WIDTH, SLOTS, SHIFT, BLOCK_STRIDE, V_OFFSET, HAS_SOFTCAP, KEYS, True,
    )  # fmt: skip
    _store(out, lse, part_out, part_lse, item, head, most, total, acc, HEADS, SIZE, GROUP, ROWS, WIDTH)


@triton.jit(do_not_specialize=["table_stride", "window"], do_not_specialize_on_alignment=["tables"])
def _short(
    q, kv, tables, items, limits, out, lse, part_out, part_lse, table_stride, window, factor, inner,
    KIND: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, SHIFT: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Few rows: the time goes into reading K and V, masks cost nothing.  A graph's programs do not know how
    many items there will be; each takes one, and then another.
    """
    begin = tl.load(limits + KIND) * KV_HEADS
    end = tl.load(limits + KIND + 1) * KV_HEADS
    for work in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        _attend_item(
            q, kv, tables, items + (work // KV_HEADS) * ITEM, work % KV_HEADS, out, lse, part_out, part_lse,
            table_stride, window, factor, inner, HEADS, KV_HEADS, SIZE, WIDTH, SLOTS, SHIFT, BLOCK_STRIDE,
            HAS_SOFTCAP, ROWS, KEYS, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride", "window"], do_not_specialize_on_alignment=["tables"])
def _long(
    q, kv, tables, items, limits, out, lse, part_out, part_lse, table_stride, window, factor, inner,
    KIND: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, SHIFT: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Many rows: the time goes into arithmetic, and differs from item to item, so that each has its program:
    what a loop over items keeps in registers does not fit beside its tiles.
    """
    work = tl.load(limits + KIND) * KV_HEADS + tl.program_id(0)
    if work >= tl.load(limits + KIND + 1) * KV_HEADS:
        return
    _attend_item(
        q, kv, tables, items + (work // KV_HEADS) * ITEM, work % KV_HEADS, out, lse, part_out, part_lse,
        table_stride, window, factor, inner, HEADS, KV_HEADS, SIZE, WIDTH, SLOTS, SHIFT, BLOCK_STRIDE,
        HAS_SOFTCAP, ROWS, KEYS, False,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Step:
    """What the first layer of a step prepares for those of the same shape and window."""

    work: WorkPlan
    launches: tuple[tuple[Launch, int], ...]  # with their programs
    part_out: Tensor  # [R, H, D] fp32
    part_lse: Tensor  # [R, H] fp32, base 2
    scalars: tuple[int, int, float, float]
    processors: int


def paged_attention(
    q: Tensor,
    kv: Tensor,
    meta: AttnMeta,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As kernels.paged_attention says, without waiting for the device.

    A step's first layer launches its plan, for each window: a graph must be captured with a meta that nothing
    has attended with before.  Rows of no segment are not touched: what they hold in the results is whatever
    the memory held.  Queries from elsewhere over blocks that are held here are segments like others: a row
    of the table lists those blocks, closed up, with holes behind them as far as the segment's positions go,
    which begin behind the last block; no window then.  `chunk`: for tests.  Raises ValueError as the contract
    does, and for what the kernels are not made for.
    """
    if not q.is_contiguous():
        raise ValueError(f"q must be contiguous, got {described(q)}")
    require_aligned("q", q)
    require_aligned("kv", kv)
    cache = kv.dtype, kv.shape, kv.stride(), kv.device
    key = ("paged_attention", q.shape, q.dtype, q.device, cache, scale, window, softcap, chunk)
    if key not in meta.plans:
        meta.plans[key] = _prepare(q, kv, meta, scale, window, softcap, chunk)
    step: _Step | None = meta.plans[key]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if step is None:
        return out, lse
    for launch, programs in step.launches:
        launch(
            (programs,),
            *(q, kv, meta.block_tables, step.work.items, step.work.limits),
            *(out, lse, step.part_out, step.part_lse),
            *step.scalars,
        )
    if step.work.bounds.merges:
        merge_partials(step.work, step.part_out, step.part_lse, out, lse, step.processors)
    return out, lse


def _prepare(
    q: Tensor,
    kv: Tensor,
    meta: AttnMeta,
    scale: float,
    window: int | None,
    softcap: float | None,
    chunk: int,
) -> _Step | None:
    """None for a step without rows."""
    extents = check(q, kv, meta, scale, window, softcap)
    if not extents.lengths.any():
        return None
    rows, heads, size = q.shape
    shape = Shape(q.dtype, heads, kv.shape[2], size, kv.shape[3], kv.stride(0), softcap is not None)
    work = plan(meta, extents, shape.tiling(chunk), window)
    processors = _processors(q.device)
    launches = []
    for kind, most in enumerate(work.bounds.items):
        if most:
            programs, most_programs = most * shape.kv_heads, shape.tile(kind).programs
            if most_programs is not None:
                programs = min(programs, processors * most_programs)
            launches.append((_launch(shape, kind), programs))
    partials = work.bounds.partials
    log2e = 1 / math.log(2)
    if softcap is None:
        factor, inner = scale * log2e, 0.0
    else:
        factor, inner = softcap * log2e, -2 * scale / softcap * log2e
    return _Step(
        work,
        tuple(launches),
        torch.empty(partials, heads, size, dtype=torch.float32, device=q.device),
        torch.empty(partials, heads, dtype=torch.float32, device=q.device),
        (meta.block_tables.shape[1], NO_WINDOW if window is None else window, factor, inner),
        processors,
    )


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _launch(shape: Shape, kind: int) -> Launch:
    element, tile = pointer(shape.dtype), shape.tile(kind)
    unit: Unit = "none" if shape.dtype == torch.float32 else "wgmma" if tile.rows >= 64 else "mma"
    heads = f"{shape.heads}/{shape.kv_heads}"
    return Launch(
        _long if kind else _short,
        {
            **dict.fromkeys(("q", "kv"), element),
            **dict.fromkeys(("tables", "items", "limits"), "*i32"),
            "out": element,
            **dict.fromkeys(("lse", "part_out", "part_lse"), "*fp32"),
            **dict.fromkeys(("table_stride", "window"), "i32"),
            **dict.fromkeys(("factor", "inner"), "fp32"),
        },
        {
            "KIND": kind,
            "HEADS": shape.heads,
            "KV_HEADS": shape.kv_heads,
            "SIZE": shape.size,
            "WIDTH": shape.width,
            "SLOTS": shape.slots,
            "SHIFT": shape.slots.bit_length() - 1,
            "BLOCK_STRIDE": shape.block_stride,
            "HAS_SOFTCAP": shape.has_softcap,
            "ROWS": tile.rows,
            "KEYS": tile.keys,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        unit=unit,
        name=f"attention {KINDS[kind]} {element[1:]} {heads} D={shape.size} P={shape.slots}"
        f"{' softcap' if shape.has_softcap else ''}",
    )


def shipped() -> list[Launch]:
    """Shapes of Llama 3.1 8B and of Qwen 2.5 0.5B, and others where they differ in kind."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shapes = [(bf16, 32, 8, 128, 32), (bf16, 14, 2, 64, 32)]
    full = [Shape(*shape, 2 * shape[2] * shape[4] * shape[3]) for shape in shapes]
    others = [
        (fp16, 32, 8, 128, 16, False),
        (bf16, 32, 8, 128, 64, True),
        (bf16, 32, 32, 80, 32, False),
        (bf16, 16, 8, 256, 32, True),
        (fp32, 14, 2, 64, 32, False),
        (fp32, 32, 8, 128, 32, False),
        (fp32, 16, 8, 256, 32, False),
    ]
    for dtype, heads, kv_heads, size, slots, has_softcap in others:
        full.append(Shape(dtype, heads, kv_heads, size, slots, 2 * kv_heads * slots * size, has_softcap))
    return [_launch(shape, kind) for shape in full for kind in range(3)]
