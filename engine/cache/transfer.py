"""Copies blocks between the tiers, as a step's plan says, before the step computes."""

import time
import zlib
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.cache.block import BlockMove
from engine.cache.kv_store import HostStore, KVStore


class Loading(Protocol):
    """Copies to the device that have begun.  The moves that failed are known at the end: what they wrote, and
    what was computed from it, is not to be used.
    """

    seconds: float  # that the computing thread spent on it so far

    def wait_for(self, layer: int) -> None:
        """Returns once that layer's part of every block is on the device.  Layers are asked for in order."""
        ...

    def finish(self) -> frozenset[BlockMove]:
        """Returns once all of it is there, and says what failed."""
        ...


class TransferEngine(Protocol):
    """Called in the order of planning, by the thread that computes: for every step that copies, and for those
    that are launched while the copies of others have not been collected.
    """

    def store(self, moves: Sequence[BlockMove], overwritten: Collection[int] = ()) -> frozenset[BlockMove]:
        """Device to host.  Returns the moves that failed.  `overwritten`: device slots that the same step's
        loads and kernels write; what is stored from there leaves before.
        """
        ...

    def load(self, moves: Sequence[BlockMove]) -> Loading:
        """Host to device, layer by layer (Pensieve, section 4.3.3).  Called after the stores, for whose
        end `Loading.finish` waits as well.
        """
        ...


class SyncTransfer:
    """Both tiers are plain memory: a copy has ended when the call returns, and a layer is loaded when it is
    waited for.

    With `verify`, a checksum of every block is kept when it is stored; a load of anything else fails, before
    anything is computed from it.
    """

    def __init__(self, device: KVStore, host: HostStore, *, verify: bool = False) -> None:
        self._device, self._host = device, host
        self._checksums: dict[int, int] | None = {} if verify else None  # by host slot
        self._loading: _LoadingByLayer | None = None  # the last

    def store(self, moves: Sequence[BlockMove], overwritten: Collection[int] = ()) -> frozenset[BlockMove]:
        if self._loading is not None:  # of a step that may not be collected yet, and needed nothing of it
            self._loading.finish()
        for move in moves:
            block = self._host.slab[move.host_slot]
            block.copy_(self._device.slab[:, move.device_slot])
            if self._checksums is not None:
                self._checksums[move.host_slot] = checksum(block)
        return frozenset()

    def load(self, moves: Sequence[BlockMove]) -> Loading:
        sums = self._checksums
        failed = {
            move
            for move in moves
            if sums is not None and sums[move.host_slot] != checksum(self._host.slab[move.host_slot])
        }
        self._loading = _LoadingByLayer(self._device, self._host, moves, frozenset(failed))
        return self._loading


class _LoadingByLayer:
    def __init__(
        self, device: KVStore, host: HostStore, moves: Sequence[BlockMove], failed: frozenset[BlockMove]
    ) -> None:
        self._device, self._host = device, host
        self._moves = [move for move in moves if move not in failed]
        self._failed = failed
        self._num_loaded = 0  # layers
        self.seconds = 0.0

    def wait_for(self, layer: int) -> None:
        begun = time.perf_counter()
        to, source = self._device.layers[layer], self._host.slab[:, layer]
        for move in self._moves:
            to[move.device_slot].copy_(source[move.host_slot])
        self._num_loaded = layer + 1
        self.seconds += time.perf_counter() - begun

    def finish(self) -> frozenset[BlockMove]:
        begun = time.perf_counter()
        rest = slice(self._num_loaded, None)
        if self._num_loaded < len(self._device.layers):
            for move in self._moves:
                self._device.slab[rest, move.device_slot].copy_(self._host.slab[move.host_slot, rest])
            self._num_loaded = len(self._device.layers)
            self.seconds += time.perf_counter() - begun
        return self._failed


def checksum(block: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes."""
    return zlib.crc32(block.view(-1).view(dtype=torch.uint8).numpy().data)
