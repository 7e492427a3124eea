"""Rotary position embedding of q and k, together with the write of k and v into the cache."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import described
from kernels.native.library import RopeArgs
from kernels.paged_attention import AttnMeta
from kernels.rms_norm import rms_norm


def rope_ref(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate halves (Hugging Face convention).  x: [T, H, D]; cos_sin: [T, D], cosines, then sines."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_kv_write_ref(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor | None, kv: Tensor, meta: AttnMeta
) -> Tensor:
    if cos_sin is not None:
        q, k = (rope_ref(x, cos_sin[meta.positions]) for x in (q, k))
    kept = (meta.slots >= 0).nonzero().flatten()
    block, offset = meta.slots[kept] // kv.shape[3], meta.slots[kept] % kv.shape[3]
    kv[block, 0, :, offset] = k[kept]
    kv[block, 1, :, offset] = v[kept]
    return q.contiguous()


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of every head of q and k, before they are rotated.  Weights [D] in q's dtype or fp32."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    kv: Tensor,
    meta: AttnMeta,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Rotate q and k at meta.positions; write rotated k, and v, into kv at meta.slots; return rotated q.

    q: [T, H, D]; k, v: [T, G, D]; they may be views of one fused row.  cos_sin: [M, D] fp32, D/2 cosines
    and D/2 sines of each position; None rotates nothing.  kv: [B, 2, G, P, D].  Computed in fp32, rounded
    once; slot -1 writes nothing.  The result is contiguous.  Raises ValueError for arguments that do not fit
    together.
    """
    if dispatch.is_triton(q):
        from kernels.gpu import rope

        return rope.rope_kv_write(q, k, v, cos_sin, kv, meta, norms)
    if norms is not None:
        q, k = rms_norm(q, norms.q_weight, norms.eps), rms_norm(k, norms.k_weight, norms.eps)
    library = dispatch.library()
    dtypes = q.dtype, k.dtype, v.dtype, kv.dtype
    strides = q.stride(), k.stride(), v.stride(), kv.stride()
    turns = None if cos_sin is None else (cos_sin.shape, cos_sin.stride(), cos_sin.dtype)
    at = q.data_ptr(), k.data_ptr(), v.data_ptr(), kv.data_ptr()
    misaligned = (at[0] | at[1] | at[2] | at[3]) % q.itemsize
    key = (q.shape, k.shape, v.shape, kv.shape, dtypes, strides, turns, misaligned)
    plan = meta.plans.get(key)
    if plan is None:
        plan = meta.plans[key] = _plan(q, k, v, cos_sin, kv, meta)
    if library is None or not dispatch.covers(q.dtype):
        return rope_kv_write_ref(q, k, v, cos_sin, kv, meta)
    out = torch.empty_like(q)
    angles = None if cos_sin is None else cos_sin.data_ptr()
    library.rope_kv_write(plan, *at[:3], angles, at[3], out.data_ptr())
    return out


def _plan(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor | None, kv: Tensor, meta: AttnMeta) -> object:
    """What the native kernel needs to know beyond addresses: checked once per step, used by every layer."""
    if q.dim() != 3 or q.shape[2] % 2 or not q.is_floating_point():
        raise ValueError(f"q must be [T, H, D] of a float dtype with an even D, got {described(q)}")
    rows, heads, size = q.shape
    if kv.dim() != 5 or kv.shape != (*kv.shape[:1], 2, *kv.shape[2:4], size) or 0 in kv.shape[2:]:
        raise ValueError(f"kv must be [B, 2, G, P, {size}] to go with q {described(q)}, got {described(kv)}")
    blocks, _, kv_heads, slots, _ = kv.shape
    if (blocks and not kv[0].is_contiguous()) or kv.data_ptr() % kv.itemsize:
        raise ValueError(f"each block of kv must be contiguous and aligned, got {described(kv)}")
    for name, x, count in (("q", q, heads), ("k", k, kv_heads), ("v", v, kv_heads)):
        if (
            x.shape != (rows, count, size)
            or x.dtype != kv.dtype
            or x.stride()[1:] != (size, 1)
            or x.data_ptr() % x.itemsize
        ):
            wanted = (
                f"{str(kv.dtype).removeprefix('torch.')} {[rows, count, size]} with strides (any, {size}, 1)"
            )
            raise ValueError(f"{name} must be {wanted}, got {described(x)}")
    check_places(cos_sin, kv, meta, rows, size)
    return ctypes.pointer(
        RopeArgs(
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
    )


def check_places(cos_sin: Tensor | None, kv: Tensor, meta: AttnMeta, rows: int, size: int) -> None:
    """Raises ValueError unless all rows of meta, so many, have places in kv and in cos_sin."""
    if cos_sin is not None:
        _check_angles(cos_sin, size, meta.positions)
    if rows != meta.positions.numel():
        raise ValueError(f"q has {rows} rows, meta has {meta.positions.numel()}")
    if rows:
        slot, (blocks, _, _, slots, _) = int(meta.slots.max()), kv.shape
        if slot >= blocks * slots:
            raise ValueError(f"slot {slot} is beyond the {blocks} blocks of {slots} slots of kv")


def _check_angles(cos_sin: Tensor, size: int, positions: Tensor) -> None:
    fits = cos_sin.dim() == 2 and cos_sin.shape[1] == size and cos_sin.is_contiguous()
    if not fits or cos_sin.dtype != torch.float32:
        raise ValueError(f"cos_sin must be contiguous float32 [M, {size}], got {described(cos_sin)}")
    least, most = (int(positions.min()), int(positions.max())) if positions.numel() else (0, -1)
    if least < 0 or most >= len(cos_sin):
        raise ValueError(f"positions {least} .. {most} are not all in the {len(cos_sin)} rows of cos_sin")
