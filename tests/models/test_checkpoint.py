"""Weight files: whatever is absent, left over, misshapen or damaged is named before a weight is used."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ConfigError, ModelFolderError
from engine.models import load_model
from tests.models.harness import PagedHarness, Run
from tests.models.tiny_models import tiny_checkpoint

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama whose tensors lie in one file."""
    tiny_checkpoint("llama2", tmp_path, torch.float32)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def split_into_shards(folder: Path) -> None:
    """Three shards and their index in place of the one file."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {
        name: f"model-{index % 3 + 1:05}-of-00003.safetensors" for index, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def logits(folder: Path) -> Tensor:
    return PagedHarness(load_model(folder, torch.float32)).step(Run(0, 0, [1, 2, 3]))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelFolderError) as refused:
        load_model(folder, torch.float32)
    assert str(folder) in str(refused.value)
    return str(refused.value)


def test_shards_and_one_file_hold_the_same_model(folder: Path) -> None:
    expected = logits(folder)
    split_into_shards(folder)
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert torch.equal(logits(folder), expected)


def test_weights_convert_to_the_same_values_wherever_it_is_done(tmp_path: Path) -> None:
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    for folder in (wide, narrow):
        tiny_checkpoint("qwen2", folder, torch.float32 if folder is wide else torch.bfloat16)
    assert load_file(wide / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    by_us, by_transformers = (
        PagedHarness(load_model(folder, torch.bfloat16)).step(Run(0, 0, [1, 2, 3]))
        for folder in (wide, narrow)
    )
    assert torch.equal(by_us, by_transformers)


def test_known_left_overs_of_older_tools_are_harmless(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = logits(folder)
    rewrite(
        folder,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    )
    assert torch.equal(logits(folder), expected)

    tied = tmp_path_factory.mktemp("tied")
    tiny_checkpoint("qwen2", tied, torch.float32)
    expected = logits(tied)
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(320, 96)}))
    assert torch.equal(logits(tied), expected)


def test_missing_tensors_are_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(DOWN))
    assert refusal(folder).endswith(f"lacks {DOWN}, which config.json calls for")


def test_of_many_missing_tensors_the_first_are_named_and_the_rest_counted(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    assert "lacks model.layers.3.self_attn.q_proj.weight, " in refusal(folder)
    assert "model.layers.3.mlp.gate_proj.weight and 4 more, which config.json calls for" in refusal(folder)


def test_left_over_tensors_are_named_with_their_file(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    expected = (
        "model.safetensors holds model.layers.0.self_attn.q_proj.bias, for which the model described by"
    )
    assert expected in refusal(folder)


def test_misshapen_tensors_are_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({DOWN: torch.zeros(64, 175)}))
    expected = f"model.safetensors: {DOWN} has shape [64, 175]; config.json calls for [64, 176]"
    assert refusal(folder).endswith(expected)


def test_weights_that_are_no_floats_are_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({DOWN: torch.zeros(64, 176, dtype=torch.int8)}))
    assert refusal(folder).endswith(f"{DOWN} is stored as I8; supported are F32, BF16, F16")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-100],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: struct.pack("<Q", 1 << 40) + content[8:],
        lambda content: content[:8] + b"\xff" * 100 + content[108:],
    ],
    ids=["data cut short", "header cut short", "empty", "header length wrong", "header garbled"],
)
def test_a_damaged_file_is_named_with_its_size(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(folder)
    assert f"model.safetensors ({path.stat().st_size} bytes) is damaged or incomplete: " in message
    assert message.endswith("; download it again")


def test_a_shard_that_the_index_names_but_nobody_has_is_named(folder: Path) -> None:
    split_into_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    expected = (
        "lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names; download it again"
    )
    assert refusal(folder).endswith(expected)


def test_one_tensor_in_two_shards_is_refused(folder: Path) -> None:
    split_into_shards(folder)
    first, second = (folder / f"model-{number:05}-of-00003.safetensors" for number in (1, 2))
    doubled = next(iter(load_file(first)))
    save_file({**load_file(second), doubled: torch.zeros(1)}, second)
    assert refusal(folder).endswith(f"{doubled} is in {first.name} and again in {second.name}")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "../elsewhere.safetensors"}},
            "names '../elsewhere.safetensors'; shards lie beside",
        ),
        ({"weight_map": {}}, "weight_map is {}; expected an object: tensor name -> file name"),
        ({}, "weight_map is None; expected an object: tensor name -> file name"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(
    folder: Path, index: dict[str, Any], message: str
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(folder)


def test_pickle_weights_are_refused_unread(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    message = refusal(folder)
    assert (
        "holds its weights as pytorch_model.bin, a pickle: loading one can run any code, so it is refused"
        in message
    )


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder).endswith(
        "has no weights: neither model.safetensors nor model.safetensors.index.json"
    )


def test_a_dtype_that_cannot_be_computed_in_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"torch.float16 is not supported on the CPU; use float32 or bfloat16"
    ):
        load_model(folder, torch.float16)
