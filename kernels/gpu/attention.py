"""Attention of a step's rows over a paged cache, over the items of plan.py: short queries by one form of the
kernel, long ones by others; merge.py joins partial results.

Rows of a tile are the query heads of one KV head, token by token: row r is token r // GROUP, head r % GROUP
of the group, so that K and V are read once for all of them.  Scores are base 2: exp2(score * factor - most)
is one FMA and one instruction.  A table's entries are read one tile of keys ahead of the keys: with both in
the same iteration, Triton's pipeline is half as deep.
"""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import paged_attention as contract
from kernels.checks import described
from kernels.gpu.arguments import require_aligned, require_device, require_float
from kernels.gpu.launch import Launch, Unit, pointer, require_gpu
from kernels.gpu.merge import merge_partials
from kernels.gpu.plan import CHUNK, ITEM, KINDS, NO_WINDOW, Tiling, WorkPlan, plan
from kernels.paged_attention import AttnMeta, Extents

_LARGEST_GROUP = 128  # query heads per KV head: the rows of the largest tile
_MOST_POSITIONS = 2**31 - 1024  # 32 bits, with room for whole tiles of keys
_CPU_PROCESSORS = 4  # in the interpreter: few enough that programs take several items
_LN2 = tl.constexpr(math.log(2))
_NOTHING = tl.constexpr(-1e30)  # below every score; finite, for -inf - -inf is not a number
_SCAN = tl.constexpr(256)  # blocks looked at at once for holes


@triton.jit
def _block_of(table, at, end, SHIFT: tl.constexpr):
    """Blocks of positions [N]; -1 for those at and beyond the end, as for holes."""
    return tl.load(table + (at >> SHIFT), mask=at < end, other=-1)


