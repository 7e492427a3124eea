"""Which bytes move when blocks go from one tier to the other, and three ways to have a GPU move them.

A block is one piece per layer on the device, where a layer's blocks lie side by side.  In pinned memory the
blocks of a chunk do so too, layer by layer, so that neighbours on both sides are one copy: below some 28 KiB
a copy engine spends its time between pieces rather than in them.
"""

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.cache.block import BlockMove
from engine.cache.kv_store import HostStore, KVStore
from engine.cuda.device import Device, Event, Stream

CHUNK = 8
"""Blocks of the host tier that lie together."""

Offsets = NDArray[np.int64]


class Pieces(NamedTuple):
    """Copies of equal size, which do not overlap: bytes from the beginning of the slab that is written, and
    of the one that is read.
    """

    to: Offsets
    source: Offsets
    num_bytes: int  # of each


class Runs(NamedTuple):
    """Copies of any sizes, in the order of `to`."""

    to: Offsets
    source: Offsets
    num_bytes: Offsets


class PinnedStore:
    """The host tier of a GPU: `slab` is [B / CHUNK, L, CHUNK, 2, G, P, D], with as many whole chunks as it
    takes for B blocks like those of `kv`.  Raises ConfigError where there is no such memory.
    """

    def __init__(self, device: Device, kv: KVStore, num_blocks: int) -> None:
        num_layers, _, *rest = kv.slab.shape
        num_chunks = -(-num_blocks // CHUNK)
        memory = HostStore(kv, num_chunks * CHUNK, device.pinned).slab
        self.slab = memory.view(num_chunks, num_layers, CHUNK, *rest)

    def block(self, slot: int) -> Tensor:
        """[L, 2, G, P, D], a view."""
        return self.slab[slot // CHUNK, :, slot % CHUNK]


class Tiers:
    """Where blocks are in the slabs of both."""

    def __init__(self, kv: KVStore, host: PinnedStore) -> None:
        self.device, self.host = flat(kv.slab), flat(host.slab)
        self.num_layers, self._num_blocks = kv.slab.shape[:2]
        self.piece_bytes = kv.slab[0, 0].nbytes

    def stores(self, moves: Sequence[BlockMove], layers: range) -> Pieces:
        """Device to host."""
        near, far = self._offsets(moves, layers)
        return Pieces(far, near, self.piece_bytes)

    def loads(self, moves: Sequence[BlockMove], layers: range) -> Pieces:
        """Host to device."""
        near, far = self._offsets(moves, layers)
        return Pieces(near, far, self.piece_bytes)

    def _offsets(self, moves: Sequence[BlockMove], layers: range) -> tuple[Offsets, Offsets]:
        slots = np.array(moves, np.int64).reshape(-1, 2)
        layer = np.arange(layers.start, layers.stop, dtype=np.int64)[:, None]
        near = layer * self._num_blocks + slots[:, 0]
        chunk, place = np.divmod(slots[:, 1], CHUNK)
        far = (chunk * self.num_layers + layer) * CHUNK + place
        return near.reshape(-1) * self.piece_bytes, far.reshape(-1) * self.piece_bytes


def coalesced(pieces: Pieces) -> Runs:
    """What is contiguous on both sides becomes one."""
    order = np.argsort(pieces.to)
    to, source, size = pieces.to[order], pieces.source[order], pieces.num_bytes
    is_first = np.ones(len(to), bool)
    is_first[1:] = (np.diff(to) != size) | (np.diff(source) != size)
    first = np.flatnonzero(is_first)
    return Runs(to[first], source[first], np.diff(first, append=len(to)) * size)


class Copier(Protocol):
    """Copies between two slabs, one way."""

    def copy(self, pieces: Pieces, stream: Stream) -> None:
        """The stream does it; the host does not wait."""
        ...


NewCopier = Callable[[Device, Tensor, Tensor], Copier]
"""Makes one for what is written, and what is read: slabs as flat bytes."""


class RunCopier:
    """Run by run, each by a call of torch's."""

    def __init__(self, device: Device, to: Tensor, source: Tensor) -> None:
        self._device, self._to, self._source = device, to, source

    def copy(self, pieces: Pieces, stream: Stream) -> None:
        for to, source, size in np.stack(coalesced(pieces), axis=1).tolist():
            self._device.copy(self._to[to : to + size], self._source[source : source + size], stream)


class BatchCopier:
    """All runs in one call of the driver, cuMemcpyBatchAsync."""

    def __init__(
        self, device: Device, to: Tensor, source: Tensor, function: Callable[..., int] | None = None
    ) -> None:
        """RuntimeError where the driver has no such `function`: before CUDA 12.8."""
        self._to, self._source = to.data_ptr(), source.data_ptr()
        self._function = function or batch_function()
        self._attributes = _Attributes(source_order=_IN_STREAM_ORDER)
        self._first = ctypes.c_size_t(0)  # the copy from which on the attributes are valid

    def copy(self, pieces: Pieces, stream: Stream) -> None:
        """On a thread that has used the device before.  The arrays are read before the call returns."""
        runs = coalesced(pieces)
        if not len(runs.to):
            return
        to, source = runs.to + self._to, runs.source + self._source
        failed_at = ctypes.c_size_t(0)
        error = self._function(
            to.ctypes.data,
            source.ctypes.data,
            runs.num_bytes.ctypes.data,
            len(to),
            ctypes.addressof(self._attributes),
            ctypes.addressof(self._first),
            1,
            ctypes.addressof(failed_at),
            stream.cuda_stream,
        )
        if error:
            raise RuntimeError(f"cuMemcpyBatchAsync failed with error {error} at copy {failed_at.value}")


class GatherCopier:
    """Piece by piece, by a kernel that takes a few multiprocessors for it."""

    def __init__(self, device: Device, to: Tensor, source: Tensor) -> None:
        self._device, self._to, self._source = device, to, source
        # Offsets that a kernel may still read, oldest first.
        self._busy: deque[tuple[Tensor, Event]] = deque()

    def copy(self, pieces: Pieces, stream: Stream) -> None:
        from kernels.gpu.gather import copy_pieces

        num = len(pieces.to)
        if not num:
            return
        offsets, event = self._room_for(num)
        offsets[0, :num], offsets[1, :num] = torch.from_numpy(pieces.to), torch.from_numpy(pieces.source)
        with self._device.on(stream):
            copy_pieces(self._to, self._source, offsets[0, :num], offsets[1, :num], pieces.num_bytes)
        self._device.record(event, stream)
        self._busy.append((offsets, event))

    def _room_for(self, num: int) -> tuple[Tensor, Event]:
        """[2, at least num] in pinned memory, and the event that tells when it is free again."""
        if self._busy and self._device.is_done(self._busy[0][1]):
            offsets, event = self._busy.popleft()
            if offsets.shape[1] >= num:
                return offsets, event
            self._device.recycle(event)
        capacity = max(1024, 1 << (num - 1).bit_length())
        return self._device.pinned((2, capacity), torch.int64), self._device.event()


COPIERS: dict[str, NewCopier] = {"batch": BatchCopier, "gather": GatherCopier, "runs": RunCopier}
"""By the name that people see."""


def flat(slab: Tensor) -> Tensor:
    """Its bytes, [N]."""
    return slab.view(-1).view(torch.uint8)


_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_BATCH_SINCE = 12080  # the CUDA version whose form of the call is meant: later ones do without `failed_at`


class _Location(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", _Location),  # hints are for managed memory
        ("to_hint", _Location),
        ("flags", ctypes.c_uint),
    )


@functools.cache
def batch_function() -> Callable[..., int]:
    """The driver's cuMemcpyBatchAsync, which other threads run beside.  RuntimeError if it has none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        find: Any = driver.cuGetProcAddress_v2
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"no CUDA driver that copies in batches: {error}") from None
    pointer, found = ctypes.c_void_p(), ctypes.c_int()
    failure = find(
        b"cuMemcpyBatchAsync",
        ctypes.byref(pointer),
        ctypes.c_int(_BATCH_SINCE),
        ctypes.c_uint64(0),
        ctypes.byref(found),
    )
    if failure or not pointer.value:
        raise RuntimeError("the CUDA driver has no cuMemcpyBatchAsync; it takes one of CUDA 12.8 or later")
    address, size = ctypes.c_void_p, ctypes.c_size_t
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, address, address, address, size, address, address, size, address, address
    )
    return prototype(pointer.value)
