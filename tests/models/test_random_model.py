"""The folders of random weights that benchmarks run on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.models import load_model
from engine.models.config import ModelConfig
from tests.models.harness import PagedHarness, Run
from tools import random_model
from tools.random_model import SHAPES, main, write_random_model

SMALL = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}


def small(shape: str) -> dict[str, Any]:
    return {**SHAPES[shape], **SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_loads_here_and_in_transformers_as_the_same_model(shape: str, tmp_path: Path) -> None:
    write_random_model(tmp_path, small(shape), torch.float32)
    ids = [5, 300, 7, 255]
    ours = PagedHarness(load_model(tmp_path, torch.float32)).step(Run(0, 0, ids))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([ids])).logits[:, -1]
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_tokenizer_gives_any_text_back_and_renders_a_chat(tmp_path: Path) -> None:
    write_random_model(tmp_path, small("llama-160m"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "The other thing, in Zürich: 🙂\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()), "some merges apply"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token_id in ModelConfig.from_dir(tmp_path).eos_ids


def test_shards_are_written_where_one_file_would_grow_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_model(tmp_path / "one", small("llama-160m"))
    monkeypatch.setattr(random_model, "_SHARD_BYTES", 100_000)
    write_random_model(tmp_path / "many", small("llama-160m"))
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    run = Run(0, 0, [1, 2, 3])
    logits = [PagedHarness(load_model(tmp_path / name, torch.bfloat16)).step(run) for name in ("one", "many")]
    assert torch.equal(*logits)


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    drawn = {}
    for name, seed in [("first", 1), ("again", 1), ("other", 2)]:
        write_random_model(tmp_path / name, small("qwen2.5-0.5b"), seed=seed)
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as file:
            drawn[name] = file.get_tensor("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(drawn["first"], drawn["again"])
    assert not torch.equal(drawn["first"], drawn["other"])


def test_the_command_writes_the_shape_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "llama-160m", small("llama-160m"))
    assert main(["llama-160m", str(tmp_path), "--dtype", "float32"]) == 0
    assert f"wrote llama-160m to {tmp_path} in " in capsys.readouterr().err
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.float32
