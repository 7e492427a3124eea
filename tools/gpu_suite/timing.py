"""How long work takes on the device: replays of a CUDA graph between events, so that launching is free."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

BEYOND_L2 = 256e6  # bytes that inputs are rotated through: several times the 60 MB of an H200
_GRAPH_US = 2000.0  # of work in one graph, about
_MOST_IN_A_GRAPH = 200
_LEAST_REPLAYS, _MOST_REPLAYS = 7, 40
_REPLAY_S = 0.25

Work = Callable[[], object]


@dataclass(frozen=True)
class Time:
    us: float  # the median
    spread: float  # of the middle four fifths of all replays, over the median
    is_graph: bool


def time_works(works: Sequence[Work]) -> Time:
    """One of `works`, which are alike but for their inputs, one after another on the device."""
    for work in works:
        work()  # compiles
    torch.cuda.synchronize()
    estimate = _between_events(lambda: [work() for work in works[:8]]) * 1e3 / min(8, len(works))
    count = max(len(works), min(_MOST_IN_A_GRAPH, math.ceil(_GRAPH_US / max(estimate, 1.0))))
    once = [works[i % len(works)] for i in range(count)]
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for work in once:
                work()
    except RuntimeError:  # it cannot be captured; its launches are part of its time then
        torch.cuda.synchronize()
        # A capture that fails at its very end leaves torch on the stream that was captured.
        torch.cuda.set_stream(torch.cuda.default_stream())
        return _repeated(lambda: [work() for work in once], count, is_graph=False)
    return _repeated(graph.replay, count, is_graph=True)


def _repeated(run: Work, count: int, *, is_graph: bool) -> Time:
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + _REPLAY_S
    while len(times) < _LEAST_REPLAYS or (time.monotonic() < end and len(times) < _MOST_REPLAYS):
        times.append(_between_events(run) * 1e3 / count)
    times.sort()
    median = times[len(times) // 2]
    inner = times[len(times) // 10], times[-1 - len(times) // 10]
    return Time(median, (inner[1] - inner[0]) / median, is_graph)


def _between_events(run: Work) -> float:
    """Milliseconds."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def ceilings(device: torch.device) -> dict[str, float]:
    """What this GPU reaches at best: a large copy, and a large product of random values."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device).random_()
    to = torch.empty_like(source)
    copied = time_works([lambda: to.copy_(source)])
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = time_works([lambda: a @ b])
    return {
        "copy_tbps": round(2 * source.nbytes / copied.us / 1e6, 3),
        "matmul_tflops": round(2 * 8192**3 / product.us / 1e6, 1),
    }
