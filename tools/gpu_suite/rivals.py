"""Attention of others on the same work: torch's scaled_dot_product_attention and varlen_attn over dense keys,
FlashInfer over our own paged cache where it is installed.
"""

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from tools.gpu_suite.inputs import PagedStep
from tools.gpu_suite.targets import Attention

Works = list[Callable[[], object]]
_WORKSPACE = 256 << 20  # bytes, as FlashInfer asks for


def rivals(target: Attention, steps: list[PagedStep]) -> Iterator[tuple[str, Callable[[], Works]]]:
    """Name, and what makes as many works as there are steps.  Making or running them may raise anything."""
    is_uniform = len(set(target.new)) == len(set(target.cached)) == 1
    is_causal = max(target.new) > 1
    if is_uniform and not (is_causal and max(target.cached)):
        yield "sdpa", lambda: _sdpa(target, len(steps), steps[0].q.device, is_causal=is_causal)
    yield "varlen", lambda: _varlen(target, len(steps), steps[0].q.device)
    yield "flashinfer", lambda: _flashinfer(target, steps)


def _sdpa(target: Attention, count: int, device: torch.device, *, is_causal: bool) -> Works:
    """Dense keys and values, one after another: what a cache without pages would be read like."""
    heads, kv_heads, size = target.heads
    batch, new, length = len(target.new), target.new[0], target.new[0] + target.cached[0]

    def one() -> Callable[[], object]:
        q = torch.randn(batch, heads, new, size, dtype=torch.bfloat16, device=device)
        k, v = torch.randn(2, batch, kv_heads, length, size, dtype=torch.bfloat16, device=device)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    return [one() for _ in range(count)]


def _varlen(target: Attention, count: int, device: torch.device) -> Works:
    from torch.nn.attention.varlen import varlen_attn

    heads, kv_heads, size = target.heads
    ends = [new + cached for new, cached in zip(target.new, target.cached, strict=True)]
    bounds = [
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (target.new, ends)
    ]
    known = inspect.signature(varlen_attn).parameters  # it has changed from version to version
    how: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        how["enable_gqa"] = True

    def one() -> Callable[[], object]:
        q = torch.randn(sum(target.new), heads, size, dtype=torch.bfloat16, device=device)
        k, v = torch.randn(2, sum(ends), kv_heads, size, dtype=torch.bfloat16, device=device)
        return lambda: varlen_attn(q, k, v, *bounds, max(target.new), max(ends), **how)

    return [one() for _ in range(count)]


def _flashinfer(target: Attention, steps: list[PagedStep]) -> Works:
    """Its plan is made beforehand, as ours is."""
    flashinfer = import_module("flashinfer")
    heads, kv_heads, size = target.heads
    slots, device, dtype = steps[0].kv.shape[3], steps[0].q.device, steps[0].q.dtype
    ends = [new + cached for new, cached in zip(target.new, target.cached, strict=True)]
    counts = [-(-end // slots) for end in ends]
    last = [end - (count - 1) * slots for end, count in zip(ends, counts, strict=True)]
    indptr, last_lengths, q_indptr = (
        torch.tensor(numbers, dtype=torch.int32, device=device)
        for numbers in ([0, *accumulate(counts)], last, [0, *accumulate(target.new)])
    )

    def one(step: PagedStep) -> Callable[[], object]:
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
        pages = step.blocks.int().to(device)
        types = {"q_data_type": dtype, "kv_data_type": dtype}
        if max(target.new) == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
            wrapper.plan(indptr, pages, last_lengths, heads, kv_heads, size, slots, **types)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            shape = heads, kv_heads, size, slots
            wrapper.plan(q_indptr, indptr, pages, last_lengths, *shape, causal=True, **types)
        return lambda: wrapper.run(step.q, step.kv)

    return [one(step) for step in steps[:8]]
