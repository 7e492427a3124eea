"""Model folders that hold nothing but a small config.json, for tests of how it is read."""

import json
from pathlib import Path
from typing import Any

from engine.models.config import ModelConfig
from engine.models.layer_attention import Rope

FULL, WINDOWED = "full_attention", "sliding_attention"
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
