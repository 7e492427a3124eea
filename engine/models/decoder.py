"""Decoders: token ids of a ragged step in, logits of chosen rows out.

`RotaryDecoder` is one program for all families but OPT (opt.py); what differs is data (biases, more norms,
windows, soft caps, or none of them).  Nothing here knows of conversations, blocks or phases: the caller owns
the paged KV and says in `AttnMeta` where each row stands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.rope import RopeTable
from kernels.linear import PackedLinear
from kernels.marks import Mark, unmarked
from kernels.paged_attention import AttnMeta, paged_attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_kv_write
from kernels.silu_mul import gelu_mul, silu_mul


class Decoder(Protocol):
    config: ModelConfig
    dtype: torch.dtype  # of activations and KV

    def forward(
        self,
        ids: Tensor,
        meta: AttnMeta,
        kv: Sequence[Tensor],
        rows: Tensor,
        wait_for: Callable[[int], None] | None = None,
        mark: Mark = unmarked,
    ) -> Tensor:
        """One step.  ids: [T >= 1] int64; kv: [B, 2, G, P, D] in `dtype` per layer, written to at meta.slots.

        Returns logits [R, V] fp32 of `rows`: [R >= 0] int64, indices into the step.  All K and V of a layer
        are written before its attention, so segments of one conversation may attend to each other.  Before
        a layer touches its `kv` it calls `wait_for` with its number: KV may still be on its way.  `mark` is
        told behind every kernel what it was.
        """
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer, N = hidden size, F = ffn size.  Norms in the model's dtype or fp32."""

    attention_norm: Tensor  # [N]
    qkv: PackedLinear  # N -> (H + 2G) * D: queries, keys, values
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    attention_out: PackedLinear  # H * D -> N
    attention_post_norm: Tensor | None  # [N], of what attention gives
    mlp_norm: Tensor  # [N]
    gate_up: PackedLinear  # N -> 2F, the gate first
    down: PackedLinear  # F -> N
    mlp_post_norm: Tensor | None  # [N], of what the mlp gives


class RotaryDecoder:
    """embedding: [V, N] in any float dtype, mapped from its file: only looked-up rows are ever read."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: Sequence[Layer],
        final_norm: Tensor,
        head: PackedLinear,
    ) -> None:
        self.config = config
        self.dtype = head.dtype
        self._embedding, self._layers, self._head = embedding, tuple(layers), head
        # The norm behind each layer's residual addition belongs to the next one.
        self._next_norms = (*(layer.attention_norm for layer in self._layers[1:]), final_norm)
        ropes = list(dict.fromkeys(attention.rope for attention in config.layers))
        self._tables = [
            None if rope is None else RopeTable(config.head_dim, rope, config.max_positions) for rope in ropes
        ]
        self._attention = [(ropes.index(attention.rope), attention.window) for attention in config.layers]
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._gate = silu_mul if config.activation == "silu" else gelu_mul
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype)

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
        eps, last = self.config.norm_eps, self._layers[-1]
        num_positions = int(meta.positions.max()) + 1
        angles = [None if table is None else table.upto(num_positions) for table in self._tables]
        residual = self._embedding.index_select(0, ids).to(self.dtype)
        if self.config.embedding_scale != 1:
            residual = residual * self._embedding_scale
        x = rms_norm(residual, self._layers[0].attention_norm, eps)
        mark("rest")
        layers = zip(self._layers, self._attention, kv, self._next_norms, strict=True)
        for i, (layer, (rope, window), layer_kv, next_norm) in enumerate(layers):
            if wait_for is not None:
                wait_for(i)
                mark("copies")
            x = self._attend(layer, x, layer_kv, meta, angles[rope], window, mark)
            if layer is last:  # the other rows have left their K and V; nothing else of them is needed
                x, residual = x.index_select(0, rows), residual.index_select(0, rows)
            x = layer.attention_out(x)
            mark("linears")
            if layer.attention_post_norm is not None:
                x = rms_norm(x, layer.attention_post_norm, eps)
            x, residual = add_rms_norm(x, residual, layer.mlp_norm, eps)
            mark("rest")
            x = layer.gate_up(x)
            mark("linears")
            x = self._gate(x)
            mark("rest")
            x = layer.down(x)
            mark("linears")
            if layer.mlp_post_norm is not None:
                x = rms_norm(x, layer.mlp_post_norm, eps)
            x, residual = add_rms_norm(x, residual, next_norm, eps)
            mark("rest")
        logits = self._head(x)
        mark("linears")
        logits, cap = logits.float(), self.config.logit_softcap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        mark("rest")
        return logits

    def _attend(
        self,
        layer: Layer,
        x: Tensor,
        kv: Tensor,
        meta: AttnMeta,
        cos_sin: Tensor | None,
        window: int | None,
        mark: Mark,
    ) -> Tensor:
        """x: [T, N] -> [T, H * D]."""
        fused = layer.qkv(x)
        mark("linears")
        heads = fused.view(x.shape[0], -1, self.config.head_dim)
        q, k, v = heads.split_with_sizes(self._heads, dim=1)  # half the cost of torch.split
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, self.config.norm_eps)
            k = rms_norm(k, layer.k_norm, self.config.norm_eps)
        q = rope_kv_write(q, k, v, cos_sin, kv, meta)
        mark("rest")
        config = self.config
        out, _ = paged_attention(q, kv, meta, config.attention_scale, window, config.attention_softcap)
        mark("attention")
        return out.view(x.shape[0], -1)
