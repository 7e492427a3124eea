"""A GPU as the engine uses it: four streams, events, and memory on both sides.

`Device` is the whole of what the engine asks of one, so that its order of work can be tested without:
a stream runs in order, and nothing orders two streams but the events that one of them waits for.
"""

import ctypes
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from math import prod
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from engine.memory import Room
from kernels.gpu.launch import require_gpu
from kernels.native.memory import zeros

Stream: TypeAlias = Any  # torch.cuda.Stream, or a twin's; `cuda_stream` is what drivers know it by
Event: TypeAlias = Any  # torch.cuda.Event, or a twin's

_PORTABLE_AND_MAPPED = 3  # flags of cudaHostRegister
_LEAST_REGISTERED_BYTES = 1 << 20
"""Torch rounds what it pins itself up to a power of two, which must not happen to a host tier."""


class Device(Protocol):
    """Memory that it gives is for the engine's whole life: it is not told which streams still use it."""

    torch_device: torch.device  # where tensors live

    @property
    def compute(self) -> Stream:
        """Kernels."""
        ...

    @property
    def loads(self) -> Stream:
        """Host to device."""
        ...

    @property
    def stores(self) -> Stream:
        """Device to host."""
        ...

    @property
    def results(self) -> Stream:
        """Sampled ids, to the host."""
        ...

    def event(self) -> Event:
        """A timed event from a pool: to wait for it means nothing before it is recorded."""
        ...

    def recycle(self, event: Event) -> None:
        """Back into the pool.  Streams that already wait for it still do."""
        ...

    def record(self, event: Event, stream: Stream) -> None:
        """The event now stands for all that was given to the stream so far."""
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What the stream is given from now on begins after the event, as recorded so far.  The host goes
        on.
        """
        ...

    def synchronize(self, event: Event) -> None:
        """The host waits, and lets other threads run."""
        ...

    def is_done(self, event: Event) -> bool: ...

    def seconds_between(self, first: Event, second: Event) -> float:
        """On the device's clock, between two events that were recorded and are done."""
        ...

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Torch's work of the body, and kernels launched there, go to this stream."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On the device, of any contents."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On the host, of any contents, where the device reads and writes by itself."""
        ...

    def copy(self, to: Tensor, source: Tensor, stream: Stream) -> None:
        """One contiguous piece between the device and itself or pinned memory; does not wait for it."""
        ...

    def room(self) -> Room:
        """Device memory that is free."""
        ...


class TorchDevice:
    """A CUDA device.  ValueError if the kernels are not made for it."""

    def __init__(self, torch_device: torch.device) -> None:
        require_gpu(torch_device)
        self.torch_device = torch_device
        # None of them is the default stream, on which a batch of copies is refused or carried out one by one.
        self.compute, self.loads, self.stores, self.results = (
            torch.cuda.Stream(torch_device)  # type: ignore[no-untyped-call]
            for _ in range(4)
        )
        self._events: list[torch.cuda.Event] = []

    def event(self) -> Event:
        if self._events:
            return self._events.pop()
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def recycle(self, event: Event) -> None:
        self._events.append(event)

    def record(self, event: Event, stream: Stream) -> None:
        event.record(stream)

    def wait(self, stream: Stream, event: Event) -> None:
        stream.wait_event(event)

    def synchronize(self, event: Event) -> None:
        event.synchronize()

    def is_done(self, event: Event) -> bool:
        return bool(event.query())

    def seconds_between(self, first: Event, second: Event) -> float:
        return float(first.elapsed_time(second)) / 1e3

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if sys.platform == "linux" and prod(shape) * dtype.itemsize >= _LEAST_REGISTERED_BYTES:
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            with torch.cuda.device(self.torch_device):
                if (memory := registered(shape, dtype, runtime, self._forget_refusal)) is not None:
                    return memory
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def _forget_refusal(self) -> None:
        """The runtime keeps its last error until somebody asks, as torch does behind a kernel of its own."""
        with suppress(RuntimeError):
            torch.ones(1, device=self.torch_device)

    def copy(self, to: Tensor, source: Tensor, stream: Stream) -> None:
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)

    def room(self) -> Room:
        torch.cuda.empty_cache()  # of what torch keeps to give it out again
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return Room(free, f"the memory of {torch.cuda.get_device_name(self.torch_device)}")


def registered(
    shape: tuple[int, ...], dtype: torch.dtype, runtime: Any, on_refusal: Callable[[], None]
) -> Tensor | None:
    """Memory that the CUDA runtime has pinned, until the tensor and all its views are gone; None if it
    refuses, of which `on_refusal` is told.  Linux only.
    """
    memory = zeros(shape, dtype)
    address = memory.data_ptr()
    if int(runtime.cudaHostRegister(address, memory.nbytes, _PORTABLE_AND_MAPPED)) != 0:
        on_refusal()
        return None
    # Whoever holds the result holds this; pages must not be unmapped before the driver has let go of them.
    owner = (ctypes.c_char * memory.nbytes).from_address(address)
    owner.memory = memory  # type: ignore[attr-defined]
    # At the end of the process the system takes everything, and the runtime may be gone.
    weakref.finalize(owner, runtime.cudaHostUnregister, address).atexit = False
    return torch.frombuffer(owner, dtype=dtype).view(shape)
