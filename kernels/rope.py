"""Rotary position embedding of q and k, together with the write of k and v into the cache."""

import torch
from torch import Tensor

from kernels.paged_attention import AttnMeta


def rope_ref(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate halves (Hugging Face convention).  x: [T, X, D]; cos_sin: [T, D], this row's cosines, then its sines."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_kv_write_ref(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, kv: Tensor, meta: AttnMeta) -> Tensor:
    rotation = cos_sin[meta.positions]
    kept = (meta.slots >= 0).nonzero().flatten()
    block, offset = meta.slots[kept] // kv.shape[3], meta.slots[kept] % kv.shape[3]
    kv[block, 0, :, offset] = rope_ref(k, rotation)[kept]
    kv[block, 1, :, offset] = v[kept]
    return rope_ref(q, rotation)


def rope_kv_write(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, kv: Tensor, meta: AttnMeta) -> Tensor:
    """Rotate q and k at meta.positions; write rotated k, and v, into kv at meta.slots; return rotated q, contiguous.

    q: [T, H, D]; k, v: [T, G, D]; they may be views of one fused row.  cos_sin: [M, D] fp32, for each position D/2
    cosines, then D/2 sines.  kv: [B, 2, G, P, D].  Computed in fp32, rounded once.  Slot -1 writes nothing.
    """
    return rope_kv_write_ref(q, k, v, cos_sin, kv, meta)
