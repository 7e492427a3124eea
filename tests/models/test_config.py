"""config.json and generation_config.json: what is read from them, and how what cannot work is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelFolderError
from engine.models.config import ModelConfig
from engine.models.layer_attention import LayerAttention, Rope
from engine.types import SamplingParams
from tests.models.config_files import FULL, LLAMA3, WINDOWED, read


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
            "use_sliding_window is True; expected false: all layers of this architecture see everything",
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
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": [FULL, WINDOWED], "sliding_window": 100},
            "names sliding_attention, but sliding_window is 100 and use_sliding_window is None: nothing says",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 0},
            "sliding_window is 0; expected an integer, 1 or",
        ),
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
        (
            {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]},
            "no_rope_layers is [1]; expected a list of a 1 (rotated) or a 0 (not rotated) for each layer",
        ),
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
