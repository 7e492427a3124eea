"""Rotation of q and k, behind an RMSNorm of each head or not, with the write of k and v into the cache: one
kernel, whose contract and reference are in kernels/rope.py.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import described
from kernels.gpu.arguments import ALIGNMENT, require_aligned, require_device, require_float
from kernels.gpu.launch import Launch, pointer, require_gpu
from kernels.paged_attention import AttnMeta
from kernels.rope import HeadNorms, check_places

_MOST_SIZE = 256  # D
_SIZE_STEP = 8
# Elements of a half tile, for 4 warps: a vector of 8 from each half of a head to a thread.  Unmeasured.
_HALF_TILE = 1024


@triton.jit
def _load_halves(x, at, inside, HALF: tl.constexpr):
    """The halves of heads that begin at `at`, in fp32."""
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(x, at, inside, first, second, HALF: tl.constexpr):
    tl.store(x + at, first.to(x.dtype.element_ty), mask=inside)
    tl.store(x + at + HALF, second.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _norm_halves(first, second, weight, column, HALF: tl.constexpr, EPS: tl.constexpr, dtype: tl.constexpr):
    """RMSNorm of whole heads, rounded to `dtype` as if it were stored before the rotation reads it."""
    # The weight as often as there are heads: each thread loads its own part of it.
    column = tl.broadcast_to(column, first.shape)
    first_weight = tl.load(weight + column, mask=column < HALF, other=0.0)
    second_weight = tl.load(weight + HALF + column, mask=column < HALF, other=0.0)
    square = tl.sum(first * first + second * second, axis=1, keep_dims=True)
    factor = tl.rsqrt(square / (2 * HALF) + EPS)
    first = (first * factor).to(weight.dtype.element_ty).to(tl.float32) * first_weight.to(tl.float32)
    second = (second * factor).to(weight.dtype.element_ty).to(tl.float32) * second_weight.to(tl.float32)
    return first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)


@triton.jit
def _rotate_halves(first, second, cos_sin, positions, row, is_row, column, HALF: tl.constexpr):
    position = tl.load(positions + row, mask=is_row, other=0)
    angle = position * (2 * HALF) + column
    known = is_row & (column < HALF)
    cos = tl.load(cos_sin + angle, mask=known, other=0.0)
    sin = tl.load(cos_sin + angle + HALF, mask=known, other=0.0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions", "slots"])
def _rotate_and_write(
    q,
    k,
    v,
    cos_sin,
    q_weight,
    k_weight,
    kv,
    out,
    positions,
    slots,
    num_rows,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    NORMS: tl.constexpr,
    ROTATES: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program: PAIRS pairs of a row and a head of it, as tiles [PAIRS, WIDTH] of the heads' two halves.
    The first programs take k and v together, the others q.
    """
    HALF: tl.constexpr = SIZE // 2
    program = tl.program_id(0)
    num_kv_programs = tl.cdiv(num_rows * KV_HEADS, PAIRS)
    column = tl.arange(0, WIDTH)[None, :]
    if program < num_kv_programs:
        pair = program * PAIRS + tl.arange(0, PAIRS)[:, None]
        row, head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
        is_row = row < num_rows
        slot = tl.load(slots + row, mask=is_row, other=-1)
        inside = (slot >= 0) & (column < HALF)
        first, second = _load_halves(k, row * K_STRIDE + head * SIZE + column, inside, HALF)
        v_first, v_second = _load_halves(v, row * V_STRIDE + head * SIZE + column, inside, HALF)
        if NORMS:
            first, second = _norm_halves(first, second, k_weight, column, HALF, EPS, k.dtype.element_ty)
        if ROTATES:
            first, second = _rotate_halves(first, second, cos_sin, positions, row, is_row, column, HALF)
        at = (slot // SLOTS) * BLOCK_STRIDE + (head * SLOTS + slot % SLOTS) * SIZE + column
        _store_halves(kv, at, inside, first, second, HALF)
        _store_halves(kv, at + KV_HEADS * SLOTS * SIZE, inside, v_first, v_second, HALF)
    else:
        pair = (program - num_kv_programs) * PAIRS + tl.arange(0, PAIRS)[:, None]
        row, head = (pair // HEADS).to(tl.int64), pair % HEADS
        is_row = row < num_rows
        inside = is_row & (column < HALF)
        first, second = _load_halves(q, row * Q_STRIDE + head * SIZE + column, inside, HALF)
        if NORMS:
            first, second = _norm_halves(first, second, q_weight, column, HALF, EPS, q.dtype.element_ty)
        if ROTATES:
            first, second = _rotate_halves(first, second, cos_sin, positions, row, is_row, column, HALF)
        at = (row * HEADS + head) * SIZE + column
        _store_halves(out, at, inside, first, second, HALF)


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    kv: Tensor,
    meta: AttnMeta,
    norms: HeadNorms | None,
) -> Tensor:
    """As kernels.rope.rope_kv_write.  Positions and slots that lie on a GPU are not read on the host: they
    are the caller's to keep in range.
    """
    tensors = (q, k, v, kv, cos_sin, *((norms.q_weight, norms.k_weight) if norms else ()))
    key = (
        rope_kv_write,
        *(
            x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % ALIGNMENT)
            for x in tensors
        ),
        norms.eps if norms else None,
    )
    launch: Launch | None = meta.plans.get(key)
    if launch is None:
        _check(q, k, v, cos_sin, kv, meta, norms)
        launch = meta.plans[key] = _launch(
            q.device,
            q.dtype,
            (q.shape[1], k.shape[1], q.shape[2], kv.shape[3]),
            *(x.stride(0) for x in (q, k, v)),
            kv.stride(0),
            cos_sin is not None,
            None if norms is None else (norms.q_weight.dtype, norms.eps),
        )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    pairs = launch.constants["PAIRS"]
    programs = triton.cdiv(len(q) * k.shape[1], pairs) + triton.cdiv(len(q) * q.shape[1], pairs)
    # q stands for what is not read.
    angles = q if cos_sin is None else cos_sin
    weights = (q, q) if norms is None else (norms.q_weight, norms.k_weight)
    launch((programs,), q, k, v, angles, *weights, kv, out, meta.positions, meta.slots, len(q))
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    kv: Tensor,
    meta: AttnMeta,
    norms: HeadNorms | None,
) -> None:
    """What the kernel takes for granted.  Raises ValueError, which names the argument."""
    if q.dim() != 3 or q.shape[2] % _SIZE_STEP or not 0 < q.shape[2] <= _MOST_SIZE or not q.shape[1]:
        wanted = f"[T, H, D] with D a multiple of {_SIZE_STEP} up to {_MOST_SIZE}"
        raise ValueError(f"q must be {wanted}, got {described(q)}")
    require_float("q", q)
    rows, heads, size = q.shape
    if kv.dim() != 5 or kv.shape != (*kv.shape[:1], 2, *kv.shape[2:4], size) or 0 in kv.shape[2:]:
        raise ValueError(f"kv must be [B, 2, G, P, {size}] to go with q {described(q)}, got {described(kv)}")
    if kv.dtype != q.dtype or (len(kv) and not kv[0].is_contiguous()):
        raise ValueError(f"each block of kv must be contiguous and of q's {q.dtype}, got {described(kv)}")
    for name, x, count in (("q", q, heads), ("k", k, kv.shape[2]), ("v", v, kv.shape[2])):
        if x.shape != (rows, count, size) or x.dtype != kv.dtype or x.stride()[1:] != (size, 1):
            dtype = str(kv.dtype).removeprefix("torch.")
            wanted = f"{dtype} {[rows, count, size]} with strides (any, {size}, 1)"
            raise ValueError(f"{name} must be {wanted}, got {described(x)}")
    given = {"q": q, "k": k, "v": v, "kv": kv}
    if norms is not None:
        given |= {"q_weight": norms.q_weight, "k_weight": norms.k_weight}
        for name, weight in (("q_weight", norms.q_weight), ("k_weight", norms.k_weight)):
            is_known = weight.dtype in (q.dtype, torch.float32) and weight.dtype == norms.q_weight.dtype
            if weight.shape != (size,) or not weight.is_contiguous() or not is_known:
                wanted = f"contiguous [{size}] in float32 or q's dtype, both alike"
                raise ValueError(f"{name} must be {wanted}, got {described(weight)}")
    if cos_sin is not None:
        given["cos_sin"] = cos_sin
        if cos_sin.shape[1:] != (size,) or not cos_sin.is_contiguous() or cos_sin.dtype != torch.float32:
            raise ValueError(f"cos_sin must be contiguous float32 [M, {size}], got {described(cos_sin)}")
    for name, x in given.items():
        require_device(name, x, q.device)
        require_aligned(name, x)
    for name, places in (("positions", meta.positions), ("slots", meta.slots)):
        require_device(name, places, q.device)
        if len(places) != rows:
            raise ValueError(f"{name} must be of q's {rows} rows, got {len(places)}")
    if q.is_cpu:
        check_places(cos_sin, kv, meta, rows, size)


