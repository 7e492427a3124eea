"""Rotary position embedding of q and k, together with the write of k and v into the cache."""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.native import RopeArgs
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
    library = dispatch.library()
    if library is None or not dispatch.covers(q):
        return rope_kv_write_ref(q, k, v, cos_sin, kv, meta)
    key = (library, q.shape, q.stride(), k.stride(), v.stride(), q.dtype, cos_sin.shape, kv.shape, kv.stride(0))
    plan = meta.plans.get(key)
    if plan is None:
        plan = meta.plans[key] = _plan(q, k, v, cos_sin, kv, meta)
    out = q.new_empty(q.shape)
    library.rope_kv_write(
        plan, q.data_ptr(), k.data_ptr(), v.data_ptr(), cos_sin.data_ptr(), kv.data_ptr(), out.data_ptr()
    )
    return out


def _plan(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, kv: Tensor, meta: AttnMeta) -> object:
    """What the native kernel needs to know beyond addresses: checked once per step, used by every layer."""
    rows, heads, size = q.shape
    blocks, _, kv_heads, slots, _ = kv.shape
    for name, x, count in (("q", q, heads), ("k", k, kv_heads), ("v", v, kv_heads)):
        if x.shape != (rows, count, size) or x.dtype != kv.dtype or x.stride()[1:] != (size, 1):
            raise ValueError(
                f"{name} must be {kv.dtype} {[rows, count, size]} with whole rows side by side, "
                f"got {x.dtype} {list(x.shape)} with strides {x.stride()}"
            )
    if kv.shape != (blocks, 2, kv_heads, slots, size) or (blocks and not kv[0].is_contiguous()):
        raise ValueError(f"kv must be [B, 2, G, P, {size}] with contiguous blocks, got {list(kv.shape)}")
    if cos_sin.dtype != torch.float32 or cos_sin.shape[1] != size or not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin must be float32 [M, {size}], got {cos_sin.dtype} {list(cos_sin.shape)}")
    if rows != meta.positions.numel():
        raise ValueError(f"q has {rows} rows, meta has {meta.positions.numel()}")
    if rows and not (0 <= int(meta.positions.min()) and int(meta.positions.max()) < len(cos_sin)):
        raise ValueError(f"position {int(meta.positions.max())} is beyond the {len(cos_sin)} rows of cos_sin")
    if rows and int(meta.slots.max()) >= blocks * slots:
        raise ValueError(f"slot {int(meta.slots.max())} is beyond the {blocks} blocks of {slots} slots of kv")
    return RopeArgs(
        positions=meta.positions.data_ptr(),
        slots=meta.slots.data_ptr(),
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        slots_per_block=slots,
        block_stride=kv.stride(0),
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        is_bf16=q.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
    )
