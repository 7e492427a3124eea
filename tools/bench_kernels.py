"""Each kernel against its own torch reference, and against what this machine's memory gives.

    python -m tools.bench_kernels [--threads 2] [--seconds 0.5] [--json FILE]

Kernel and reference alternate; a figure is the best of its runs (other work on the machine only adds time),
the median is in the JSON.  With one thread it is CPU time, which other work disturbs least.  Caches and
weights are read from copies too many for the L2 cache, as decoding reads them.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.linear import PackedLinear, rows_are_independent
from kernels.merge_state import merge_state
from kernels.native import memory
from kernels.paged_attention import AttnMeta, paged_attention, paged_attention_ref
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_ref
from kernels.rope import rope_kv_write, rope_kv_write_ref
from kernels.silu_mul import silu_mul, silu_mul_ref
from tools.measure import DramRead, commit, machine, median

COLD_BYTES = 200_000_000
IN_A_ROW = 4  # runs: in the first, the caches still write back what the other side left there
SLOTS = 32
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """Work that both sides do: `run` and `reference` take the number of the copy to work on."""

    name: str
    run: Callable[[int], object]
    reference: Callable[[int], object] | None
    copies: int
    amount: float  # bytes read, or floating-point operations
    unit: str  # what amount / nanoseconds is


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each side of each case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"{dispatch.describe()}, {chosen.threads} threads")
    gbps = DramRead().measure(2.0)
    print(f"DRAM read {gbps:.1f} GB/s\n\n{'':47}{'kernel':>13}{'reference':>14}{'ratio':>8}{'rate':>10}")
    rows = [_measure(case, chosen.seconds) for case in _cases()]
    if chosen.json:
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "machine": machine(),
            "kernels": dispatch.describe(),
            "threads": chosen.threads,
            "dram_read_gbps": round(gbps, 1),
            "linear_rows_independent": {name: rows_are_independent(dtype) for name, dtype in DTYPES.items()},
            "cases": rows,
        }
        chosen.json.write_text(json.dumps(report, indent=2) + "\n")


def _measure(case: Case, seconds: float) -> dict[str, Any]:
    """Times both sides alternately, prints the row of the table and returns it."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    sides = {"kernel": case.run} | ({"reference": case.reference} if case.reference else {})
    times: dict[str, list[float]] = {side: [] for side in sides}
    for work in sides.values():
        work(0)
    end = time.perf_counter() + seconds * len(sides)
    for turn in itertools.count():
        for side, work in sides.items():
            for i in range(IN_A_ROW * turn, IN_A_ROW * (turn + 1)):
                begun = clock()
                work(i % case.copies)
                times[side].append(clock() - begun)
        if turn >= 3 and time.perf_counter() > end:
            break
    best = {side: 1e6 * min(runs) for side, runs in times.items()}
    rate = case.amount / best["kernel"] / 1e3
    versus = f"{'':22}"
    if "reference" in best:
        versus = f"{best['reference']:11.1f} us{best['reference'] / best['kernel']:7.1f}x"
    print(f"{case.name:47}{best['kernel']:10.1f} us{versus}{rate:9.1f} {case.unit}", flush=True)
    return {
        "case": case.name,
        **{f"{side}_us": round(value, 2) for side, value in best.items()},
        **{f"{side}_median_us": round(1e6 * median(runs), 2) for side, runs in times.items()},
        case.unit: round(rate, 2),
    }


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for heads, kv_heads, size in ((12, 12, 64), (14, 2, 64), (32, 8, 128)):
            for segments, context in ((1, 512), (8, 2048)):
                yield _attention(dtype, heads, kv_heads, size, segments, context, new=1)
        for new, context in ((512, 512), (128, 2048)):
            yield _attention(dtype, 12, 12, 64, 1, context, new)
            yield _dense_attention(dtype, 12, 64, new)
        for rows, (out_features, in_features) in itertools.product(
            (1, 8, 32, 512), ((4096, 768), (768, 2048))
        ):
            yield _linear(dtype, rows, out_features, in_features)
        for rows in (1, 8, 256):
            yield from _rowwise(dtype, rows)


