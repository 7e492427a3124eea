"""A step's attention as work items, made once per step on the device and read by all layers.

A segment is cut into tiles of consecutive rows and, where one tile would leave the machine idle, its keys
into chunks at absolute positions; an item is one tile over one chunk, for all KV heads.  Tiles and chunks
follow from the segment alone, so that a row's result never depends on what else is in the step:

    short   fits the smallest tile             chunks of `chunk` positions
    middle  fits the next one                  chunks of a multiple of `span` positions, at most _CHUNKS
    long    tiles of the largest, last first   the same up to _SPLIT rows, and else no chunks

A row whose keys lie in several chunks has as many partial results, side by side, and an entry in the list of
merges.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels.gpu.launch import Launch
from kernels.paged_attention import AttnMeta, Extents

CHUNK = 512  # unmeasured: partial results are 1.6 % of the KV read at 4 query heads per KV head
ITEM = tl.constexpr(8)  # first row, rows, first position, keys from, keys to, table row, slot, slots per row
MERGE = tl.constexpr(4)  # row, first slot, slots, chunk of the first slot
NO_WINDOW = 2**31 - 1
KINDS = ("short", "middle", "long")

_CHUNKS = 32  # unmeasured: work for 256 programs with 8 KV heads, and few partial results of a row
_SPLIT = 256  # unmeasured: tiles of longer segments are many by themselves
_ALIGNMENT = 64  # keys are read from multiples of this on
_WHOLE = 2**31 - 1  # one chunk for all positions
_BLOCK = 256  # segments, items or rows that a program looks at at once


@dataclass(frozen=True, slots=True)
class Tiling:
    """How segments become items: rows (query tokens) of a tile by kind of segment, positions of a chunk, a
    multiple of 64.  Raises ValueError for others.
    """

    short: int
    middle: int
    long: int
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if not 0 < self.short <= self.middle <= self.long:
            raise ValueError(f"tiles must have rows, in ascending order, got {self}")
        if self.chunk < 1 or self.chunk % _ALIGNMENT:
            raise ValueError(f"chunk must be a multiple of {_ALIGNMENT}, got {self.chunk}")

    @property
    def span(self) -> int:
        return 2 * self.chunk

    def of(self, length: int, end: int) -> tuple[int, int, int]:
        """Kind, rows of a tile and positions of a chunk for a segment of this length that ends there."""
        if length <= self.short:
            return 0, self.short, self.chunk
        span = self.span * -(-end // (self.span * _CHUNKS))
        if length <= self.middle:
            return 1, self.middle, span
        return 2, self.long, span if length <= _SPLIT else _WHOLE


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that a plan can hold: exact but for windows, where each segment may have one chunk less."""

    items: tuple[int, int, int]  # by kind
    partials: int
    merges: int


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """One step's items for one window, on the device.  Slots count partial results of one row, all heads."""

    items: Tensor  # [N, 8] int32, kind by kind, see ITEM; slot -1: the only item of its rows
    limits: Tensor  # [5] int32: where items of each kind begin, where the last ends; how many merges
    merges: Tensor  # [M, 4] int32, see MERGE
    bounds: Bounds


