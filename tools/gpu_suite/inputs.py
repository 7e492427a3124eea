"""Steps over a paged cache for the kernels to work on: blocks in random places, spare ones between them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kernels.paged_attention import AttnMeta, Extents


@dataclass(frozen=True)
class PagedStep:
    """q [T, H, D]; kv [B, 2, G, P, D]; `blocks` are those that the segments use."""

    q: Tensor
    kv: Tensor
    meta: AttnMeta
    blocks: Tensor

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    def segment(self, index: int) -> "PagedStep":
        """That segment as a step of its own, in the same cache."""
        meta = self.meta
        begin, end = (int(bound) for bound in meta.q_indptr[index : index + 2])
        assert meta.extents is not None
        one = slice(index, index + 1)
        extents = Extents(meta.extents.lengths[one], meta.extents.ends[one])
        alone = AttnMeta(
            torch.tensor([0, end - begin], dtype=torch.int32, device=self.q.device),
            meta.first_pos[one].clone(),
            meta.segment_tables[one].clone(),
            meta.positions[begin:end].clone(),
            meta.slots[begin:end].clone(),
            extents=extents,
        )
        return replace(self, q=self.q[begin:end].clone(), meta=alone)

    def with_tables(self, tables: Tensor) -> "PagedStep":
        """Other blocks, on the same device."""
        meta = self.meta
        tensors = meta.q_indptr, meta.first_pos, tables, meta.positions, meta.slots
        return replace(self, meta=AttnMeta(*tensors, table_rows=meta.table_rows, extents=meta.extents))

    def on_host(self) -> "PagedStep":
        meta = self.meta
        tensors = meta.q_indptr, meta.first_pos, meta.segment_tables, meta.positions, meta.slots
        host = AttnMeta(*(tensor.cpu() for tensor in tensors))
        return replace(self, q=self.q.cpu(), kv=self.kv.cpu(), meta=host)


def make_meta(
    new: Sequence[int],
    cached: Sequence[int],
    tables: Tensor,
    slots: int,
    device: torch.device,
    table_rows: Tensor | None = None,
) -> AttnMeta:
    """tables [S or R, maxB] int32 in the host's memory; rows are written to where they stand."""
    positions = torch.cat([torch.arange(c, c + n) for n, c in zip(new, cached, strict=True)])
    rows = torch.arange(len(new)) if table_rows is None else table_rows.long()
    owners = rows.repeat_interleave(torch.tensor(new))
    blocks = tables[owners, positions // slots].long()
    places = torch.where(blocks < 0, -1, blocks * slots + positions % slots)
    lengths = np.array(new, np.int64)
    return AttnMeta(
        torch.tensor([0, *accumulate(new)], dtype=torch.int32, device=device),
        torch.tensor(cached, dtype=torch.int32, device=device),
        tables.to(device),
        positions.to(device),
        places.to(device),
        table_rows=None if table_rows is None else table_rows.to(device),
        extents=Extents(lengths, lengths + np.array(cached, np.int64)),
    )


def paged_step(
    new: Sequence[int],
    cached: Sequence[int],
    heads: tuple[int, int, int],
    slots: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    holes: float = 0.0,
    are_alike: bool = False,
    first_block: int = 0,
) -> PagedStep:
    """For comparisons: NaN wherever no row may look, spare blocks full of it.  `are_alike`: all segments read
    the blocks of the last one, as forks do; `first_block`: so many blocks of nothing before those in use.
    """
    num_heads, kv_heads, size = heads
    ends = [n + c for n, c in zip(new, cached, strict=True)]
    counts = [-(-end // slots) for end in ends]
    blocks = max(counts) if are_alike else sum(counts)
    places = first_block + torch.randperm(blocks + 3)
    kv = torch.empty((first_block + blocks + 3, 2, kv_heads, slots, size), dtype=dtype, device=device)
    kv[first_block:] = torch.nan
    tables = torch.full((1 if are_alike else len(new), max(counts) + 1), -1, dtype=torch.int32)
    used = 0
    for segment in range(len(tables)):
        end = max(ends) if are_alike else ends[segment]
        for index in range(-(-end // slots)):
            place, filled = int(places[used]), min(slots, end - index * slots)
            kv[place, :, :, :filled] = torch.randn(2, kv_heads, filled, size).to(dtype).to(device)
            tables[segment, index] = place if torch.rand(()) >= holes else -1
            used += 1
    table_rows = torch.zeros(len(new), dtype=torch.int32) if are_alike else None
    meta = make_meta(new, cached, tables, slots, device, table_rows)
    q = torch.randn(sum(new), num_heads, size).to(dtype).to(device)
    return PagedStep(q, kv, meta, places[:blocks])


def paged_steps(
    new: Sequence[int],
    cached: Sequence[int],
    heads: tuple[int, int, int],
    slots: int,
    device: torch.device,
    least_bytes: float,
    *,
    is_filled: bool = True,
) -> list[PagedStep]:
    """For timing, bfloat16: as many steps of the same form as read at least so many bytes together, each in
    blocks of its own in random places.
    """
    num_heads, kv_heads, size = heads
    counts = [-(-(n + c) // slots) for n, c in zip(new, cached, strict=True)]
    step_bytes = 2 * kv_heads * size * 2 * sum(n + c for n, c in zip(new, cached, strict=True))
    copies = max(1, round(least_bytes / step_bytes + 0.5))
    shape = (copies * sum(counts), 2, kv_heads, slots, size)
    kv = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if is_filled:
        kv.normal_()
    places = torch.randperm(len(kv)).int()
    steps = []
    for part in places.split(sum(counts)):
        tables = torch.full((len(new), max(counts)), -1, dtype=torch.int32)
        for table, mine in zip(tables, part.split(counts), strict=True):
            table[: len(mine)] = mine
        meta = make_meta(new, cached, tables, slots, device)
        q = torch.empty((sum(new), num_heads, size), dtype=torch.bfloat16, device=device)
        steps.append(PagedStep(q.normal_() if is_filled else q, kv, meta, part))
    return steps