def _attention(
    dtype: str, heads: int, kv_heads: int, size: int, segments: int, context: int, new: int
) -> Case:
    """`new` rows in each segment, the last of them at position `context` - 1."""
    width = -(-context // SLOTS)
    tables = torch.randperm(segments * width, dtype=torch.int32).view(segments, width)
    first = torch.full((segments,), context - new, dtype=torch.int32)
    positions = (first[:, None] + torch.arange(new)).flatten().long()
    indptr = torch.arange(0, segments * new + 1, new, dtype=torch.int32)
    meta = AttnMeta(indptr, first, tables, positions, torch.full_like(positions, -1))
    kv = torch.randn(segments * width, 2, kv_heads, SLOTS, size).to(DTYPES[dtype])
    copies = 1 if new > 1 else max(1, COLD_BYTES // kv.nbytes)
    kvs = [memory.zeros(tuple(kv.shape), kv.dtype).copy_(kv) for _ in range(copies)]  # as an engine's cache
    q = torch.randn(segments * new, heads, size).to(DTYPES[dtype])
    kind = f"prefill {new} at {context}" if new > 1 else f"decode {segments} x {context}"
    pairs = segments * new * (context - (new - 1) / 2)  # of a row and a position it sees
    return Case(
        f"attention {kind}, {heads}/{kv_heads} x {size} {dtype}",
        lambda i: paged_attention(q, kvs[i], meta, size**-0.5),
        lambda i: paged_attention_ref(q, kvs[i], meta, size**-0.5),
        copies,
        4 * size * heads * pairs if new > 1 else kv.nbytes,
        "GFLOP/s" if new > 1 else "GB/s",
    )


def _dense_attention(dtype: str, heads: int, size: int, new: int) -> Case:
    """What torch's own attention does with contiguous keys and nothing cached: a yardstick."""
    q, k, v = torch.randn(3, 1, heads, new, size).to(DTYPES[dtype])
    return Case(
        f"(torch sdpa causal {new}, {heads} x {size} {dtype})",
        lambda _: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        None,
        1,
        4 * size * heads * new * (new + 1) / 2,
        "GFLOP/s",
    )


def _linear(dtype: str, rows: int, out_features: int, in_features: int) -> Case:
    weight = torch.randn(out_features, in_features).to(DTYPES[dtype])
    copies = COLD_BYTES // weight.nbytes
    plain = [weight.clone() for _ in range(copies)]
    packed = [PackedLinear(weight) for _ in range(copies)]
    x = torch.randn(rows, in_features).to(DTYPES[dtype])
    many = rows >= 512
    return Case(
        f"linear {rows} x {in_features} -> {out_features} {dtype}",
        lambda i: packed[i](x),
        lambda i: F.linear(x, plain[i]),
        copies,
        2 * rows * weight.numel() if many else weight.nbytes,
        "GFLOP/s" if many else "GB/s",
    )


def _rowwise(dtype: str, rows: int) -> Iterator[Case]:
    heads, size, width = 12, 64, 2048
    x, weight = torch.randn(rows, heads * size).to(DTYPES[dtype]), torch.ones(heads * size).to(DTYPES[dtype])
    gate_up = torch.randn(rows, 2 * width).to(DTYPES[dtype])
    q, k, v = torch.randn(rows, 3, heads, size).to(DTYPES[dtype]).unbind(1)
    cos_sin, blocks = torch.randn(rows, size), -(-rows // SLOTS)
    kv = torch.zeros(blocks, 2, heads, SLOTS, size, dtype=DTYPES[dtype])
    at = torch.arange(rows)
    one = torch.zeros(1, dtype=torch.int32)
    meta = AttnMeta(torch.tensor([0, rows], dtype=torch.int32), one, one[None], at, at)
    lse = torch.randn(rows, heads)

    def add_rms_norm_ref(_: int) -> tuple[Tensor, Tensor]:
        return rms_norm_ref(total := x + x, weight, 1e-6), total

    works: list[tuple[str, Callable[[int], object], Callable[[int], object] | None, int]] = [
        ("rms_norm", lambda _: rms_norm(x, weight, 1e-6), lambda _: rms_norm_ref(x, weight, 1e-6), x.nbytes),
        ("add_rms_norm", lambda _: add_rms_norm(x, x, weight, 1e-6), add_rms_norm_ref, 2 * x.nbytes),
        ("silu_mul", lambda _: silu_mul(gate_up), lambda _: silu_mul_ref(gate_up), gate_up.nbytes),
        (
            "rope_kv_write",
            lambda _: rope_kv_write(q, k, v, cos_sin, kv, meta),
            lambda _: rope_kv_write_ref(q, k, v, cos_sin, kv, meta),
            3 * q.nbytes,
        ),
        ("merge_state", lambda _: merge_state(q, lse, k, lse), None, 2 * q.nbytes),
    ]
    for name, run, reference, read in works:
        yield Case(f"{name} {rows} rows {dtype}", run, reference, 1, read, "GB/s")


if __name__ == "__main__":
    main()