def bounds(extents: Extents, tiling: Tiling, window: int | None) -> Bounds:
    """For segments of these lengths and ends.  A segment may turn out empty, and one of a short length may
    turn out shorter or end earlier; nothing else.
    """
    lengths = extents.lengths.astype(np.int64)
    kinds = np.where(lengths <= tiling.short, 0, np.where(lengths <= tiling.middle, 1, 2))
    rows = np.array([tiling.short, tiling.middle, tiling.long])[kinds]
    spans = tiling.span * -(-extents.ends // (tiling.span * _CHUNKS))
    sizes = np.where(kinds == 0, tiling.chunk, spans)
    sizes[(kinds == 2) & (lengths > _SPLIT)] = _WHOLE
    chunks = -(-extents.ends // sizes)
    if window is not None:
        # Anywhere but at the start, so many positions can touch one chunk more than they fill.
        chunks = np.minimum(chunks, (window + lengths - 2) // sizes + 2)
    items = np.bincount(kinds, -(-lengths // rows) * chunks, minlength=3)
    split = np.where(chunks > 1, lengths, 0)
    first, second, third = (int(count) for count in items)
    return Bounds((first, second, third), int((split * chunks).sum()), int(split.sum()))


def plan_ref(
    q_indptr: NDArray[np.int32],
    first_pos: NDArray[np.int32],
    table_rows: NDArray[np.int32] | None,
    tiling: Tiling,
    window: int | None,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """(items, limits, merges) of WorkPlan, in numpy and without what lies beyond the limits."""
    reach = NO_WINDOW if window is None else window
    items: tuple[list[list[int]], ...] = ([], [], [])
    merges: list[list[int]] = []
    base = 0
    for segment, first in enumerate(first_pos.tolist()):
        begin, end = (int(bound) for bound in q_indptr[segment : segment + 2])
        if begin == end:
            continue
        table_row = segment if table_rows is None else int(table_rows[segment])
        kind, rows, size = tiling.of(end - begin, first + end - begin)
        low = max(0, first - reach + 1) // size
        num_chunks = (first + end - begin - 1) // size + 1 - low
        for row in reversed(range(begin, end, rows)):
            position, count = first + row - begin, min(rows, end - row)
            seen = max(0, position - reach + 1) // _ALIGNMENT * _ALIGNMENT
            for chunk in range(num_chunks):
                start = (low + chunk) * size
                slot = -1 if num_chunks == 1 else base + (row - begin) * num_chunks + chunk
                keys = [max(start, seen), min(start + size, position + count)]
                items[kind].append([row, count, position, *keys, table_row, slot, num_chunks])
        if num_chunks > 1:
            for row in range(begin, end):
                merges.append([row, base, num_chunks, low])
                base += num_chunks
    starts = np.cumsum([0, *(len(some) for some in items)])
    return (
        np.array([item for some in items for item in some], dtype=np.int32).reshape(-1, ITEM.value),
        np.array([*starts, len(merges)], dtype=np.int32),
        np.array(merges, dtype=np.int32).reshape(-1, MERGE.value),
    )


@triton.jit
def _cut(length, first, window, SHORT, MIDDLE, LONG, CHUNK, CHUNKS, SPLIT, WHOLE):
    """Of segments: kind, rows of a tile, positions of a chunk, first chunk, chunks, tiles (0: no rows)."""
    kind = tl.where(length <= SHORT, 0, tl.where(length <= MIDDLE, 1, 2))
    rows = tl.where(kind == 0, SHORT, tl.where(kind == 1, MIDDLE, LONG))
    most = 2 * CHUNK * CHUNKS
    span = 2 * CHUNK * ((first + length - 1) // most + 1)
    span = tl.where((kind == 2) & (length > SPLIT), WHOLE, span)
    size = tl.where(kind == 0, CHUNK, span)
    low = tl.maximum(first - window + 1, 0) // size
    chunks = (first + tl.maximum(length, 1) - 1) // size + 1 - low
    return kind, rows, size, low, chunks, (length + rows - 1) // rows


@triton.jit(
    do_not_specialize=["num_segments", "window"],
    do_not_specialize_on_alignment=["q_indptr", "first_pos", "table_rows"],
)
def _plan(
    q_indptr,
    first_pos,
    table_rows,
    items,
    limits,
    merges,
    num_segments,
    window,
    SHORT: tl.constexpr,
    MIDDLE: tl.constexpr,
    LONG: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per segment: sums over all segments tell where its items go."""
    segment = tl.program_id(0)
    begin = tl.load(q_indptr + segment)
    length = tl.load(q_indptr + segment + 1) - begin
    first = tl.load(first_pos + segment)
    kind, rows, size, low, chunks, tiles = _cut(
        length, first, window, SHORT, MIDDLE, LONG, CHUNK, CHUNKS, SPLIT, WHOLE
    )
    ids = tl.arange(0, BLOCK)

    item = 0  # items, slots and merges of others that come before this segment's
    base = 0
    merge = 0
    num_short = 0
    num_middle = 0
    num_long = 0
    num_merges = 0
    for start in range(0, num_segments, BLOCK):
        other = start + ids
        exists = other < num_segments
        from_row = tl.load(q_indptr + other, mask=exists, other=0)
        count = tl.load(q_indptr + other + 1, mask=exists, other=0) - from_row
        where = tl.load(first_pos + other, mask=exists, other=0)
        its_kind, _, _, _, its_chunks, its_tiles = _cut(
            count, where, window, SHORT, MIDDLE, LONG, CHUNK, CHUNKS, SPLIT, WHOLE
        )
        its_items = its_tiles * its_chunks
        split = tl.where(its_chunks > 1, count, 0)
        before = other < segment
        item += tl.sum(tl.where((its_kind < kind) | ((its_kind == kind) & before), its_items, 0))
        base += tl.sum(tl.where(before, split * its_chunks, 0))
        merge += tl.sum(tl.where(before, split, 0))
        num_short += tl.sum(tl.where(its_kind == 0, its_items, 0))
        num_middle += tl.sum(tl.where(its_kind == 1, its_items, 0))
        num_long += tl.sum(tl.where(its_kind == 2, its_items, 0))
        num_merges += tl.sum(split)
    if segment == 0:
        tl.store(limits, 0)
        tl.store(limits + 1, num_short)
        tl.store(limits + 2, num_short + num_middle)
        tl.store(limits + 3, num_short + num_middle + num_long)
        tl.store(limits + 4, num_merges)

    table_row = segment
    if HAS_TABLE_ROWS:
        table_row = tl.load(table_rows + segment)
    for start in range(0, tiles * chunks, BLOCK):
        at = start + ids
        row = (tiles - 1 - at // chunks) * rows
        chunk = at % chunks
        position = first + row
        count = tl.minimum(length - row, rows)
        key = (low + chunk) * size
        seen = tl.maximum(position - window + 1, 0) // ALIGNMENT * ALIGNMENT
        slot = tl.where(chunks > 1, base + row * chunks + chunk, -1)
        exists = at < tiles * chunks
        to = items + (item + at) * ITEM
        tl.store(to, begin + row, mask=exists)
        tl.store(to + 1, count, mask=exists)
        tl.store(to + 2, position, mask=exists)
        tl.store(to + 3, tl.maximum(key, seen), mask=exists)
        tl.store(to + 4, key + tl.minimum(position + count - key, size), mask=exists)
        tl.store(to + 5, table_row + 0 * at, mask=exists)
        tl.store(to + 6, slot, mask=exists)
        tl.store(to + 7, chunks + 0 * at, mask=exists)
    for start in range(0, tl.where(chunks > 1, length, 0), BLOCK):
        row = start + ids
        exists = row < length
        to = merges + (merge + row) * MERGE
        tl.store(to, begin + row, mask=exists)
        tl.store(to + 1, base + row * chunks, mask=exists)
        tl.store(to + 2, chunks + 0 * row, mask=exists)
        tl.store(to + 3, low + 0 * row, mask=exists)


def plan(meta: AttnMeta, extents: Extents, tiling: Tiling, window: int | None) -> WorkPlan:
    """The items of a step with at least one segment.  Does not wait for the device.  Rows of no segment have
    no items.
    """
    most, device = bounds(extents, tiling, window), meta.first_pos.device
    items = torch.empty(sum(most.items), ITEM.value, dtype=torch.int32, device=device)
    limits = torch.empty(5, dtype=torch.int32, device=device)
    merges = torch.empty(most.merges, MERGE.value, dtype=torch.int32, device=device)
    rows, reach = meta.table_rows, NO_WINDOW if window is None else window
    segments = meta.first_pos.numel()
    _launch(tiling, rows is not None)(
        (segments,),
        *(meta.q_indptr, meta.first_pos, meta.first_pos if rows is None else rows),
        *(items, limits, merges, segments, reach),
    )
    return WorkPlan(items, limits, merges, most)


@functools.cache
def _launch(tiling: Tiling, has_table_rows: bool) -> Launch:
    constants = {
        "SHORT": tiling.short,
        "MIDDLE": tiling.middle,
        "LONG": tiling.long,
        "CHUNK": tiling.chunk,
        "CHUNKS": _CHUNKS,
        "SPLIT": _SPLIT,
        "WHOLE": _WHOLE,
        "ALIGNMENT": _ALIGNMENT,
        "HAS_TABLE_ROWS": has_table_rows,
        "BLOCK": _BLOCK,
    }
    names = ("q_indptr", "first_pos", "table_rows", "items", "limits", "merges")
    signature = {**dict.fromkeys(names, "*i32"), "num_segments": "i32", "window": "i32"}
    shape = f"{tiling.short}-{tiling.middle}-{tiling.long}-{tiling.chunk}"
    name = f"plan {shape}{' table rows' if has_table_rows else ''}"
    return Launch(_plan, signature, constants, num_warps=4, name=name)


def shipped() -> list[Launch]:
    """Heads of Llama 3.1 8B and of Qwen 2.5 0.5B."""
    return [
        _launch(Tiling(4, 16, 32), False),
        _launch(Tiling(4, 16, 32), True),
        _launch(Tiling(2, 9, 18), True),
    ]