@functools.cache
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    q_stride: int,
    k_stride: int,
    v_stride: int,
    block_stride: int,
    rotates: bool,
    norms: tuple[torch.dtype, float] | None,
) -> Launch:
    """sizes: H, G, D and P; strides in elements; norms: the dtype of their weights, epsilon."""
    require_gpu(device)
    heads, kv_heads, size, slots = sizes
    width = triton.next_power_of_2(size // 2)
    x = pointer(dtype)
    weight = x if norms is None else pointer(norms[0])
    signature = {"q": x, "k": x, "v": x, "cos_sin": pointer(torch.float32) if rotates else x}
    signature |= {"q_weight": weight, "k_weight": weight, "kv": x, "out": x}
    # The heads of one fused row are the usual case.
    fused = (heads + 2 * kv_heads) * size
    is_usual = (q_stride, k_stride, v_stride) == (fused,) * 3 and block_stride == 2 * kv_heads * slots * size
    return Launch(
        _rotate_and_write,
        signature | {"positions": "*i64", "slots": "*i64", "num_rows": "i32"},
        {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "SIZE": size,
            "SLOTS": slots,
            "Q_STRIDE": q_stride,
            "K_STRIDE": k_stride,
            "V_STRIDE": v_stride,
            "BLOCK_STRIDE": block_stride,
            "EPS": 0.0 if norms is None else norms[1],
            "NORMS": norms is not None,
            "ROTATES": rotates,
            "PAIRS": _HALF_TILE // width,
            "WIDTH": width,
        },
        num_warps=4,
        name=f"rope_kv_write {x[1:]} H={heads} G={kv_heads} D={size} P={slots}"
        f"{' unrotated' * (not rotates)}{'' if norms is None else f' normed by {weight[1:]}'}"
        f"{'' if is_usual else f' strides {q_stride} {k_stride} {v_stride} {block_stride}'}",
    )


def shipped() -> list[Launch]:
    """The forms that the shapes of real models give, q, k and v in one fused row."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    llama, qwen = (32, 8, 128, 32), (14, 2, 64, 32)
    forms = [
        (bf16, llama, True, None),
        (bf16, qwen, True, None),
        (bf16, llama, True, (bf16, 1e-6)),
        (bf16, (4, 1, 256, 32), True, (fp32, 1e-6)),
        (bf16, (32, 32, 80, 16), True, None),
        (bf16, (16, 4, 128, 64), False, None),
        (fp16, llama, True, None),
        (fp32, qwen, True, None),
    ]
    launches = []
    for dtype, (heads, kv_heads, size, slots), rotates, norms in forms:
        fused, block = (heads + 2 * kv_heads) * size, 2 * kv_heads * slots * size
        sizes = heads, kv_heads, size, slots
        launches.append(
            _launch(torch.device("cpu"), dtype, sizes, fused, fused, fused, block, rotates, norms)
        )
    return launches
