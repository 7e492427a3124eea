"""What each architecture means where its config.json is silent, and where it speaks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelFolderError
from engine.models.config import ModelConfig
from engine.models.layer_attention import LayerAttention, Rope
from engine.models.rope_scaling import LinearScaling
from tests.models.config_files import SIZES, heads_of, read


def test_families_differ_in_biases_norms_and_head_size(tmp_path: Path) -> None:
    llama = read(tmp_path, {})
    qwen2 = replace(llama, architecture="Qwen2ForCausalLM", qkv_bias=True)
    qwen3 = replace(llama, architecture="Qwen3ForCausalLM", qk_norm=True, **heads_of(128))
    assert read(tmp_path, {}, "Qwen2ForCausalLM") == qwen2
    assert read(tmp_path, {}, "Qwen3ForCausalLM") == qwen3
    phi3 = replace(llama, architecture="Phi3ForCausalLM", fused_weights=True, norm_eps=1e-5)
    assert read(tmp_path, {}, "Phi3ForCausalLM") == phi3
    assert read(tmp_path, {"attention_bias": True}, "Phi3ForCausalLM") == phi3, "as transformers does"
    assert read(tmp_path, {"attention_bias": True}) == replace(llama, qkv_bias=True, attention_out_bias=True)
    assert read(tmp_path, {"mlp_bias": True, "head_dim": 32}) == replace(llama, mlp_bias=True, **heads_of(32))
    shared = read(tmp_path, {"num_key_value_heads": 2, "tie_word_embeddings": True})
    assert shared == replace(llama, num_kv_heads=2, tied_embeddings=True)


def test_gemmas_are_read_with_their_makers_defaults(tmp_path: Path) -> None:
    sizes = {"max_position_embeddings": 8192, "num_hidden_layers": 6, "hidden_act": "gelu_pytorch_tanh"}
    gemma2 = read(tmp_path, sizes, "Gemma2ForCausalLM")
    local, everywhere = LayerAttention(4096, Rope(1e4)), LayerAttention(None, Rope(1e4))
    assert gemma2 == replace(
        read(tmp_path, {"max_position_embeddings": 8192}),
        architecture="Gemma2ForCausalLM",
        layers=(local, everywhere) * 3,
        head_dim=256,
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        embedding_scale=8.0,
        attention_scale=1 / 16,
        attention_softcap=50.0,
        logit_softcap=30.0,
        post_norms=True,
        tied_embeddings=True,
    )
    assert read(tmp_path, sizes, "Gemma3ForCausalLM") == replace(
        gemma2,
        architecture="Gemma3ForCausalLM",
        layers=(local,) * 5 + (LayerAttention(None, Rope(1e6)),),
        attention_softcap=None,
        logit_softcap=None,
        qk_norm=True,
    )
    own = {"query_pre_attn_scalar": 144, "attn_logit_softcapping": 20, "final_logit_softcapping": 10.0}
    own_scale = {"attention_scale": 1 / 12, "attention_softcap": 20.0, "logit_softcap": 10.0}
    assert read(tmp_path, sizes | own, "Gemma2ForCausalLM") == replace(gemma2, **own_scale)


def test_a_null_takes_away_the_soft_cap_that_gemma_2_has_by_default(tmp_path: Path) -> None:
    text = json.dumps({"architectures": ["Gemma2ForCausalLM"], **SIZES})
    (tmp_path / "config.json").write_text(text[:-1] + ', "attn_logit_softcapping": null}')
    config = ModelConfig.from_dir(tmp_path)
    assert (config.attention_softcap, config.logit_softcap) == (None, 30.0)


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": {"type": "linear", "factor": 8}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            }
        },
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_gemma_3_has_a_rope_for_windows_and_one_for_the_rest(tmp_path: Path, written: dict[str, Any]) -> None:
    windows = {"sliding_window": 100, "sliding_window_pattern": 2}
    first, second = read(tmp_path, windows | written, "Gemma3ForCausalLM").layers
    assert first == LayerAttention(100, Rope(5e3))
    assert second == LayerAttention(None, Rope(5e5, LinearScaling(8.0)))


def test_smollm3_rotates_in_all_layers_but_those_listed_or_each_fourth(tmp_path: Path) -> None:
    name, four = "SmolLM3ForCausalLM", {"num_hidden_layers": 4}
    rotated, not_rotated = LayerAttention(None, Rope(2e6)), LayerAttention(None, None)
    plain = read(tmp_path, four, name)
    assert plain.layers == (rotated, rotated, rotated, not_rotated) and plain.tied_embeddings
    assert read(tmp_path, {"no_rope_layer_interval": 2}, name).layers == (rotated, not_rotated)
    assert read(tmp_path, {"no_rope_layers": [0, 1, 1]}, name).layers == (not_rotated, rotated)
    windows = {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 100}
    assert read(tmp_path, windows, name).layers == (LayerAttention(100, None), rotated)


def test_opt_is_read_under_its_own_keys(tmp_path: Path) -> None:
    sizes = {
        "intermediate_size": None,
        "ffn_dim": 96,
        "word_embed_proj_dim": 48,
        "activation_function": "relu",
    }
    llama, plain = read(tmp_path, {}), read(tmp_path, sizes, "OPTForCausalLM")
    assert plain == replace(
        llama,
        architecture="OPTForCausalLM",
        embedding_size=48,
        ffn_size=96,
        layers=(LayerAttention(None, None),) * 2,
        activation="relu",
        norm_eps=1e-5,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
    )
    switches = {"enable_bias": False, "do_layer_norm_before": False, "tie_word_embeddings": False}
    without = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False, "norm_first": False}
    expected = replace(plain, **without, tied_embeddings=False)
    assert read(tmp_path, sizes | switches, "OPTForCausalLM") == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "gelu"},
        {"layer_norm_elementwise_affine": False},
        {"_remove_final_layer_norm": True},
    ],
)
def test_an_opt_other_than_the_published_is_refused_by_field_and_value(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    ((key, value),) = changes.items()
    with pytest.raises(ModelFolderError, match=rf"config.json: {key}( is)? {value}"):
        read(tmp_path, {"ffn_dim": 96, **changes}, "OPTForCausalLM")


def test_code_that_transformers_has_taken_over_since_is_not_needed(tmp_path: Path) -> None:
    plain, name = read(tmp_path, {}, "Phi3ForCausalLM"), "modeling_phi3.Phi3ForCausalLM"
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": name}
    assert read(tmp_path, {"auto_map": code}, "Phi3ForCausalLM") == plain
    for architecture, other in (
        ("Phi3ForCausalLM", "modeling_x.Phi3ForCausalLM"),
        ("LlamaForCausalLM", name),
    ):
        with pytest.raises(ModelFolderError, match="has auto_map: the model needs its makers' code"):
            read(tmp_path, {"auto_map": {**code, "AutoModelForCausalLM": other}}, architecture)
