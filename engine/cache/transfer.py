"""Copies blocks between the tiers, as a step's plan says, before the step computes."""

import zlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.cache.block import BlockMove
from engine.cache.kv_store import HostStore, KVStore


class TransferEngine(Protocol):
    """Called in the order of planning, by the thread that computes.  Both return the moves that failed: what
    these wrote is not to be used.
    """

    def store(self, moves: Sequence[BlockMove]) -> frozenset[BlockMove]:
        """Device to host."""
        ...

    def load(self, moves: Sequence[BlockMove]) -> frozenset[BlockMove]:
        """Host to device."""
        ...


class SyncTransfer:
    """Both tiers are plain memory: a copy has ended when the call returns.

    With `verify`, a checksum of every block is kept when it is stored; a load of anything else fails.
    """

    def __init__(self, device: KVStore, host: HostStore, *, verify: bool = False) -> None:
        self._device, self._host = device, host
        self._checksums: dict[int, int] | None = {} if verify else None  # by host slot

    def store(self, moves: Sequence[BlockMove]) -> frozenset[BlockMove]:
        for move in moves:
            block = self._host.slab[move.host_slot]
            block.copy_(self._device.slab[:, move.device_slot])
            if self._checksums is not None:
                self._checksums[move.host_slot] = checksum(block)
        return frozenset()

    def load(self, moves: Sequence[BlockMove]) -> frozenset[BlockMove]:
        failed = set()
        for move in moves:
            block = self._host.slab[move.host_slot]
            if self._checksums is not None and self._checksums[move.host_slot] != checksum(block):
                failed.add(move)
            else:
                self._device.slab[:, move.device_slot].copy_(block)
        return frozenset(failed)


def checksum(block: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes."""
    return zlib.crc32(block.view(-1).view(dtype=torch.uint8).numpy().data)
