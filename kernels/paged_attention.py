"""Attention of a step's rows over a paged KV cache, ragged and causal by absolute position."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import dispatch
from kernels.checks import described
from kernels.native.library import AttentionArgs, Library

_ROWS_AT_ONCE = 256  # bounds the score matrix of the reference: [G, 256 * H / G, keys] in fp32
_ALIGNMENT = 4  # bytes: pairs of bf16 are read as one word
MOST_POSITIONS = 2**31 - 1024  # they are 32-bit in the kernels, which round them up to whole chunks


@dataclass(frozen=True, slots=True)
class Extents:
    """What the host knows of a step's segments, so that nobody has to ask the device: how much work there can
    be.  Both [S] int64, and exact, or else the most that the device's tensors will ever say.
    """

    lengths: NDArray[np.int64]  # rows
    ends: NDArray[np.int64]  # positions before and in the segment: the first one plus the length


@dataclass(frozen=True, slots=True)
class AttnMeta:
    """Where a step's rows stand and where their keys lie.  Built once per step, read by every layer.

    Segment s owns rows q_indptr[s] : q_indptr[s + 1], at consecutive positions from first_pos[s].  With
    `table_rows`, segments find their blocks in rows of block_tables [R, maxB] that they may share.
    Raises ValueError for a tensor of another dtype, shape or layout.
    """

    q_indptr: Tensor  # [S + 1] int32, from 0 to T
    first_pos: Tensor  # [S] int32, absolute position of the segment's first row
    block_tables: (
        Tensor  # [S, maxB] int32, device block of each block of a conversation; -1 = hole, not attended
    )
    positions: Tensor  # [T] int64, absolute position of each row
    slots: Tensor  # [T] int64, block * P + offset where the row's K and V go; -1 = nowhere
    table_rows: Tensor | None = None  # [S] int32, each segment's row of block_tables; None: its own
    extents: Extents | None = None  # needed for tensors on a GPU
    plans: dict[object, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What kernels derived from these tensors and checked about them; the first layer of a step fills it."""

    def __post_init__(self) -> None:
        segments, rows = self.first_pos.numel(), self.positions.numel()
        tables = segments if self.table_rows is None else len(self.block_tables)
        expected = {
            "q_indptr": (torch.int32, (segments + 1,)),
            "first_pos": (torch.int32, (segments,)),
            "block_tables": (torch.int32, (tables, self.block_tables.shape[-1])),
            "positions": (torch.int64, (rows,)),
            "slots": (torch.int64, (rows,)),
            "table_rows": (torch.int32, (segments,)),
        }
        if self.table_rows is None:
            del expected["table_rows"]
        for name, (dtype, shape) in expected.items():
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
                given = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}, got {given}")

    @property
    def segment_tables(self) -> Tensor:
        """[S, maxB]: the blocks of each segment."""
        rows = self.table_rows
        return self.block_tables if rows is None else self.block_tables.index_select(0, rows)

    @property
    def num_positions(self) -> int:
        """No row stands at this position or behind it."""
        if self.extents is not None:
            return int(self.extents.ends.max())
        return int(self.positions.max()) + 1


