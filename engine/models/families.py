"""The architectures that can be served: what each decides by itself or means where config.json is silent."""

from dataclasses import dataclass
from typing import Literal, get_args

Architecture = Literal[
    "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    head_dim: int | None = None  # None: hidden size / number of heads
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tied_embeddings: bool = False
    qkv_bias: bool = False  # whatever config.json says
    reads_attention_bias: bool = True  # of attention_bias: queries, keys, values and the output
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    fused_weights: bool = False
    code: str | None = (
        None  # what its folders name in auto_map, from before transformers knew the architecture
    )
    windowed: Literal["none", "all", "upper"] = "none"  # layers, if there is a window and no list of types
    window: int | None = None
    switches_window: bool = False  # the window counts only under use_sliding_window


_FAMILIES: dict[Architecture, Family] = {
    "LlamaForCausalLM": Family(reads_mlp_bias=True),
    "MistralForCausalLM": Family(reads_attention_bias=False, windowed="all", window=4096),
    "Phi3ForCausalLM": Family(
        norm_eps=1e-5,
        reads_attention_bias=False,
        fused_weights=True,
        code="modeling_phi3.Phi3ForCausalLM",
        windowed="all",
    ),
    "Qwen2ForCausalLM": Family(
        qkv_bias=True, reads_attention_bias=False, windowed="upper", window=4096, switches_window=True
    ),
    "Qwen3ForCausalLM": Family(
        head_dim=128, qk_norm=True, windowed="upper", window=4096, switches_window=True
    ),
}


def family_of(architecture: Architecture) -> Family:
    return _FAMILIES[architecture]
