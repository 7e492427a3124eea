"""The KV memory of the tiers: one slab each, no bookkeeping."""

import sys
from collections.abc import Callable
from threading import Thread, main_thread

import torch
from torch import Tensor

from engine.errors import ConfigError
from kernels.native.memory import HUGE_PAGE_BYTES, populate, zeros

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Memory of that shape and dtype, of any contents."""


def host_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Pages that were never written cost nothing."""
    return zeros(shape, dtype) if sys.platform == "linux" else torch.empty(shape, dtype=dtype)


class KVStore:
    """`slab` is [L, B, 2, G, P, D] (layers, blocks, K and V, KV heads, slots of a block, head size).  Nothing
    reads a slot before a step has written it.  Raises what `allocate` raises.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        allocate: Allocate = host_memory,
    ) -> None:
        self.slab = allocate((num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim), dtype)
        self.layers: tuple[Tensor, ...] = tuple(self.slab.unbind(0))  # each [B, 2, G, P, D]

    def populate(self, num_bytes: int) -> Thread:
        """In host memory.  Begins to take that of the first blocks, so many bytes, lowest first, as they will
        be used: a step that is the first to write a block waits for new pages in every layer.  The thread
        that does it ends with the main thread.
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

    def __init__(self, device: KVStore, num_blocks: int, allocate: Allocate = host_memory) -> None:
        """Blocks like those of `device`.  Raises ConfigError where there is no such memory."""
        num_layers, _, *rest = device.slab.shape
        shape, dtype = (num_blocks, num_layers, *rest), device.slab.dtype
        try:
            self.slab = allocate(shape, dtype)
        except RuntimeError as error:  # the driver could not pin it
            gib = device.slab[:, 0].nbytes * num_blocks / 2**30
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"the {gib:.1f} GiB of the host KV cache cannot be had: {reason}; --host-kv-memory "
                f"{gib / 2:.1f}GiB may fit, and --host-kv-tokens 0 leaves it out"
            ) from error
