"""What attention on a GPU refuses, without a look at tensors that lie there."""

import math

import numpy as np
from torch import Tensor

from kernels.checks import described
from kernels.gpu.arguments import require_device, require_float
from kernels.gpu.launch import require_gpu
from kernels.paged_attention import MOST_POSITIONS, AttnMeta, Extents, check_places, check_shapes

_LARGEST_GROUP = 128  # query heads per KV head: the rows of the largest tile


def check(
    q: Tensor, kv: Tensor, meta: AttnMeta, scale: float, window: int | None, softcap: float | None
) -> Extents:
    """What the kernels take for granted, as far as the host knows it; returns the extents of meta.  Without
    them, which tensors on a GPU must have, it is read from the tensors.  Raises ValueError, which names the
    argument.
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
    check_shapes(q.shape, q.dtype, kv, window, softcap)
    if meta.extents is not None:
        extents = meta.extents
        _check_extents(rows, kv, meta, extents)
    elif q.device.type == "cpu":
        check_places(rows, kv, meta)
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


def _check_extents(rows: int, kv: Tensor, meta: AttnMeta, extents: Extents) -> None:
    """What check_places asks, of what the host knows."""
    segments = meta.first_pos.shape
    lengths, ends = extents.lengths, extents.ends
    if lengths.shape != segments or ends.shape != segments or (lengths < 0).any() or (ends < lengths).any():
        raise ValueError(f"extents must be lengths and ends of {segments[0]} segments, got {extents}")
    if len(meta.positions) != rows or lengths.sum() > rows:
        raise ValueError(
            f"meta and its extents must be of q's {rows} rows, got {len(meta.positions)}, {extents}"
        )
    width, most = meta.block_tables.shape[1] * kv.shape[3], int(ends.max(initial=0))
    if most > min(width, MOST_POSITIONS):
        raise ValueError(f"block_tables must be wide enough for {most} positions, got {width}")
