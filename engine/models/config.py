"""A model folder's config.json and generation_config.json as one frozen record of what the decoder has to do.

Families differ only in switches.  A switch that the decoder does not have is refused with the reason: a model
that loads is computed exactly as its makers meant it.
"""

from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidRequest, ModelFolderError
from engine.models.families import ARCHITECTURES, Activation, Architecture, Family, family_of
from engine.models.fields import Fields
from engine.models.layer_attention import LayerAttention, Rope, read_layers
from engine.types import SamplingParams

_FIXED = {
    "use_bidirectional_attention": False,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes in elements.  `num_heads` * `head_dim` need not be `hidden_size`."""

    architecture: Architecture
    vocab_size: int
    embedding_size: int  # other than the hidden size only in OPT
    hidden_size: int
    ffn_size: int
    layers: tuple[LayerAttention, ...]
    num_heads: int  # H
    num_kv_heads: int  # G, a divisor of H
    head_dim: int  # D
    activation: Activation
    norm_eps: float
    norm_offset: float  # a norm multiplies by this plus its weight
    max_positions: int
    embedding_scale: float
    attention_scale: float
    attention_softcap: float | None  # c: scores s become c * tanh(s / c)
    logit_softcap: float | None
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm of each query and key head before RoPE
    post_norms: bool  # also of what attention and mlp give, before it is added
    norm_first: bool  # before attention and mlp, not after; false only in OPT
    fused_weights: bool  # one tensor holds q, k and v, another gate and up
    tied_embeddings: bool  # the head's weight is the embedding
    eos_ids: frozenset[int]  # any of them ends a reply
    sampling: SamplingParams  # the makers' defaults; what they leave open is None

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The different ones that layers have."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @classmethod
    def from_dir(cls, folder: Path) -> "ModelConfig":
        """Raises ModelFolderError: no such folder, a file absent or malformed, an unsupported model."""
        if not folder.is_dir():
            raise ModelFolderError(
                f"{folder} is not a folder; expected a model folder in Hugging Face format"
            )
        fields = Fields.read(folder / "config.json")
        architecture = _architecture(fields)
        hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        family = family_of(architecture)
        _refuse_unsupported(fields, family)
        attention_bias = _flag(fields, family.attention_bias_key, family.has_biases)
        generation = folder / "generation_config.json"
        defaults = Fields.read(generation) if generation.exists() else Fields(generation, {})
        head_dim = fields.integer("head_dim", family.head_dim or hidden_size // num_heads)
        config = cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            embedding_size=fields.integer("word_embed_proj_dim", hidden_size),
            hidden_size=hidden_size,
            ffn_size=fields.integer(family.ffn_size_key),
            layers=read_layers(fields, family),
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_dim=head_dim,
            activation=family.activation,
            norm_eps=fields.number("rms_norm_eps", family.norm_eps),
            norm_offset=1.0 if family.is_gemma else 0.0,
            max_positions=fields.integer("max_position_embeddings"),
            embedding_scale=hidden_size**0.5 if family.is_gemma else 1.0,
            attention_scale=_query_scalar(fields, family, head_dim) ** -0.5,
            attention_softcap=fields.number_or_none("attn_logit_softcapping", family.attention_softcap),
            logit_softcap=fields.number_or_none("final_logit_softcapping", family.logit_softcap),
            qkv_bias=family.qkv_bias or attention_bias,
            attention_out_bias=attention_bias,
            mlp_bias=_flag(fields, family.mlp_bias_key, family.has_biases),
            qk_norm=family.qk_norm,
            post_norms=family.is_gemma,
            norm_first=fields.flag("do_layer_norm_before", default=True),
            fused_weights=family.fused_weights,
            tied_embeddings=fields.flag("tie_word_embeddings", family.tied_embeddings),
            eos_ids=fields.ids("eos_token_id") | defaults.ids("eos_token_id"),
            sampling=_sampling(defaults),
        )
        _check(config, fields)
        return config


def _architecture(fields: Fields) -> Architecture:
    named = fields.value("architectures")
    if not (isinstance(named, list) and len(named) == 1):
        raise fields.wrong("architectures", "a list of one name")
    for architecture in ARCHITECTURES:
        if architecture == named[0]:
            _refuse_code(fields, family_of(architecture).code)
            return architecture
    _refuse_code(fields, None)
    raise ModelFolderError(
        f"{fields.path}: architecture {named[0]} is not supported; supported are {', '.join(ARCHITECTURES)}"
    )


def _refuse_code(fields: Fields, known: str | None) -> None:
    needed = fields.group("auto_map").value("AutoModelForCausalLM")
    if fields.value("auto_map") and (known is None or needed != known):
        raise ModelFolderError(
            f"{fields.path} has auto_map: the model needs its makers' code, which is never run here"
        )


def _refuse_unsupported(fields: Fields, family: Family) -> None:
    if fields.value("quantization_config") is not None:
        raise ModelFolderError(
            f"{fields.path} has quantization_config; quantized weights are not supported: take the original"
        )
    if fields.value(family.activation_key) not in (None, family.activation):
        raise ModelFolderError(
            f"{fields.path}: {family.activation_key} {fields.value(family.activation_key)} is not supported; "
            f"only {family.activation} is"
        )
    for key, supported in _FIXED.items():
        if fields.flag(key, supported) != supported:
            raise fields.wrong(key, f"{str(supported).lower()}: the other is not supported")


def _query_scalar(fields: Fields, family: Family, head_dim: int) -> float:
    return (
        head_dim
        if family.query_scalar is None
        else fields.number("query_pre_attn_scalar", family.query_scalar)
    )


def _flag(fields: Fields, key: str | None, default: bool) -> bool:
    return key is not None and fields.flag(key, default)


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
