"""From a model folder to a `Decoder`: which tensors a model has, and how they are fused and packed.

Linears that read the same input become one, and each is packed for its kernel as soon as it is read, the
largest first: beyond the packed weights, memory never holds more than one fused linear.  The embedding is not
copied at all; lookups read the mapped file.

To another device than the CPU each tensor goes straight from the mapped file, and the host keeps nothing of
it.  There an embedding that is also the head is one tensor.
"""

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.models.checkpoint import Checkpoint, Shape
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, RotaryDecoder
from engine.models.dtype import check_dtype
from engine.models.opt import POSITION_OFFSET, OptDecoder, OptLayer, OptNorm
from kernels.decoder_layers import Layer
from kernels.linear import PackedLinear
from kernels.native.memory import let_go

_HEAD = "lm_head.weight"


def load_decoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Raises ModelFolderError naming what is absent, left over, misshapen, damaged or unsupported, and
    ConfigError for a dtype that the device does not compute in or weights that it has no room for.
    """
    check_dtype(dtype, device)
    config = ModelConfig.from_dir(folder)
    checkpoint = Checkpoint(folder)
    expected = expected_tensors(config)
    checkpoint.check(expected, _harmless(config, checkpoint))
    build = _opt_decoder if _is_opt(config) else _rotary_decoder
    try:
        decoder = build(config, _Packer(checkpoint, dtype, device))
        if device.type == "cuda":  # steps are computed on another stream than weights were brought on
            torch.cuda.synchronize(device)
        return decoder
    except torch.OutOfMemoryError:
        gib = sum(map(prod, expected.values())) * dtype.itemsize / 2**30
        advice = "" if dtype.itemsize == 2 else "; in bfloat16 it takes half of that"
        raise ConfigError(
            f"the weights of {folder} take {gib:.1f} GiB in {str(dtype).removeprefix('torch.')}, more than "
            f"{device} has free{advice}: end what else runs there, or serve a smaller model"
        ) from None


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that the model consists of, in the order in which it uses them."""
    expected = _opt_tensors(config) if _is_opt(config) else _rotary_tensors(config)
    if not config.tied_embeddings:
        expected[_HEAD] = (config.vocab_size, config.embedding_size)
    return expected


def _is_opt(config: ModelConfig) -> bool:
    return config.architecture == "OPTForCausalLM"


def _rotary_decoder(config: ModelConfig, packer: "_Packer") -> RotaryDecoder:
    head = packer.linear("model.embed_tokens" if config.tied_embeddings else "lm_head")
    layers = [_layer(packer, config, index) for index in range(config.num_layers)]
    embedding = packer.table("model.embed_tokens.weight")
    return RotaryDecoder(config, embedding, layers, _norm(packer, config, "model.norm"), head)


