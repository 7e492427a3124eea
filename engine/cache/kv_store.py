"""The KV memory of the tiers: one slab each, no bookkeeping."""

import sys

import torch
from torch import Tensor

from kernels.native.memory import zeros


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


class HostStore:
    """`slab` is [B, L, 2, G, P, D]: a block is one run of memory."""

    def __init__(self, device: KVStore, num_blocks: int) -> None:
        """Blocks like those of `device`."""
        num_layers, _, *rest = device.slab.shape
        self.slab = _slab((num_blocks, num_layers, *rest), device.slab.dtype)


def _slab(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return zeros(shape, dtype) if sys.platform == "linux" else torch.empty(shape, dtype=dtype)
