"""config.json and generation_config.json: what is read from them, and how what cannot work is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelFolderError
from engine.models.config import ModelConfig
from engine.models.layer_attention import LayerAttention, Rope
from engine.models.rope_scaling import LinearScaling, Llama3Scaling, Scaling, YarnScaling
from engine.types import SamplingParams

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(
    folder: Path, changes: dict[str, Any], architecture: str = "LlamaForCausalLM", **generation: Any
) -> ModelConfig:
    """The config of a folder whose config.json is `SIZES` with changes; None takes the key away."""
    content = {"architectures": [architecture], **SIZES, **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_dir(folder)


def heads_of(size: int) -> dict[str, Any]:
    return {"head_dim": size, "attention_scale": size**-0.5}


def ropes(config: ModelConfig) -> list[Rope | None]:
    return [layer.rope for layer in config.layers]


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def test_what_a_plain_llama_leaves_out_has_its_makers_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, {}) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=320,
        embedding_size=64,
        hidden_size=64,
        ffn_size=176,
        layers=(LayerAttention(None, Rope(10000.0)),) * 2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        activation="silu",
        norm_eps=1e-6,
        norm_offset=0.0,
        max_positions=512,
        embedding_scale=1.0,
        attention_scale=0.25,
        attention_softcap=None,
        logit_softcap=None,
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        post_norms=False,
        norm_first=True,
        fused_weights=False,
        tied_embeddings=False,
        eos_ids=frozenset(),
        sampling=SamplingParams(),
    )


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


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    ],
    ids=["rope_scaling", "rope_scaling with its older key", "rope_parameters"],
)
def test_scaled_rope_is_read_in_each_of_its_spellings(tmp_path: Path, written: dict[str, Any]) -> None:
    assert ropes(read(tmp_path, written)) == [Rope(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 64))] * 2


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


def test_plain_rope_is_read_in_both_of_its_spellings(tmp_path: Path) -> None:
    named = read(tmp_path, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert named == read(tmp_path, {"rope_theta": 1e6, "rope_scaling": None})
    assert ropes(named) == [Rope(1e6)] * 2


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "linear", "factor": 4}, LinearScaling(4.0)),
        ({"rope_type": "dynamic", "factor": 4.0}, None),
        ({"rope_type": "yarn", "factor": 1.0}, YarnScaling(1.0, 512, 32.0, 1.0, True, 1.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.5},
            YarnScaling(4.0, 128, 32.0, 1.0, True, 1.5),
        ),
        (
            {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, "truncate": False}
            | {"mscale": 0.5, "mscale_all_dim": 0.5},
            YarnScaling(8.0, 512, 16.0, 2.0, False, 1.0),
        ),
    ],
    ids=["linear", "dynamic", "yarn, nothing more", "yarn, growth given", "yarn, everything else given"],
)
def test_every_scaling_of_rope_is_read_with_its_defaults(
    tmp_path: Path, scaling: dict[str, Any], expected: Scaling | None
) -> None:
    assert ropes(read(tmp_path, {"rope_scaling": scaling})) == [Rope(10000.0, expected)] * 2
    assert ropes(read(tmp_path, {"rope_parameters": scaling})) == [Rope(10000.0, expected)] * 2


def test_a_rope_for_each_type_of_layer_goes_to_the_layers_of_that_type(tmp_path: Path) -> None:
    typed = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    }
    types = ["sliding_attention", "full_attention"]
    changes = {
        "rope_parameters": typed,
        "layer_types": types,
        "use_sliding_window": True,
        "sliding_window": 9,
    }
    windowed, full = read(tmp_path, changes, "Qwen3ForCausalLM").layers
    assert windowed == LayerAttention(9, Rope(5e3))
    assert full == LayerAttention(None, Rope(1e6, LinearScaling(8.0)))


def test_every_end_token_of_both_files_ends_a_reply(tmp_path: Path) -> None:
    assert read(tmp_path, {"eos_token_id": 2}).eos_ids == {2}
    assert read(tmp_path, {"eos_token_id": 2}, eos_token_id=[1, 5]).eos_ids == {1, 2, 5}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"do_sample": False, "temperature": 0.7}, SamplingParams(temperature=0.0)),
        ({"do_sample": True}, SamplingParams(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
            SamplingParams(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1),
        ),
        ({"transformers_version": "5.0.0"}, SamplingParams()),
    ],
    ids=["greedy", "sampled, nothing more", "everything", "nothing said"],
)
def test_sampling_defaults_are_the_makers(
    tmp_path: Path, generation: dict[str, Any], expected: SamplingParams
) -> None:
    assert read(tmp_path, {}, **generation).sampling == expected


QWEN2, MISTRAL = "Qwen2ForCausalLM", "MistralForCausalLM"
FULL, WINDOWED = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        (MISTRAL, {"sliding_window": 100}, [100, 100]),
        (MISTRAL, {"max_position_embeddings": 8192}, [4096, 4096]),
        (MISTRAL, {"layer_types": [WINDOWED] * 2, "sliding_window": 100}, [100, 100]),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}, [None, 100]),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0}, [100, 100]),
        (
            QWEN2,
            {"use_sliding_window": True, "sliding_window": 100, "layer_types": [WINDOWED, FULL]},
            [100, None],
        ),
    ],
)
def test_windows_are_those_of_transformers(
    tmp_path: Path, architecture: str, changes: dict[str, Any], expected: list[int | None]
) -> None:
    assert windows(read(tmp_path, changes, architecture)) == expected


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        (QWEN2, {"use_sliding_window": False, "sliding_window": 100, "max_window_layers": 1}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 100}),
        (QWEN2, {"sliding_window": 100, "layer_types": [FULL, FULL]}),
        (MISTRAL, {"sliding_window": 512}),
        ("LlamaForCausalLM", {"sliding_window": 100, "use_sliding_window": False, "layer_types": [FULL] * 2}),
    ],
)
def test_a_window_that_hides_nothing_is_none(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    assert windows(read(tmp_path, changes, architecture)) == [None, None]


def test_a_null_takes_away_the_window_that_mistral_has_by_default(tmp_path: Path) -> None:
    text = json.dumps({"architectures": [MISTRAL], **SIZES, "max_position_embeddings": 8192})
    (tmp_path / "config.json").write_text(text[:-1] + ', "sliding_window": null}')
    assert windows(ModelConfig.from_dir(tmp_path)) == [None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "architecture MixtralForCausalLM is not supported; supported are Gemma2ForCausalLM, Gemma3",
        ),
        ({"architectures": None}, "architectures is None; expected a list of one name"),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}},
            "has auto_map: the model needs its makers' code, which is never run here",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "has quantization_config; quantized weights are not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported; only silu is"),
        (
            {"architectures": ["Gemma3ForCausalLM"], "hidden_activation": "gelu"},
            "hidden_activation gelu is not supported; only gelu_pytorch_tanh is",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention is True; expected false: the other is not supported",
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": 0},
            "final_logit_softcapping is 0; expected a positive number",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 100},
            "use_sliding_window is True; expected false: layers of this architecture attend to everything",
        ),
        (
            {"layer_types": [FULL, WINDOWED]},
            "layer_types is ['full_attention', 'sliding_attention']; expected 2 times full_attention: this",
        ),
        ({"layer_types": [FULL]}, "layer_types is ['full_attention']; expected 2 times full_attention or"),
        (
            {"layer_types": [FULL, "chunked_attention"]},
            "expected 2 times full_attention or sliding_attention",
        ),
        (
            {"architectures": [QWEN2], "layer_types": [FULL, WINDOWED], "sliding_window": 100},
            "names sliding_attention, but sliding_window is 100 and use_sliding_window is None: nothing says",
        ),
        ({"architectures": [MISTRAL], "sliding_window": 0}, "sliding_window is 0; expected an integer, 1 or"),
        (
            {"rope_scaling": {"rope_type": "proportional"}},
            "RoPE type 'proportional' is not supported; supported are default, linear, dynamic, llama3 and",
        ),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
            "RoPE type 'su' with short_factor and long_factor is unsupported: all angles, those of cached",
        ),
        ({"rope_scaling": {"type": "linear"}}, "config.json lacks factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor is '2'; expected a positive number"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 2, "beta_slow": 4}},
            "beta_slow is 4; expected at most beta_fast, 2",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "config.json lacks low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor is 4.0; expected less than high_freq_factor, 4",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; expected 1.0"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected an integer, 1 or more"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; expected an integer, 1 or more"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06; expected a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or false"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; expected an object"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id or a list of token ids"),
        ({"eos_token_id": [2, 320]}, "eos_token_id 320 is outside the vocabulary of 320"),
        (
            {"num_key_value_heads": 3},
            "4 query heads (num_attention_heads) cannot share 3 KV heads (num_key_value_heads) evenly",
        ),
        ({"head_dim": 15}, "head_dim 15 is odd; RoPE rotates pairs"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFolderError) as refused:
        read(tmp_path, changes)
    assert str(tmp_path) in str(refused.value)
    assert message in str(refused.value)


def test_impossible_sampling_defaults_name_their_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"generation_config.json: top_p is 1.5; it must be"):
        read(tmp_path, {}, do_sample=True, top_p=1.5)
    with pytest.raises(ModelFolderError, match=r"generation_config.json: .*str"):
        read(tmp_path, {}, do_sample=True, temperature="hot")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"nowhere is not a folder; expected a model folder in"):
        ModelConfig.from_dir(tmp_path / "nowhere")
    with pytest.raises(
        ModelFolderError, match=r"has no config\.json; a model folder in Hugging Face format holds"
    ):
        ModelConfig.from_dir(tmp_path)
    for content, message in [
        (b'{"vocab_size": ', "is not valid JSON: "),
        (b"\xff\xfe", "is not valid JSON: "),
        (b"[1]", "holds a list; a JSON object was expected"),
    ]:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelFolderError, match=message):
            ModelConfig.from_dir(tmp_path)


def test_reading_a_config_needs_no_torch() -> None:
    code = "import sys, engine.models, engine.models.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
