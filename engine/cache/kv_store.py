"""The KV memory of the device tier: one slab, no bookkeeping."""

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
        shape = (num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim)
        self.slab: Tensor = (
            zeros(shape, dtype) if sys.platform == "linux" else torch.empty(shape, dtype=dtype)
        )
        self.layers: tuple[Tensor, ...] = tuple(self.slab.unbind(0))  # each [B, 2, G, P, D]
