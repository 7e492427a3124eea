"""From a model folder to a `Decoder`: which tensors a model has, and how they are fused and packed.

Linears that read the same input become one, and each is packed for its kernel as soon as it is read, the
largest first: beyond the packed weights, memory never holds more than one fused linear.  The embedding is not
copied at all; lookups read the mapped file.
"""

from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.models.checkpoint import Checkpoint, Shape
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, Layer
from kernels.linear import PackedLinear

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_decoder(folder: Path, dtype: torch.dtype) -> Decoder:
    """Raises ModelFolderError naming what is absent, left over, misshapen, damaged or unsupported."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"{dtype} is not supported on the CPU; use float32 or bfloat16")
    config = ModelConfig.from_dir(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check(expected_tensors(config), _harmless(config, checkpoint))
    packer = _Packer(checkpoint, dtype)
    head = packer.linear("model.embed_tokens" if config.tied_embeddings else "lm_head")
    layers = [_layer(packer, config, f"model.layers.{index}") for index in range(config.num_layers)]
    return Decoder(config, checkpoint.tensor(_EMBEDDING), layers, packer.vector("model.norm.weight"), head)


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that the model consists of, in the order in which it uses them."""
    hidden, ffn, q_size = config.hidden_size, config.ffn_size, config.num_heads * config.head_dim
    qkv, gate_up = _joint_linears(config)
    linears = {
        **{f"self_attn.{name}": (size, hidden, config.qkv_bias) for name, size in qkv.items()},
        "self_attn.o_proj": (hidden, q_size, config.attention_out_bias),
        **{f"mlp.{name}": (size, hidden, config.mlp_bias) for name, size in gate_up.items()},
        "mlp.down_proj": (hidden, ffn, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}

    expected: dict[str, Shape] = {_EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        for name, (rows, columns, has_bias) in linears.items():
            expected[f"{layer}.{name}.weight"] = (rows, columns)
            if has_bias:
                expected[f"{layer}.{name}.bias"] = (rows,)
        for name, size in norms.items():
            expected[f"{layer}.{name}.weight"] = (size,)
    expected["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        expected[_HEAD] = (config.vocab_size, hidden)
    return expected


def _joint_linears(config: ModelConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Name and size of the linears that read the input of attention, and of those that read the mlp's."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if config.fused_weights:
        return {"qkv_proj": q_size + 2 * kv_size}, {"gate_up_proj": 2 * config.ffn_size}
    qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    return qkv, {"gate_proj": config.ffn_size, "up_proj": config.ffn_size}


def _harmless(config: ModelConfig, checkpoint: Checkpoint) -> set[str]:
    """What some tools store although it follows from the rest: RoPE frequencies, a tied head."""
    buffers = {name for name in checkpoint.names() if name.endswith("rotary_emb.inv_freq")}
    return buffers | {_HEAD} if config.tied_embeddings else buffers


class _Packer:
    """Reads tensors of a checked checkpoint in the model's dtype."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype

    def vector(self, name: str) -> Tensor:
        """A copy of its own: read every step, so it does not stay in the mapped file."""
        return self._checkpoint.tensor(name).to(self._dtype, copy=True)

    def linear(self, *modules: str, bias: bool = False) -> PackedLinear:
        """One linear from those that read the same input, their outputs side by side."""
        weight = self._stacked([f"{module}.weight" for module in modules])
        return PackedLinear(weight, self._stacked([f"{module}.bias" for module in modules]) if bias else None)

    def _stacked(self, names: list[str]) -> Tensor:
        parts = [self._checkpoint.tensor(name) for name in names]
        if len(parts) == 1:
            return parts[0].to(self._dtype)
        whole = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=self._dtype)
        for place, part in zip(torch.split(whole, [len(part) for part in parts]), parts, strict=True):
            place.copy_(part)
        return whole


def _layer(packer: _Packer, config: ModelConfig, name: str) -> Layer:
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    qkv, gate_up = _joint_linears(config)
    return Layer(
        attention_norm=packer.vector(f"{name}.input_layernorm.weight"),
        qkv=packer.linear(*(f"{attention}.{part}" for part in qkv), bias=config.qkv_bias),
        q_norm=packer.vector(f"{attention}.q_norm.weight") if config.qk_norm else None,
        k_norm=packer.vector(f"{attention}.k_norm.weight") if config.qk_norm else None,
        attention_out=packer.linear(f"{attention}.o_proj", bias=config.attention_out_bias),
        mlp_norm=packer.vector(f"{name}.post_attention_layernorm.weight"),
        gate_up=packer.linear(*(f"{mlp}.{part}" for part in gate_up), bias=config.mlp_bias),
        down=packer.linear(f"{mlp}.down_proj", bias=config.mlp_bias),
    )
