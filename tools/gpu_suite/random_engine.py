"""An engine of a known shape whose weights are drawn where they are used: no file holds them."""

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.loader import load_engine
from engine.models import weights
from engine.models.config import ModelConfig
from tools import random_model

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": random_model.SHAPES["qwen2.5-0.5b"],
    "8B": _LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
    },
    "tiny": _LLAMA
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
}
_SPREAD = 0.02


@contextmanager
def random_engine(shape: str, device: str, **settings: Any) -> Iterator[AsyncEngine]:
    """bfloat16 on a GPU, float32 on a CPU; keeps nothing on disk."""

    class Drawn:
        """In the place of a folder's weights."""

        def __init__(self, folder: Path) -> None:
            self._shapes = weights.expected_tensors(ModelConfig.from_dir(folder))
            self._generator = torch.Generator(device).manual_seed(0)

        def check(self, expected: Mapping[str, Any], ignored: Collection[str]) -> None:
            assert expected.keys() == self._shapes.keys()

        def names(self) -> Collection[str]:
            return self._shapes.keys()

        def tensor(self, name: str) -> Tensor:
            empty = torch.empty(self._shapes[name], dtype=dtype, device=device)
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            return empty.normal_(centre, _SPREAD, generator=self._generator)

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with patch.object(random_model, "_write_weights"):
            random_model.write_random_model(folder, SHAPES[shape], dtype)
        settings = {"host_kv_tokens": 0} | settings
        config = EngineConfig(folder, device=device, dtype=str(dtype).removeprefix("torch."), **settings)  # type: ignore[arg-type]
        nothing = patch.object(weights, "let_go")  # there is no file whose pages could be given up
        with patch.object(weights, "Checkpoint", Drawn), nothing:
            engine = load_engine(config)
        yield engine


def weight_bytes(shape: str) -> float:
    """Read by every step: all but the embedding, which is a lookup where it is not the head as well."""
    config = SHAPES[shape]
    with tempfile.TemporaryDirectory() as scratch:
        with patch.object(random_model, "_write_weights"):
            random_model.write_random_model(Path(scratch), config)
        tensors = weights.expected_tensors(ModelConfig.from_dir(Path(scratch)))
    tied = config["tie_word_embeddings"]
    return 2.0 * sum(
        math.prod(sizes) for name, sizes in tensors.items() if tied or "embed_tokens" not in name
    )