def paged_attention_ref(
    q: Tensor,
    kv: Tensor,
    meta: AttnMeta,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in torch, one segment at a time; lse has at least fp32, fp64 for q in fp64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    bounds, tables = meta.q_indptr.tolist(), meta.segment_tables
    for segment, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        for row in range(begin, end, _ROWS_AT_ONCE):
            rows = slice(row, min(row + _ROWS_AT_ONCE, end))
            at = tables[segment], meta.positions[rows]
            out[rows], lse[rows] = _attend(q[rows], kv, *at, scale, window, softcap)
    return out, lse


def _attend(
    q: Tensor,
    kv: Tensor,
    table: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Rows of one segment, q [R, H, D] -> out [R, H, D], lse [R, H], both at least fp32."""
    rows, heads, size = q.shape
    _, _, groups, slots, _ = kv.shape
    first = 0 if window is None else max(0, int(positions[0]) - window + 1) // slots
    index = torch.arange(first, int(positions[-1]) // slots + 1)
    index = index[table[index] >= 0]
    wide = torch.promote_types(q.dtype, torch.float32)
    if not len(index):
        return q.new_zeros(q.shape, dtype=wide), q.new_full((rows, heads), -torch.inf, dtype=wide)

    gathered = kv.permute(1, 2, 0, 3, 4).index_select(2, table[index].long())  # [2, G, n, P, D], a copy
    keys, values = gathered.to(wide).flatten(2, 3)  # [2] x [G, n * P, D]
    at = (index[:, None] * slots + torch.arange(slots)).flatten()
    seen = at <= positions[:, None]
    if window is not None:
        seen &= at > positions[:, None] - window
    # Slots no row may see can hold anything, NaN included, and 0 * NaN is NaN.
    values[:, ~seen.any(dim=0)] = 0.0

    # The heads that share a KV head become rows of one product: K and V are read once for all of them.
    folded = q.to(wide).view(rows, groups, heads // groups, size).permute(1, 0, 2, 3)  # [G, R, H / G, D]
    scores = (folded.flatten(1, 2) @ keys.mT).view(groups, rows, heads // groups, -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(dim=-1)  # [G, R, H / G]
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = (weights.flatten(1, 2) @ values).view(groups, rows, heads // groups, size)
    return out.permute(1, 0, 2, 3).flatten(1, 2), lse.permute(1, 0, 2).flatten(1, 2)


def paged_attention(
    q: Tensor,
    kv: Tensor,
    meta: AttnMeta,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q K^T) V over the keys each row may see.

    q: [T, H, D]; kv: [B, 2, G, P, D] of q's dtype, keys at [:, 0], values at [:, 1]; query head h reads KV
    head h // (H / G).  The row at position p sees every position <= p whose block is present in its segment's
    table and, with a window, > p - window.  With a softcap c > 0, a score s becomes c * tanh(s / c).
    Returns out [T, H, D] in q's dtype and lse [T, H] fp32, the natural log of the sum of exponentials, as
    merge_state takes it.  A row that sees no key gives (0, -inf).  Slots that no row sees may hold NaN.
    The native kernel gives a row the same bits alone and in any batch, alone and among rows of its segment.
    Raises ValueError for arguments that do not fit together.
    """
    if q.dim() != 3 or q.shape[2] % 2 or not q.is_floating_point():
        raise ValueError(f"q must be [T, H, D] of a float dtype with an even D, got {described(q)}")
    if dispatch.is_triton(q):
        from kernels.gpu import attention

        return attention.paged_attention(q, kv, meta, scale, window, softcap)
    library = dispatch.library()
    plan = attention_plan(library, q.shape, q.dtype, kv, meta, scale, window, softcap)
    if library is None or plan is None:
        return paged_attention_ref(q, kv, meta, scale, window, softcap)
    q = q.contiguous()
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32)
    library.paged_attention(plan, q.data_ptr(), kv.data_ptr(), out.data_ptr(), lse.data_ptr())
    return out, lse


def attention_plan(
    library: Library | None,
    q_shape: Sequence[int],
    dtype: torch.dtype,
    kv: Tensor,
    meta: AttnMeta,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Any:
    """A pointer to the AttentionArgs of a step, for the native kernel; None where torch computes it.

    Made and checked for a step's first layer and kept in `meta` for the others.  q_shape: [T, H, D].  Raises
    ValueError for arguments that do not fit together.
    """
    cache = kv.dtype, kv.shape, kv.stride(), kv.data_ptr() % _ALIGNMENT
    key = (library, q_shape, dtype, cache, scale, window, softcap)
    if key not in meta.plans:
        check_shapes(q_shape, dtype, kv, window, softcap)
        check_places(q_shape[0], kv, meta)
        meta.plans[key] = None, None
        if library is not None and native_covers(dtype, q_shape[2], kv.shape[3]):
            tables = meta.segment_tables
            plan = ctypes.pointer(_arguments(q_shape, dtype, kv, meta, tables, scale, window, softcap))
            memory = torch.empty(library.plan_attention(plan, None), dtype=torch.uint8)
            library.plan_attention(plan, memory.data_ptr())
            meta.plans[key] = plan, (memory, tables)  # which the plan points to
    return meta.plans[key][0]


def native_covers(dtype: torch.dtype, size: int, slots: int) -> bool:
    return dispatch.covers(dtype) and size <= 256 and slots in (16, 32, 64)


def _arguments(
    q_shape: Sequence[int],
    dtype: torch.dtype,
    kv: Tensor,
    meta: AttnMeta,
    tables: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> AttentionArgs:
    return AttentionArgs(
        q_indptr=meta.q_indptr.data_ptr(),
        first_pos=meta.first_pos.data_ptr(),
        block_tables=tables.data_ptr(),
        segments=meta.first_pos.numel(),
        table_width=tables.shape[1],
        heads=q_shape[1],
        kv_heads=kv.shape[2],
        size=q_shape[2],
        slots=kv.shape[3],
        block_stride=kv.stride(0),
        window=window or 0,
        is_bf16=dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        scale=scale,
        softcap=softcap or 0.0,
    )


def check_shapes(
    q_shape: Sequence[int], dtype: torch.dtype, kv: Tensor, window: int | None, softcap: float | None
) -> None:
    """What the kernels take for granted of tensors without a look at what they hold.  Raises ValueError,
    which names the argument.
    """
    _, heads, size = q_shape
    if kv.dtype != dtype:
        raise ValueError(f"kv must have q's dtype {dtype}, got {kv.dtype}")
    if kv.dim() != 5 or kv.shape[1] != 2 or kv.shape[4] != size or 0 in kv.shape[2:] or heads % kv.shape[2]:
        wanted = f"[B, 2, G, P, {size}] with a G that divides {heads}"
        raise ValueError(f"kv must be {wanted} to go with q {list(q_shape)}, got {list(kv.shape)}")
    if len(kv) and not kv[0].is_contiguous():
        raise ValueError(f"each block of kv must be contiguous, got {described(kv)}")
    if kv.data_ptr() % _ALIGNMENT:
        raise ValueError(f"kv must begin at a multiple of {_ALIGNMENT} bytes, got {kv.data_ptr():#x}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    if softcap is not None and not 0 < softcap < torch.inf:
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")


def check_places(rows: int, kv: Tensor, meta: AttnMeta) -> None:
    """The same of what the tensors of a step of so many rows hold: they are read."""
    blocks, slots = kv.shape[0], kv.shape[3]
    lengths = meta.q_indptr.diff()
    if meta.q_indptr[0] != 0 or meta.q_indptr[-1] != rows or (lengths < 0).any():
        raise ValueError(f"q_indptr must ascend from 0 to {rows} rows, got {meta.q_indptr.tolist()}")
    starts = torch.repeat_interleave((meta.first_pos - meta.q_indptr[:-1]).long(), lengths.long())
    if not torch.equal(starts + torch.arange(rows), meta.positions):
        raise ValueError("positions must ascend by one from first_pos within each segment")
    if not rows:
        return
    least, most = int(meta.positions.min()), int(meta.positions.max())
    if least < 0 or most >= MOST_POSITIONS:
        raise ValueError(f"positions must lie in [0, {MOST_POSITIONS}), got {least} .. {most}")
    width = meta.block_tables.shape[1]
    if width < most // slots + 1:
        raise ValueError(f"block_tables must be {most // slots + 1} wide for position {most}, got {width}")
    if int(meta.block_tables.max()) >= blocks:
        raise ValueError(f"block_tables names block {int(meta.block_tables.max())}, kv has {blocks}")
