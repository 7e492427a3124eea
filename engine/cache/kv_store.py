"""The KV memory of the tiers: one slab each, no bookkeeping."""

import sys
from threading import Thread, main_thread

import torch
from torch import Tensor

from kernels.native.memory import HUGE_PAGE_BYTES, populate, zeros


class KVStore:
    """`slab` is [L, B, 2, G, P, D] (layers, blocks, K and V, KV heads, slots of a block, head size).  Pages
    that were never written cost no memory, and nothing reads a slot before a step has written it.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.slab = _slab((num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim), dtype)
        self.layers: tuple[Tensor, ...] = tuple(self.slab.unbind(0))  # each [B, 2, G, P, D]

    def populate(self, num_bytes: int) -> Thread:
        """Begins to take the memory of the first blocks, so many bytes, lowest first, as they will be used: a
        step that is the first to write a block waits for new pages in every layer.  The thread that does it
        ends with the main thread.
        """
        # A daemon would abort the process: at its end the interpreter unwinds those that wait for it inside
        # torch, which does not expect that.
        thread = Thread(target=self._populate, args=(num_bytes,), name="populate")
        thread.start()
        return thread

    def _populate(self, num_bytes: int) -> None:
        if sys.platform != "linux":
            return
        num_blocks, block_bytes = self.slab.shape[1], self.slab[0, 0].nbytes
        step = max(1, HUGE_PAGE_BYTES // block_bytes)
        end = min(num_blocks, num_bytes // (len(self.layers) * block_bytes))
        for first in range(0, end, step):
            for layer in self.layers:
                if not main_thread().is_alive():
                    return
                populate(layer[first : min(first + step, end)])


class HostStore:
    """`slab` is [B, L, 2, G, P, D]: a block is one run of memory."""

    def __init__(self, device: KVStore, num_blocks: int) -> None:
        """Blocks like those of `device`."""
        num_layers, _, *rest = device.slab.shape
        self.slab = _slab((num_blocks, num_layers, *rest), device.slab.dtype)


def _slab(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return zeros(shape, dtype) if sys.platform == "linux" else torch.empty(shape, dtype=dtype)
