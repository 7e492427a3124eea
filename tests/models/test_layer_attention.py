"""Windows and rotation of each layer, in every spelling that config.json has for them."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.models.config import ModelConfig
from engine.models.layer_attention import LayerAttention, Rope
from engine.models.rope_scaling import LinearScaling, Llama3Scaling, Scaling, YarnScaling
from tests.models.config_files import FULL, LLAMA3, SIZES, WINDOWED, read, ropes, windows

QWEN2, MISTRAL = "Qwen2ForCausalLM", "MistralForCausalLM"


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