@triton.jit
def _attend(
    q,
    kv,
    block,
    at,
    seen_from,
    position,
    window,
    most,
    total,
    acc,
    factor,
    inner,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    V_OFFSET: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys: q [BM, WIDTH]; kv at one head of the first block; block, at [BN]: where the keys are;
    position [BM] of rows.  Running maximum [BM], sum [BM] and output [BM, WIDTH], scaled to the maximum.
    Not MASKED: all rows see all these keys.
    """
    column = tl.arange(0, WIDTH)[None, :]
    address = kv + (block.to(tl.int64) * BLOCK_STRIDE + (at & (SLOTS - 1)) * SIZE)[:, None] + column
    if MASKED:
        # What no row sees may be NaN, and 0 * NaN is NaN: it must come as 0.
        present = (block >= 0) & (at > seen_from)
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
    acc = acc * fade[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return highest, total, acc


@triton.jit
def _rows(q, first_row, num_rows, head, HEADS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr,
          ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """An item's queries [ROWS, WIDTH], their tokens [ROWS] from first_row on and their heads [ROWS]."""
    row = tl.arange(0, ROWS)
    token, heads = row // GROUP, head * GROUP + row % GROUP
    column = tl.arange(0, WIDTH)[None, :]
    address = q + ((first_row + token).to(tl.int64) * HEADS + heads)[:, None] * SIZE + column
    values = tl.load(address, mask=(token < num_rows)[:, None] & (column < SIZE), other=0.0)
    return values, token, heads


@triton.jit
def _store(out, lse, part_out, part_lse, item, token, heads, most, total, acc,
           HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """An item's results: final ones, or one of the partial ones of each row, in fp32 and base 2."""
    first_row = tl.load(item)
    num_rows = tl.load(item + 1)
    slot = tl.load(item + 6)
    stride = tl.load(item + 7)
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
    rows, kv, table, block, begin, end, high, first, token, window, most, total, acc, factor, inner,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, V_OFFSET: tl.constexpr, HAS_SOFTCAP: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Keys from begin to end; `block` [KEYS] holds the first, and is returned for those at the end."""
    for start in range(begin, end, KEYS):
        at = start + tl.arange(0, KEYS)
        following = _block_of(table, at + KEYS, high, SHIFT)
        most, total, acc = _attend(
            rows, kv, block, at, first - window, first + token, window, most, total, acc, factor, inner,
            SIZE, WIDTH, SLOTS, SHIFT, BLOCK_STRIDE, V_OFFSET, HAS_SOFTCAP, MASKED,
        )  # fmt: skip
        block = following
    return block, most, total, acc


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


@triton.jit(do_not_specialize=["table_stride", "window"], do_not_specialize_on_alignment=["tables"])
def _paged_attention(
    q, kv, tables, items, limits, out, lse, part_out, part_lse, table_stride, window, factor, inner,
    KIND: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, SHIFT: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Each program takes an item for one KV head, and then another.  Short items: the time goes into reading
    K and V, and masks cost nothing.  Others: into arithmetic, so that what all rows see comes first, without
    masks.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    V_OFFSET: tl.constexpr = KV_HEADS * SLOTS * SIZE
    begin = tl.load(limits + KIND) * KV_HEADS
    end = tl.load(limits + KIND + 1) * KV_HEADS
    for work in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        item = items + (work // KV_HEADS) * ITEM
        head = work % KV_HEADS
        num_rows = tl.load(item + 1)
        first = tl.load(item + 2)
        low = tl.load(item + 3)
        high = tl.load(item + 4)
        table = tables + tl.load(item + 5).to(tl.int64) * table_stride
        rows, token, heads = _rows(q, tl.load(item), num_rows, head, HEADS, SIZE, GROUP, ROWS, WIDTH)
        most = tl.full([ROWS], _NOTHING, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        block = _block_of(table, low + tl.arange(0, KEYS), high, SHIFT)
        kv_head = kv + head * (SLOTS * SIZE)
        if KIND > 0:
            masked_from = _common(table, low, high, first, num_rows, window, KEYS, SLOTS, SHIFT)
            block, most, total, acc = _over(
                rows, kv_head, table, block, low, masked_from, high, first, token, window, most, total, acc,
                factor, inner, SIZE, WIDTH, SLOTS, SHIFT, BLOCK_STRIDE, V_OFFSET, HAS_SOFTCAP, KEYS, False,
            )  # fmt: skip
        else:
            masked_from = low
        block, most, total, acc = _over(
            rows, kv_head, table, block, masked_from, high, high, first, token, window, most, total, acc,
            factor, inner, SIZE, WIDTH, SLOTS, SHIFT, BLOCK_STRIDE, V_OFFSET, HAS_SOFTCAP, KEYS, True,
        )  # fmt: skip
        _store(out, lse, part_out, part_lse, item, token, heads, most, total, acc, HEADS, SIZE, WIDTH)


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int  # on a multiprocessor at once: how many persistent ones are started


# By kind of item, padded head size and bytes of an element.  All unmeasured: chosen from compiled code, so
# that nothing spills.
_TILES: dict[tuple[str, int, int], _Tile] = {
    ("short", 64, 2): _Tile(16, 64, 4, 4, 3),
    ("middle", 64, 2): _Tile(64, 64, 4, 3, 2),
    ("long", 64, 2): _Tile(128, 64, 8, 3, 1),
    ("short", 128, 2): _Tile(16, 64, 4, 4, 2),
    ("middle", 128, 2): _Tile(64, 64, 4, 3, 2),
    ("long", 128, 2): _Tile(128, 64, 8, 3, 1),
    ("short", 256, 2): _Tile(16, 32, 4, 4, 2),
    ("middle", 256, 2): _Tile(64, 32, 8, 2, 1),
    ("long", 256, 2): _Tile(64, 32, 8, 2, 1),
    ("short", 64, 4): _Tile(16, 32, 4, 3, 2),
    ("middle", 64, 4): _Tile(32, 32, 4, 2, 2),
    ("long", 64, 4): _Tile(64, 32, 8, 2, 1),
    ("short", 128, 4): _Tile(16, 32, 4, 3, 2),
    ("middle", 128, 4): _Tile(32, 32, 4, 2, 1),
    ("long", 128, 4): _Tile(64, 32, 8, 2, 1),
    ("short", 256, 4): _Tile(16, 16, 4, 2, 1),
    ("middle", 256, 4): _Tile(32, 16, 8, 2, 1),
    ("long", 256, 4): _Tile(32, 16, 8, 2, 1),
}


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the kernels are specialised on."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    size: int
    slots: int
    block_stride: int  # elements
    has_softcap: bool = False

    @property
    def width(self) -> int:
        return max(16, _power_of_two(self.size))

    def tile(self, kind: int) -> _Tile:
        """At least as many rows as a KV head has query heads."""
        tile = _TILES[KINDS[kind], max(64, self.width), self.dtype.itemsize]
        return replace(tile, rows=max(tile.rows, _power_of_two(self.heads // self.kv_heads)))

    def tiling(self, chunk: int) -> Tiling:
        short, middle, long = (self.tile(kind).rows // (self.heads // self.kv_heads) for kind in range(3))
        return Tiling(short, middle, long, chunk)


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

    Rows of no segment are not touched: what they hold in the results is whatever the memory held.  Queries
    from elsewhere over blocks that are held here are segments like others: a row of the table lists those
    blocks, closed up, with holes behind them as far as the segment's positions go, which begin behind the
    last block; no window then.  `chunk`: for tests.  Raises ValueError as the contract does, and for what
    the kernels are not made for.
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
    extents = _check(q, kv, meta, scale, window, softcap)
    if not extents.lengths.any():
        return None
    rows, heads, size = q.shape
    shape = _Shape(q.dtype, heads, kv.shape[2], size, kv.shape[3], kv.stride(0), softcap is not None)
    work = plan(meta, extents, shape.tiling(chunk), window)
    processors = _processors(q.device)
    launches = []
    for kind, most in enumerate(work.bounds.items):
        if most:
            programs = min(most * shape.kv_heads, processors * shape.tile(kind).programs)
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


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _launch(shape: _Shape, kind: int) -> Launch:
    element, tile = pointer(shape.dtype), shape.tile(kind)
    unit: Unit = "none" if shape.dtype == torch.float32 else "wgmma" if tile.rows >= 64 else "mma"
    heads = f"{shape.heads}/{shape.kv_heads}"
    return Launch(
        _paged_attention,
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


def _check(
    q: Tensor, kv: Tensor, meta: AttnMeta, scale: float, window: int | None, softcap: float | None
) -> Extents:
    """What the kernels take for granted, as far as the host knows it.  Without extents, which tensors on a
    GPU must have, it is read from the tensors.  Raises ValueError, which names the argument.
    """
    require_gpu(q.device)
    require_float("q", q)
    rows, heads, size = q.shape
    if not 8 <= size <= 256:
        raise ValueError(f"q must have heads of 8 to 256 elements, got {described(q)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale}")
    for name in ("q_indptr", "first_pos", "block_tables", "table_rows"):
        if (tensor := getattr(meta, name)) is not None:
            require_device(name, tensor, q.device)
    require_device("kv", kv, q.device)
    if meta.extents is not None:
        extents = meta.extents
        _check_extents(q, kv, meta, extents, window, softcap)
    elif q.device.type == "cpu":
        contract._check(q.shape, q.dtype, kv, meta, window, softcap)
        lengths = meta.q_indptr.diff().numpy().astype(np.int64)
        extents = Extents(lengths, meta.first_pos.numpy() + lengths)
    else:
        raise ValueError("meta must have extents for tensors on a GPU")
    slots, group = kv.shape[3], heads // kv.shape[2]
    if slots not in (16, 32, 64):
        raise ValueError(f"kv must have blocks of 16, 32 or 64 positions on a GPU, got {slots}")
    if group > _LARGEST_GROUP:
        raise ValueError(
            f"q must have at most {_LARGEST_GROUP} heads per KV head, got {heads} / {kv.shape[2]}"
        )
    return extents


def _check_extents(
    q: Tensor, kv: Tensor, meta: AttnMeta, extents: Extents, window: int | None, softcap: float | None
) -> None:
    """What kernels.paged_attention asks, without a look at tensors that may lie on a GPU."""
    rows, heads, size = q.shape
    if kv.dtype != q.dtype:
        raise ValueError(f"kv must have q's dtype {q.dtype}, got {kv.dtype}")
    if kv.dim() != 5 or kv.shape[1] != 2 or kv.shape[4] != size or 0 in kv.shape[2:] or heads % kv.shape[2]:
        wanted = f"[B, 2, G, P, {size}] with a G that divides {heads}"
        raise ValueError(f"kv must be {wanted} to go with q {described(q)}, got {described(kv)}")
    if len(kv) and not kv[0].is_contiguous():
        raise ValueError(f"each block of kv must be contiguous, got {described(kv)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    segments = meta.first_pos.shape
    lengths, ends = extents.lengths, extents.ends
    if lengths.shape != segments or ends.shape != segments or (lengths < 0).any() or (ends < lengths).any():
        raise ValueError(f"extents must be lengths and ends of {segments[0]} segments, got {extents}")
    if len(meta.positions) != rows or lengths.sum() > rows:
        raise ValueError(
            f"meta and its extents must be of q's {rows} rows, got {len(meta.positions)}, {extents}"
        )
    width, most = meta.block_tables.shape[1] * kv.shape[3], int(ends.max(initial=0))
    if most > min(width, _MOST_POSITIONS):
        raise ValueError(f"block_tables must be wide enough for {most} positions, got {width}")


def shipped() -> list[Launch]:
    """Shapes of Llama 3.1 8B and of Qwen 2.5 0.5B, and others where they differ in kind."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shapes = [(bf16, 32, 8, 128, 32), (bf16, 14, 2, 64, 32)]
    full = [_Shape(*shape, 2 * shape[2] * shape[4] * shape[3]) for shape in shapes]
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
        full.append(_Shape(dtype, heads, kv_heads, size, slots, 2 * kv_heads * slots * size, has_softcap))
    return [_launch(shape, kind) for shape in full for kind in range(3)]
