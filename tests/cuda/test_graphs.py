"""How graphs are captured, over stand-ins for CUDA's."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from engine.cuda.graphs import CudaGraphs
from tests.cuda.virtual_device import VirtualDevice


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CudaGraphs:
    @contextmanager
    def capturing(graph: object, *_: object, capture_error_mode: str) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    return CudaGraphs(VirtualDevice())


def test_no_garbage_is_collected_while_work_is_captured(graphs: CudaGraphs) -> None:
    """It may hold an engine whose graphs and pinned memory cannot be given back then."""

    def work() -> Tensor:
        assert not gc.isenabled()
        return torch.zeros(1)

    graphs.capture(1, work)
    assert gc.isenabled()


def test_what_fails_while_it_is_captured_leaves_garbage_collected_as_before(graphs: CudaGraphs) -> None:
    def work() -> Tensor:
        raise ValueError("too few")

    with pytest.raises(ValueError, match="too few"):
        graphs.capture(1, work)
    assert gc.isenabled()
    gc.disable()
    try:
        graphs.capture(1, lambda: torch.zeros(1))
        assert not gc.isenabled()
    finally:
        gc.enable()
