"""Attention of a step's rows over a paged KV cache, ragged and causal by absolute position."""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256  # bounds the score matrix of the reference: [G, 256 * H / G, keys] in fp32


@dataclass(frozen=True, slots=True)
class AttnMeta:
    """Where a step's rows stand and where their keys lie.  Built once per step, read by every layer.

    Segment s owns rows q_indptr[s] : q_indptr[s + 1], at consecutive positions from first_pos[s].
    """

    q_indptr: Tensor  # [S + 1] int32, from 0 to T
    first_pos: Tensor  # [S] int32, absolute position of the segment's first row
    block_tables: (
        Tensor  # [S, maxB] int32, device block of each block of the conversation; -1 = hole, not attended
    )
    positions: Tensor  # [T] int64, absolute position of each row
    slots: Tensor  # [T] int64, block * P + offset where the row's K and V go; -1 = nowhere


def paged_attention_ref(
    q: Tensor, kv: Tensor, meta: AttnMeta, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    bounds = meta.q_indptr.tolist()
    for segment, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        for row in range(begin, end, _ROWS_AT_ONCE):
            rows = slice(row, min(row + _ROWS_AT_ONCE, end))
            attended = _attend(q[rows], kv, meta.block_tables[segment], meta.positions[rows], scale, window)
            out[rows], lse[rows] = attended
    return out, lse if wide == torch.float64 else lse.float()


def _attend(
    q: Tensor, kv: Tensor, table: Tensor, positions: Tensor, scale: float, window: int | None
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

    blocks = kv[table[index].long()].to(wide)  # [n, 2, G, P, D]
    keys, values = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [G, n * P, D] each
    at = (index[:, None] * slots + torch.arange(slots)).flatten()
    seen = at <= positions[:, None]
    if window is not None:
        seen &= at > positions[:, None] - window
    # Slots no row may see can hold anything, NaN included, and 0 * NaN is NaN.
    values = values.masked_fill(~seen.any(dim=0)[:, None], 0.0)

    # The heads that share a KV head become rows of one product: K and V are read once for all of them.
    folded = q.to(wide).view(rows, groups, heads // groups, size).permute(1, 0, 2, 3)  # [G, R, H / G, D]
    scores = (folded.flatten(1, 2) @ keys.mT).view(groups, rows, heads // groups, -1) * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(dim=-1)  # [G, R, H / G]
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = (weights.flatten(1, 2) @ values).view(groups, rows, heads // groups, size)
    return out.permute(1, 0, 2, 3).flatten(1, 2), lse.permute(1, 0, 2).flatten(1, 2)


def paged_attention(
    q: Tensor, kv: Tensor, meta: AttnMeta, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q K^T) V over the keys each row may see.

    q: [T, H, D]; kv: [B, 2, G, P, D], keys at [:, 0], values at [:, 1], same dtype as q; H is a multiple of G, query
    head h reads KV head h // (H / G).  The row at position p sees every position <= p whose block is present in its
    segment's table and, with a window, > p - window.
    Returns out [T, H, D] in q's dtype and lse [T, H] fp32, the natural log of the sum of exponentials, for merge_state.
    A row that sees no key gives (0, -inf).  Slots that no row sees are never interpreted: they may hold NaN.
    """
    return paged_attention_ref(q, kv, meta, scale, window)
