"""Tiny random models of every family, each with the switches that its real ones have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

_SIZES = {
    "vocab_size": 320,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # usually beyond so small a vocabulary


def _llama2() -> PreTrainedModel:
    """One KV head per query head."""
    heads = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **heads, rms_norm_eps=1e-5))


def _llama3() -> PreTrainedModel:
    """Shared KV heads, scaled RoPE whose three bands all occur, several ends, every possible bias."""
    heads = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 128, **scaling}
    ends = [301, 302, 303]
    biases = {"attention_bias": True, "mlp_bias": True}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **heads, **biases, rope_parameters=rope, eos_token_id=ends))


# Deeper or wider random OPTs repeat themselves: ReLU gives every row the same large part.
_OPT_SIZES = _SIZES | {"num_hidden_layers": 2, "ffn_dim": 32, "hidden_size": 64, "num_attention_heads": 4}


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**_OPT_SIZES, word_embed_proj_dim=64, tie_word_embeddings=False))


def _opt_350m() -> PreTrainedModel:
    """What only OPT-350M does: norms behind their sums, a narrow embedding; and no bias in any linear."""
    switches = {"do_layer_norm_before": False, "enable_bias": False}
    return OPTForCausalLM(OPTConfig(**_OPT_SIZES, word_embed_proj_dim=48, **switches))


def _phi3() -> PreTrainedModel:
    """Fused tensors, a window in every layer, and heads of 24, which fill no vector."""
    heads = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 40}
    return Phi3ForCausalLM(Phi3Config(**_SIZES, **heads, **_ENDS))


def _qwen2() -> PreTrainedModel:
    """Biases on q, k and v; the head's weight is the embedding."""
    heads = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return Qwen2ForCausalLM(Qwen2Config(**_SIZES, **heads, tie_word_embeddings=True, rope_parameters=rope))


def _qwen3() -> PreTrainedModel:
    """Normed queries and keys; heads wider than hidden size / number of heads."""
    heads = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, **heads, rope_parameters=rope))


def _mistral() -> PreTrainedModel:
    """Every layer sees a window, which is no multiple of a block and shorter than most prompts."""
    heads = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return MistralForCausalLM(MistralConfig(**_SIZES, **heads, sliding_window=41))


def _qwen2_windowed() -> PreTrainedModel:
    """Windows from the second layer on."""
    heads = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    windows = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**_SIZES, **heads, **windows))


def _smollm() -> PreTrainedModel:
    """SmolLM and SmolLM2 are Llamas with three query heads to a KV head and a tied head."""
    heads = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **heads, tie_word_embeddings=True))


def _scaled(**scaling: Any) -> Callable[[], PreTrainedModel]:
    """A Llama whose RoPE is stretched from 128 positions."""

    def build() -> PreTrainedModel:
        heads = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        rope = {"rope_theta": 10000.0, **scaling}
        return LlamaForCausalLM(LlamaConfig(**_SIZES, **heads, rope_parameters=rope))

    return build


def _smollm3() -> PreTrainedModel:
    """The second layer rotates nothing."""
    heads = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **_ENDS}
    return SmolLM3ForCausalLM(
        SmolLM3Config(**_SIZES, **heads, no_rope_layer_interval=2, tie_word_embeddings=False)
    )


def _smollm3_windowed() -> PreTrainedModel:
    """The layers that rotate nothing see a window."""
    heads = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **_ENDS}
    windows = {"use_sliding_window": True, "sliding_window": 41, "no_rope_layers": [0, 1, 0]}
    return SmolLM3ForCausalLM(SmolLM3Config(**_SIZES, **heads, **windows, tie_word_embeddings=False))


_GEMMA_SIZES = _SIZES | {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 8,
    "tie_word_embeddings": False,  # tied ones repeat themselves
}


def _gemma2() -> PreTrainedModel:
    """Soft caps that bite, a window in the first and third layer, scores not scaled by the heads' size."""
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}
    return Gemma2ForCausalLM(Gemma2Config(**_GEMMA_SIZES, **caps, sliding_window=41))


def _gemma3() -> PreTrainedModel:
    """Normed queries and keys, windowed layers with a RoPE of their own."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    windows = {
        "sliding_window": 41,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**_GEMMA_SIZES, **windows, rope_parameters=rope))


FAMILIES = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "llama2": _llama2,
    "llama3": _llama3,
    "llama linear": _scaled(rope_type="linear", factor=4.0),
    "llama dynamic": _scaled(rope_type="dynamic", factor=4.0),
    "llama yarn": _scaled(rope_type="yarn", factor=8.0, original_max_position_embeddings=128),
    "mistral": _mistral,
    "opt": _opt,
    "opt 350m": _opt_350m,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2 windowed": _qwen2_windowed,
    "qwen3": _qwen3,
    "smollm": _smollm,
    "smollm3": _smollm3,
    "smollm3 windowed": _smollm3_windowed,
}


def tiny_checkpoint(family: str, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Saves a random model and returns it.  Spread widely: biases and norms matter, choices are clear."""
    torch.manual_seed(7)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation("eager")
    usual_norm = 0.0 if family.startswith("gemma") else 1.0
    for name, parameter in model.named_parameters():
        centre = usual_norm if name.endswith("norm.weight") else 0.0
        spread = 2.0 if "embed_positions" in name else 0.15 if parameter.ndim == 2 else 0.3
        torch.nn.init.normal_(parameter.data, centre, spread)
    model.to(dtype).save_pretrained(folder)
    return model
