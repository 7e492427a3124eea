"""A model folder's config.json and generation_config.json as one frozen record of what the decoder has to do.

Families differ only in switches.  A switch that the decoder does not have is refused with the reason: a model
that loads is computed exactly as its makers meant it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from engine.errors import InvalidRequest, ModelFolderError
from engine.models.fields import Fields
from engine.types import SamplingParams

Architecture = Literal["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
_SUPPORTED: tuple[Architecture, ...] = get_args(Architecture)


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """RoPE of Llama 3.1: slow rotations are slowed further by `factor`, fast ones kept, others blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes in elements.  `num_heads` * `head_dim` need not be `hidden_size`."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # G, a divisor of H
    head_dim: int  # D
    norm_eps: float
    max_positions: int
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm of each query and key head before RoPE
    tied_embeddings: bool  # the head's weight is the embedding
    eos_ids: frozenset[int]  # any of them ends a reply
    sampling: SamplingParams  # the makers' defaults; what they leave open is None

    @classmethod
    def from_dir(cls, folder: Path) -> "ModelConfig":
        """Raises ModelFolderError: no such folder, a file absent or malformed, an unsupported model."""
        if not folder.is_dir():
            raise ModelFolderError(
                f"{folder} is not a folder; expected a model folder in Hugging Face format"
            )
        fields = Fields.read(folder / "config.json")
        architecture = _architecture(fields)
        _refuse_unsupported(fields)
        hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        attention_bias = fields.flag("attention_bias") and architecture != "Qwen2ForCausalLM"
        generation = folder / "generation_config.json"
        defaults = Fields.read(generation) if generation.exists() else Fields(generation, {})
        config = cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            ffn_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_dim=fields.integer("head_dim", _default_head_dim(architecture, hidden_size, num_heads)),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_positions=fields.integer("max_position_embeddings"),
            rope_theta=_rope_theta(fields),
            rope_scaling=_rope_scaling(fields),
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            attention_out_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias") and architecture == "LlamaForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            tied_embeddings=fields.flag("tie_word_embeddings"),
            eos_ids=fields.ids("eos_token_id") | defaults.ids("eos_token_id"),
            sampling=_sampling(defaults),
        )
        _check(config, fields)
        return config


def _architecture(fields: Fields) -> Architecture:
    if fields.value("auto_map"):
        raise ModelFolderError(
            f"{fields.path} has auto_map: the model needs its makers' code, which is never run here"
        )
    named = fields.value("architectures")
    if not (isinstance(named, list) and len(named) == 1):
        raise fields.wrong("architectures", "a list of one name")
    for architecture in _SUPPORTED:
        if architecture == named[0]:
            return architecture
    raise ModelFolderError(
        f"{fields.path}: architecture {named[0]} is not supported; supported are {', '.join(_SUPPORTED)}"
    )


def _refuse_unsupported(fields: Fields) -> None:
    if fields.value("quantization_config") is not None:
        raise ModelFolderError(
            f"{fields.path} has quantization_config; quantized weights are not supported: take the original"
        )
    if fields.value("hidden_act") not in (None, "silu"):
        raise ModelFolderError(
            f"{fields.path}: hidden_act {fields.value('hidden_act')} is not supported; only silu is"
        )
    layer_types = fields.value("layer_types")
    if layer_types is None:
        first_windowed = fields.integer("max_window_layers", 0, at_least=0)
        windowed = fields.flag("use_sliding_window") and first_windowed < fields.integer("num_hidden_layers")
    else:
        windowed = layer_types != ["full_attention"] * fields.integer("num_hidden_layers")
    if windowed:
        raise ModelFolderError(
            f"{fields.path}: some layers attend only a window (use_sliding_window, layer_types); "
            f"only full attention is supported"
        )


def _default_head_dim(architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    return 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads


def _rope_theta(fields: Fields) -> float:
    return fields.group("rope_parameters").number("rope_theta", fields.number("rope_theta", 10000.0))


def _rope_scaling(fields: Fields) -> Llama3Scaling | None:
    """From `rope_scaling`, or from `rope_parameters`, where transformers 5 keeps it together with theta."""
    rope = fields.group("rope_parameters" if fields.value("rope_parameters") else "rope_scaling")
    kind = rope.value("rope_type") or rope.value("type") or "default"
    for holder in (fields, rope):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise holder.wrong("partial_rotary_factor", "1.0: partly rotated heads are not supported")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelFolderError(
            f"{fields.path}: RoPE type {kind!r} is not supported; supported are 'default' and 'llama3'"
        )
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.wrong("low_freq_factor", f"less than high_freq_factor, {high:g}")
    return Llama3Scaling(rope.number("factor"), low, high, rope.integer("original_max_position_embeddings"))


def _sampling(defaults: Fields) -> SamplingParams:
    """do_sample false is greedy whatever else stands there; true without a temperature is temperature 1."""
    if defaults.value("do_sample") is False:
        return SamplingParams(temperature=0.0)
    temperature = defaults.value("temperature")
    if temperature is None and defaults.flag("do_sample"):
        temperature = 1.0
    top_k, top_p, min_p = (defaults.value(key) for key in ("top_k", "top_p", "min_p"))
    try:
        return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    except (InvalidRequest, TypeError) as error:
        raise ModelFolderError(f"{defaults.path}: {error}") from None


def _check(config: ModelConfig, fields: Fields) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelFolderError(
            f"{fields.path}: {config.num_heads} query heads (num_attention_heads) cannot share "
            f"{config.num_kv_heads} KV heads (num_key_value_heads) evenly"
        )
    if config.head_dim % 2:
        raise ModelFolderError(f"{fields.path}: head_dim {config.head_dim} is odd; RoPE rotates pairs")
    beyond = sorted(one for one in config.eos_ids if one >= config.vocab_size)
    if beyond:
        raise ModelFolderError(
            f"{fields.path}: eos_token_id {beyond[0]} is outside the vocabulary of {config.vocab_size}"
        )
