"""The architectures that can be served: what each decides by itself or means where config.json is silent."""

from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["silu", "gelu_pytorch_tanh", "relu"]
Architecture = Literal[
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "OPTForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    head_dim: int | None = None  # None: hidden size / number of heads
    ffn_size_key: str = "intermediate_size"
    activation: Activation = "silu"
    activation_key: str = "hidden_act"
    norm_eps: float = 1e-6
    rope_theta: float | None = 10000.0  # None: positions are learned
    local_rope_theta: float | None = None  # of windowed layers, where they have a RoPE of their own
    tied_embeddings: bool = False
    qkv_bias: bool = False  # whatever config.json says
    attention_bias_key: str | None = "attention_bias"  # for queries, keys, values and the output
    mlp_bias_key: str | None = None
    has_biases: bool = False  # where those keys are not there
    qk_norm: bool = False
    fused_weights: bool = False
    code: str | None = (
        None  # what its folders name in auto_map, from before transformers knew the architecture
    )
    is_gemma: bool = False  # scaled embedding; norms of (1 + weight), also behind attention and mlp
    query_scalar: float | None = None  # its root divides the scores; None: the head's size
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    unrotated_cycle: int | None = None  # every n-th layer does not rotate, unless there is a list of them
    # Which layers see a window, if there is one and no list of types: "cyclic" leaves out every n-th.
    windowed: Literal["none", "all", "upper", "cyclic", "unrotated"] = "none"
    window_cycle: int = 1
    window: int | None = None
    switches_window: bool = False  # the window counts only under use_sliding_window


_FAMILIES: dict[Architecture, Family] = {
    "Gemma2ForCausalLM": Family(
        head_dim=256,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        tied_embeddings=True,
        is_gemma=True,
        query_scalar=256.0,
        attention_softcap=50.0,
        logit_softcap=30.0,
        windowed="cyclic",
        window_cycle=2,
        window=4096,
    ),
    "Gemma3ForCausalLM": Family(
        head_dim=256,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        rope_theta=1000000.0,
        local_rope_theta=10000.0,
        tied_embeddings=True,
        qk_norm=True,
        is_gemma=True,
        query_scalar=256.0,
        windowed="cyclic",
        window_cycle=6,
        window=4096,
    ),
    "LlamaForCausalLM": Family(mlp_bias_key="mlp_bias"),
    "MistralForCausalLM": Family(attention_bias_key=None, windowed="all", window=4096),
    "OPTForCausalLM": Family(
        ffn_size_key="ffn_dim",
        activation="relu",
        activation_key="activation_function",
        norm_eps=1e-5,
        rope_theta=None,
        tied_embeddings=True,
        attention_bias_key="enable_bias",
        mlp_bias_key="enable_bias",
        has_biases=True,
    ),
    "Phi3ForCausalLM": Family(
        norm_eps=1e-5,
        attention_bias_key=None,
        fused_weights=True,
        code="modeling_phi3.Phi3ForCausalLM",
        windowed="all",
    ),
    "Qwen2ForCausalLM": Family(
        qkv_bias=True, attention_bias_key=None, windowed="upper", window=4096, switches_window=True
    ),
    "Qwen3ForCausalLM": Family(
        head_dim=128, qk_norm=True, windowed="upper", window=4096, switches_window=True
    ),
    "SmolLM3ForCausalLM": Family(
        rope_theta=2000000.0,
        tied_embeddings=True,
        mlp_bias_key="mlp_bias",
        unrotated_cycle=4,
        windowed="unrotated",
        switches_window=True,
    ),
}


def family_of(architecture: Architecture) -> Family:
    return _FAMILIES[architecture]