def _rotary_tensors(config: ModelConfig) -> dict[str, Shape]:
    hidden, ffn, q_size = config.hidden_size, config.ffn_size, config.num_heads * config.head_dim
    qkv, gate_up = _joint_linears(config)
    linears = {
        **{f"self_attn.{name}": (size, hidden, config.qkv_bias) for name, size in qkv.items()},
        "self_attn.o_proj": (hidden, q_size, config.attention_out_bias),
        **{f"mlp.{name}": (size, hidden, config.mlp_bias) for name, size in gate_up.items()},
        "mlp.down_proj": (hidden, ffn, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.post_norms:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}

    expected: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        expected |= _layer_tensors(f"model.layers.{index}", linears)
        expected |= {f"model.layers.{index}.{name}.weight": (size,) for name, size in norms.items()}
    expected["model.norm.weight"] = (hidden,)
    return expected


def _layer_tensors(layer: str, linears: dict[str, tuple[int, int, bool]]) -> dict[str, Shape]:
    """`linears`: outputs, inputs, and whether there is a bias."""
    expected: dict[str, Shape] = {}
    for name, (rows, columns, has_bias) in linears.items():
        expected[f"{layer}.{name}.weight"] = (rows, columns)
        if has_bias:
            expected[f"{layer}.{name}.bias"] = (rows,)
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
    """Brings tensors of a checked checkpoint to the device in the model's dtype."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._reads_file = device.type == "cpu"
        self._copies: dict[tuple[str, ...], Tensor] = {}  # on another device: a table may be a linear as well

    def table(self, name: str) -> Tensor:
        """Rows to look up.  On the CPU as they lie in the file, of which only those are ever read."""
        if self._reads_file:
            return self._checkpoint.tensor(name)
        return self._stacked([name])

    def vector(self, name: str) -> Tensor:
        """A copy of its own: read every step, so it does not stay in the mapped file."""
        return self._checkpoint.tensor(name).to(self._device, self._dtype, copy=True)

    def linear(self, *modules: str, bias: bool = False) -> PackedLinear:
        """One linear from those that read the same input, their outputs side by side."""
        names = [f"{module}.weight" for module in modules]
        biases = self._stacked([f"{module}.bias" for module in modules]) if bias else None
        packed = PackedLinear(self._stacked(names), biases)
        self._let_go(names)
        return packed

    def _stacked(self, names: list[str]) -> Tensor:
        parts = [self._checkpoint.tensor(name) for name in names]
        if self._reads_file and len(parts) == 1:
            return parts[0].to(self._dtype)
        if (copy := self._copies.get(tuple(names))) is not None:
            return copy
        shape = sum(map(len, parts)), *parts[0].shape[1:]
        whole = torch.empty(shape, dtype=self._dtype, device=self._device)
        for place, part in zip(torch.split(whole, [len(part) for part in parts]), parts, strict=True):
            place.copy_(part)
        if not self._reads_file:
            self._copies[tuple(names)] = whole
            self._let_go(names)
        return whole

    def _let_go(self, names: list[str]) -> None:
        for name in names:
            let_go(self._checkpoint.tensor(name))


def _layer(packer: _Packer, config: ModelConfig, index: int) -> Layer:
    name, sees = f"model.layers.{index}", config.layers[index]
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    qkv, gate_up = _joint_linears(config)
    # Where there are norms behind attention and mlp, the name of the one before the mlp goes to one of those.
    before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"

    def norm(part: str, exists: bool) -> Tensor | None:
        return _norm(packer, config, f"{name}.{part}") if exists else None

    return Layer(
        attention_norm=_norm(packer, config, f"{name}.input_layernorm"),
        qkv=packer.linear(*(f"{attention}.{part}" for part in qkv), bias=config.qkv_bias),
        q_norm=norm("self_attn.q_norm", config.qk_norm),
        k_norm=norm("self_attn.k_norm", config.qk_norm),
        attention_out=packer.linear(f"{attention}.o_proj", bias=config.attention_out_bias),
        attention_post_norm=norm("post_attention_layernorm", config.post_norms),
        mlp_norm=_norm(packer, config, f"{name}.{before_mlp}"),
        gate_up=packer.linear(*(f"{mlp}.{part}" for part in gate_up), bias=config.mlp_bias),
        down=packer.linear(f"{mlp}.down_proj", bias=config.mlp_bias),
        mlp_post_norm=norm("post_feedforward_layernorm", config.post_norms),
        angles=config.ropes.index(sees.rope),
        window=sees.window,
    )


def _norm(packer: _Packer, config: ModelConfig, name: str) -> Tensor:
    weight = packer.vector(f"{name}.weight")
    # In fp32, as their makers compute: bfloat16 near 1 has no digits left for what is added to it.
    return weight.float() + config.norm_offset if config.norm_offset else weight


def _opt_decoder(config: ModelConfig, packer: _Packer) -> OptDecoder:
    root = "model.decoder"
    head = packer.linear(f"{root}.embed_tokens" if config.tied_embeddings else "lm_head")
    projections = None
    if config.embedding_size != config.hidden_size:
        projections = packer.linear(f"{root}.project_in"), packer.linear(f"{root}.project_out")
    return OptDecoder(
        config,
        packer.table(f"{root}.embed_tokens.weight"),
        packer.table(f"{root}.embed_positions.weight"),
        [_opt_layer(packer, config, f"{root}.layers.{index}") for index in range(config.num_layers)],
        _opt_norm(packer, config, f"{root}.final_layer_norm") if config.norm_first else None,
        projections,
        head,
    )


def _opt_layer(packer: _Packer, config: ModelConfig, name: str) -> OptLayer:
    attention = f"{name}.self_attn"
    return OptLayer(
        attention_norm=_opt_norm(packer, config, f"{name}.self_attn_layer_norm"),
        qkv=packer.linear(*(f"{attention}.{part}_proj" for part in "qkv"), bias=config.qkv_bias),
        attention_out=packer.linear(f"{attention}.out_proj", bias=config.attention_out_bias),
        mlp_norm=_opt_norm(packer, config, f"{name}.final_layer_norm"),
        up=packer.linear(f"{name}.fc1", bias=config.mlp_bias),
        down=packer.linear(f"{name}.fc2", bias=config.mlp_bias),
    )


def _opt_norm(packer: _Packer, config: ModelConfig, name: str) -> OptNorm:
    return OptNorm(packer.vector(f"{name}.weight"), packer.vector(f"{name}.bias"), config.norm_eps)


def _opt_tensors(config: ModelConfig) -> dict[str, Shape]:
    root, hidden, embedding = "model.decoder", config.hidden_size, config.embedding_size
    parts = {
        "q": config.qkv_bias,
        "k": config.qkv_bias,
        "v": config.qkv_bias,
        "out": config.attention_out_bias,
    }
    linears = {f"self_attn.{part}_proj": (hidden, hidden, has_bias) for part, has_bias in parts.items()}
    linears["fc1"] = (config.ffn_size, hidden, config.mlp_bias)
    linears["fc2"] = (hidden, config.ffn_size, config.mlp_bias)

    expected: dict[str, Shape] = {
        f"{root}.embed_tokens.weight": (config.vocab_size, embedding),
        f"{root}.embed_positions.weight": (config.max_positions + POSITION_OFFSET, hidden),
    }
    norms = [f"{root}.final_layer_norm"] if config.norm_first else []
    for index in range(config.num_layers):
        layer = f"{root}.layers.{index}"
        expected |= _layer_tensors(layer, linears)
        norms += [f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"]
    for norm in norms:
        expected |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    if embedding != hidden:
        expected[f"{root}.project_in.weight"] = (hidden, embedding)
        expected[f"{root}.project_out.weight"] = (embedding, hidden)
    return expected
