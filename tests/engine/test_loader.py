"""An engine as its settings ask for it, over a tiny random model."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelFolderError
from engine.loader import load_engine
from tools.random_model import write_random_model

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = tmp_path_factory.mktemp("models") / "3f2a"
    write_random_model(folder, TINY)
    return EngineConfig(folder, dtype="float32", device_kv_tokens=256)


@pytest.mark.parametrize(("name", "shown"), [(None, "3f2a"), ("org/tiny", "org/tiny")])
async def test_a_model_goes_by_its_name_or_else_its_folders(
    config: EngineConfig, name: str | None, shown: str
) -> None:
    async with load_engine(replace(config, name=name)) as engine:
        assert engine.model_info().name == shown
        assert f" | {shown} (Llama, 2 layers, context 224)" in engine.description[0]


def test_a_cache_that_cannot_be_is_refused_with_what_would_fit(config: EngineConfig) -> None:
    for tokens, complaint in (
        (63, r"the KV cache would hold 63 tokens; give it at least 64 \(two blocks\)"),
        (1 << 40, r"takes .* GiB and .* GiB are free; --device-kv-tokens \d+ would fit"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            load_engine(replace(config, device_kv_tokens=tokens))


def test_an_engine_that_was_refused_lets_go_of_its_data_dir(config: EngineConfig, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError):
            load_engine(replace(config, device_kv_tokens=63, data_dir=tmp_path / "state"))


def test_a_folder_that_is_no_model_says_what_it_lacks(config: EngineConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="has no config.json"):
        load_engine(replace(config, model=tmp_path))
