"""Decoders: token ids of a ragged step in, logits of chosen rows out.

`RotaryDecoder` is one program for all families but OPT (opt.py); what differs is data (biases, more norms,
windows, soft caps, or none of them).  Nothing here knows of conversations, blocks or phases: the caller owns
the paged KV and says in `AttnMeta` where each row stands.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.rope import RopeTable
from kernels.decoder_layers import DecoderLayers, Layer, LayerShape
from kernels.linear import PackedLinear
from kernels.marks import Mark, unmarked
from kernels.paged_attention import AttnMeta
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

        Returns logits [R, V] fp32 of `rows`: [R >= 0] int64, ascending indices into the step.  All K and V of
        a layer are written before its attention, so segments of one conversation may attend to each other.
        Before a layer touches its `kv` it calls `wait_for` with its number: KV may still be on its way.
        `mark` is told what the time went to.
        """
        ...


class RotaryDecoder:
    """embedding: [V, N].  On the CPU in any float dtype, mapped from its file: only looked-up rows are ever
    read.  What is on another device is all there, in the model's dtype, and `forward` only gives that device
    work: it neither waits for it nor moves anything to or from it.
    """

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
        self._embedding, self._head = embedding, head
        shape = LayerShape(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.norm_eps,
            config.attention_scale,
            config.attention_softcap,
            silu_mul if config.activation == "silu" else gelu_mul,
        )
        self._layers = DecoderLayers(shape, layers, final_norm)
        device = embedding.device
        self._tables = [
            None if rope is None else RopeTable(config.head_dim, rope, config.max_positions, device)
            for rope in config.ropes
        ]
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype, device=device)

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
        num_positions = meta.num_positions
        angles = [None if table is None else table.upto(num_positions) for table in self._tables]
        residual = self._embedding.index_select(0, ids).to(self.dtype)
        if self.config.embedding_scale != 1:
            residual = residual * self._embedding_scale
        x = self._layers(residual, meta, kv, angles, rows, wait_for, mark)
        logits = self._head(x)
        mark("linears")
        logits, cap = logits.float(), self.config.logit_softcap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        mark("rest")
        return logits
