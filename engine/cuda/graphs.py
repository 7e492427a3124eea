"""Steps that were captured once and are launched whole: a step of a small model takes the device less time
than launching its hundreds of kernels takes the host.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.cuda.device import Device

Work = Callable[[], Tensor]


class Graphs(Protocol):
    """Work on tensors whose addresses stay the same, by the number of segments that it is for."""

    def capture(self, bucket: int, work: Work) -> None:
        """`work` only gives work to the device's compute stream.  It has run before: nothing is compiled
        while it is captured.
        """
        ...

    def replay(self, bucket: int) -> Tensor:
        """Does it again and gives what it returned, which the next replay of any bucket overwrites."""
        ...


class CudaGraphs:
    """All graphs take their memory from one pool: no two of them run at a time, and none relies on what
    another one left.  So the largest is best captured first.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def capture(self, bucket: int, work: Work) -> None:
        graph = torch.cuda.CUDAGraph()
        stream = self._device.compute
        # "thread_local": other threads may use the device meanwhile, as for memory that is pinned.
        capturing = torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local")
        with _no_garbage_collected(), capturing:
            given = work()
        self._graphs[bucket] = graph, given

    def replay(self, bucket: int) -> Tensor:
        graph, given = self._graphs[bucket]
        graph.replay()
        return given


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """An engine of before may be among it: to let go of its graphs and its pinned memory ends a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CalledGraphs:
    """Where there are no graphs: the work is done by calling it."""

    def __init__(self) -> None:
        self._works: dict[int, Work] = {}

    def capture(self, bucket: int, work: Work) -> None:
        self._works[bucket] = work

    def replay(self, bucket: int) -> Tensor:
        return self._works[bucket]()


def graphs_of(device: Device) -> Graphs:
    return CudaGraphs(device) if device.torch_device.type == "cuda" else CalledGraphs()


def buckets(most: int) -> tuple[int, ...]:
    """The numbers of segments that steps are filled up to, ascending; the last is `most`."""
    return *(size for size in (1, 2, 4, 8, *range(16, most, 8)) if size < most), most
