"""The decoder of OPT: learned positions, LayerNorm, a plain ReLU between two linears, biases everywhere.

It keeps the contract of `Decoder`, but hardly a line of its layers is the other families': a file of its own
is shorter than the switches would be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.config import ModelConfig
from kernels.linear import PackedLinear
from kernels.marks import Mark, unmarked
from kernels.paged_attention import AttnMeta, paged_attention
from kernels.rope import rope_kv_write

POSITION_OFFSET = 2  # the first rows of the position embedding belong to no position


@dataclass(frozen=True, slots=True)
class OptNorm:
    weight: Tensor  # [N]
    bias: Tensor  # [N]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class OptLayer:
    """Weights of one layer, N = hidden size, F = ffn size."""

    attention_norm: OptNorm
    qkv: PackedLinear  # N -> 3 * H * D: queries, keys, values
    attention_out: PackedLinear  # H * D -> N
    mlp_norm: OptNorm
    up: PackedLinear  # N -> F
    down: PackedLinear  # F -> N


class OptDecoder:
    """embedding: [V, E] and positions: [max_positions + 2, N], in places and dtypes as `RotaryDecoder`'s.

    Where E differs from N, projections [E -> N] and [N -> E] stand behind the embedding and before the head.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        positions: Tensor,
        layers: Sequence[OptLayer],
        final_norm: OptNorm | None,
        projections: tuple[PackedLinear, PackedLinear] | None,
        head: PackedLinear,
    ) -> None:
        self.config = config
        self.dtype = head.dtype
        self._embedding, self._positions, self._layers = embedding, positions, tuple(layers)
        self._final_norm, self._projections, self._head = final_norm, projections, head

    @torch.inference_mode()
    def forward(
        self,
        ids: Tensor,
        meta: AttnMeta,
        kv: Sequence[Tensor],
        rows: Tensor,
        wait_for: Callable[[int], None] | None = None,
        mark: Mark = unmarked,
    ) -> Tensor:
        last, norm_first = self._layers[-1], self.config.norm_first
        x = self._embedding.index_select(0, ids).to(self.dtype)
        if self._projections is not None:
            x = self._projections[0](x)
        x = x + self._positions.index_select(0, meta.positions + POSITION_OFFSET).to(self.dtype)
        for i, (layer, layer_kv) in enumerate(zip(self._layers, kv, strict=True)):
            if wait_for is not None:
                wait_for(i)
                mark("copies")
            normed = layer.attention_norm(x) if norm_first else x
            mark("rest")
            attended = self._attend(layer, normed, layer_kv, meta, mark)
            if layer is last:  # the other rows have left their K and V; nothing else of them is needed
                x, attended = x.index_select(0, rows), attended.index_select(0, rows)
            attended = layer.attention_out(attended)
            mark("linears")
            x = x + attended
            if not norm_first:
                x = layer.attention_norm(x)
            normed = layer.mlp_norm(x) if norm_first else x
            mark("rest")
            inner = layer.up(normed)
            mark("linears")
            inner = inner.relu_()
            mark("rest")
            inner = layer.down(inner)
            mark("linears")
            x = x + inner
            if not norm_first:
                x = layer.mlp_norm(x)
        if self._final_norm is not None:
            x = self._final_norm(x)
        mark("rest")
        if self._projections is not None:
            x = self._projections[1](x)
        logits = self._head(x)
        mark("linears")
        logits = logits.float()
        mark("rest")
        return logits

    def _attend(self, layer: OptLayer, x: Tensor, kv: Tensor, meta: AttnMeta, mark: Mark) -> Tensor:
        """x: [T, N] -> [T, H * D]."""
        fused = layer.qkv(x)
        mark("linears")
        q, k, v = fused.view(len(x), 3, -1, self.config.head_dim).unbind(dim=1)
        q = rope_kv_write(q, k, v, None, kv, meta)
        mark("rest")
        out, _ = paged_attention(q, kv, meta, self.config.attention_scale)
        mark("attention")
        return out.view(len(x), -1)
