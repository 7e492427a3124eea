"""The KV memory of the device tier: one slab, no bookkeeping."""

import torch
from torch import Tensor


class KVStore:
    """`slab` is [L, B, 2, G, P, D] (layers, blocks, K and V, KV heads, slots of a block, head size), not
    initialised: pages that were never written cost no memory, and nothing reads a slot before a step has
    written it.
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
        self.slab: Tensor = torch.empty(
            (num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim), dtype=dtype
        )
        self.layers: tuple[Tensor, ...] = tuple(self.slab.unbind(0))  # each [B, 2, G, P, D]
