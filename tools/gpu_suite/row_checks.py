"""Comparisons of kernels that work row by row: norms, gates, rotation with cache writes, sampling, copies."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_ref
from kernels.rope import HeadNorms, rope_kv_write, rope_kv_write_ref
from kernels.sampling import SamplingRows, sample
from kernels.silu_mul import gelu_mul, gelu_mul_ref, silu_mul, silu_mul_ref
from tools.gpu_suite.accuracy import Wrong, compare, poisoned, require_equal
from tools.gpu_suite.inputs import make_meta

_EPS = 1e-6
_DTYPES = torch.bfloat16, torch.float16, torch.float32
_ROWS = (1, 7, 300)
RowCheck = tuple[str, bool, Callable[[], dict[str, Any] | None]]


def row_checks(device: torch.device) -> Iterator[RowCheck]:
    """Name, whether it is small, what to do."""
    for dtype in _DTYPES:
        said, is_small = str(dtype).removeprefix("torch."), dtype == torch.float32
        for width in (896, 4096, 1000):
            small = is_small and width != 4096
            yield f"rms_norm {width} {said}", small, lambda w=width, d=dtype: norms(w, d, device)
        for name, gate, ref in (("silu", silu_mul, silu_mul_ref), ("gelu", gelu_mul, gelu_mul_ref)):
            for width in (4864, 330):
                small = is_small and width == 330
                work = lambda g=gate, r=ref, w=width, d=dtype: gates(g, r, w, d, device)  # noqa: E731
                yield f"{name}_mul {width} {said}", small, work
        for heads in ((32, 8, 128), (14, 2, 64), (4, 2, 80)):
            shape, small = "{}/{} x {}".format(*heads), is_small and heads[0] < 32
            for has_norms in (False, True):
                name = f"rope_kv_write {'with norms ' * has_norms}{shape} {said}"
                yield name, small, lambda h=heads, n=has_norms, d=dtype: rotation(h, n, d, device)
    yield "rope_kv_write beyond 2^31 elements", False, lambda: far_writes(device)
    yield "sampling, vocabulary of 152k", False, lambda: sampling(151936, 64, device)
    yield "sampling, vocabulary of 3k", True, lambda: sampling(3001, 12, device)
    for piece_bytes in (16, 2048, 8192, 24576 + 16):
        yield f"copies of {piece_bytes} bytes", True, lambda b=piece_bytes: copies(b, device)


def norms(width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    x, residual = (torch.randn(max(_ROWS), width).to(dtype).to(device) for _ in range(2))
    weight = torch.randn(width).to(dtype).to(device)
    with poisoned():
        out = rms_norm(x, weight, _EPS)
        added, total = add_rms_norm(x, residual, weight, _EPS)

    def ref(x: Tensor, residual: Tensor, weight: Tensor) -> list[Tensor]:
        total = x + residual
        return [rms_norm_ref(x, weight, _EPS), rms_norm_ref(total, weight, _EPS), total]

    figures = compare([out, added, total], ref, x.cpu(), residual.cpu(), weight.cpu())
    for rows in _ROWS:
        require_equal(rms_norm(x[:rows], weight, _EPS), out[:rows], f"{rows} rows")
        few, _ = add_rms_norm(x[:rows], residual[:rows], weight, _EPS)
        require_equal(few, added[:rows], f"{rows} added rows")
    return figures


def gates(
    gate: Callable[[Tensor], Tensor],
    ref: Callable[[Tensor], Tensor],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    x = torch.randn(max(_ROWS), 2 * width).to(dtype).to(device)
    with poisoned():
        out = gate(x)
    # Rounded once, where torch rounds the gate before it multiplies.
    figures = compare(out, ref, x.cpu())
    for rows in _ROWS:
        require_equal(gate(x[:rows]), out[:rows], f"{rows} rows")
    return figures


def rotation(
    heads: tuple[int, int, int], has_norms: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Rows of three segments; a third of all rows has no place in the cache."""
    num_heads, kv_heads, size = heads
    new, cached, slots = (1, 40, 5), (70, 0, 31), 16
    counts = [-(-(n + c) // slots) for n, c in zip(new, cached, strict=True)]
    places = iter(torch.randperm(sum(counts) + 2).tolist())
    tables = torch.full((3, max(counts)), -1, dtype=torch.int32)
    for table, count in zip(tables, counts, strict=True):
        table[:count] = torch.tensor([next(places) for _ in range(count)])
    meta = make_meta(new, cached, tables, slots, device)
    meta.slots[torch.rand(len(meta.slots), device=device) < 0.3] = -1
    rows = torch.randn(sum(new), (num_heads + 2 * kv_heads) * size).to(dtype).to(device)
    cos_sin = torch.rand(128, size, device=device) * 2 - 1
    weights = [torch.randn(size).to(dtype).to(device) for _ in range(2)]
    shape = (sum(counts) + 2, 2, kv_heads, slots, size)
    kv = torch.full(shape, torch.nan, dtype=dtype, device=device)

    def parts(rows: Tensor) -> list[Tensor]:
        split = rows.split([num_heads * size, kv_heads * size, kv_heads * size], dim=1)
        return [part.unflatten(1, (-1, size)) for part in split]

    def on(meta_device: str, slots_of: slice = slice(None)) -> Any:
        moved = make_meta(new, cached, tables, slots, torch.device(meta_device))
        moved.slots[slots_of] = meta.slots[slots_of].to(meta_device)
        return moved

    def ref(rows: Tensor, cos_sin: Tensor, q_weight: Tensor, k_weight: Tensor) -> list[Tensor]:
        q, k, v = parts(rows)
        if has_norms:
            q, k = rms_norm_ref(q, q_weight, _EPS), rms_norm_ref(k, k_weight, _EPS)
        filled = torch.full(shape, torch.nan, dtype=rows.dtype)
        with dispatch.use("torch"):
            rotated = rope_kv_write_ref(q, k, v, cos_sin, filled, on("cpu"))
        return [rotated, filled]

    head_norms = HeadNorms(weights[0], weights[1], _EPS) if has_norms else None
    with poisoned():
        rotated = rope_kv_write(*parts(rows), cos_sin, kv, meta, head_norms)
    return compare([rotated, kv], ref, rows.cpu(), cos_sin.cpu(), *(weight.cpu() for weight in weights))


def far_writes(device: torch.device) -> None:
    """The same rows written near the beginning of a cache, and behind its 2^31st element."""
    num_heads, kv_heads, size, slots, rows = 32, 8, 128, 32, 40
    dtype = torch.bfloat16
    q, k, v = (
        torch.randn(rows, heads, size).to(dtype).to(device) for heads in (num_heads, kv_heads, kv_heads)
    )
    cos_sin = torch.rand(rows, size, device=device)
    first = 2**31 // (2 * kv_heads * slots * size) + 1
    written = []
    for block in (0, first):
        kv = torch.empty((block + 2, 2, kv_heads, slots, size), dtype=dtype, device=device)
        kv[block:] = 0
        tables = torch.tensor([[block, block + 1]], dtype=torch.int32)
        rope_kv_write(q, k, v, cos_sin, kv, make_meta((rows,), (0,), tables, slots, device))
        written.append(kv[block:].clone())
    require_equal(written[1], written[0], "behind 2^31 elements")
    if not written[0].any():
        raise Wrong("nothing was written")


def sampling(vocab: int, num_rows: int, device: torch.device) -> dict[str, Any]:
    """The tokens that the CPU chooses; one draw in fifty may be another, where sums round differently."""
    from kernels.gpu import sampling as triton_sampling

    logits = torch.randn(num_rows, vocab) * 3
    logits[:, 5] = logits[:, 9] = logits.amax(-1) + 0.5  # equals at the top
    at = torch.arange(num_rows)
    rows = SamplingRows(
        temperature=torch.tensor([0.0, 0.7, 1.0, 1.3])[at % 4],
        top_k=torch.tensor([0, 0, 50, 1, 300])[at % 5],
        top_p=torch.tensor([1.0, 0.9, 0.5])[at % 3],
        min_p=torch.tensor([0.0, 0.05])[at % 2],
        seed=torch.randint(2**62, (num_rows,)),
        position=torch.randint(100_000, (num_rows,)),
    )
    with dispatch.use("torch"):
        expected = sample(logits, rows)
    there = SamplingRows(*(getattr(rows, field.name).to(device) for field in fields(rows)))
    on_device = logits.to(device)
    with poisoned():
        chosen = triton_sampling.sample(on_device, there)
    require_equal(chosen.cpu()[at % 4 == 0], expected[at % 4 == 0], "greedy rows")
    differing = int((chosen.cpu() != expected).sum())
    if differing > num_rows // 50:
        raise Wrong(f"{differing} of {num_rows} draws differ from those of the CPU")
    for row in (0, num_rows - 1):
        alone = SamplingRows(*(getattr(there, field.name)[row : row + 1].clone() for field in fields(there)))
        one = triton_sampling.sample(on_device[row : row + 1].clone(), alone)
        require_equal(one, chosen[row : row + 1], f"row {row} alone")
    return {"differing": differing}


def copies(piece_bytes: int, device: torch.device) -> None:
    """From pinned memory to the device and back, as swaps of small pieces do."""
    from kernels.gpu.gather import copy_pieces

    is_gpu, num_pieces = device.type == "cuda", 40
    total = 2 * num_pieces * piece_bytes
    source = torch.randint(256, (total,), dtype=torch.uint8)
    source = source.pin_memory() if is_gpu else source
    to, back = (torch.full((total,), 255, dtype=torch.uint8, device=device) for _ in range(2))
    to_offsets, from_offsets = (torch.randperm(2 * num_pieces)[:num_pieces] * piece_bytes for _ in range(2))
    copy_pieces(to, source, to_offsets.to(device), from_offsets.to(device), piece_bytes)
    copy_pieces(back, to, from_offsets.to(device), to_offsets.to(device), piece_bytes)
    expected = torch.full((total,), 255, dtype=torch.uint8)
    for start in from_offsets.tolist():
        expected[start : start + piece_bytes] = source[start : start + piece_bytes]
    require_equal(back.cpu(), expected, "there and back")
