"""Write a model folder of a well-known shape with random weights, to measure and test with.

    python -m tools.random_model SHAPE DIR [--dtype bfloat16] [--seed 0]

The folder is complete (config, tokenizer with a chat template, safetensors): other engines load it as well.
Weights are drawn tensor by tensor and written shard by shard: memory holds one shard at most.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.models.checkpoint import Shape
from engine.models.config import ModelConfig
from engine.models.weights import expected_tensors

_COMMON = {"hidden_act": "silu", "max_position_embeddings": 32768, "initializer_range": 0.02}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-160m": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": _COMMON
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
}
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_SHARD_BYTES = 1 << 30
_SPREAD = 0.02  # standard deviation of every weight but the norms', as at the start of training

_MERGES = [("Ġ", "t"), ("h", "e"), ("i", "n"), ("Ġ", "a"), ("Ġt", "he"), ("in", "g"), ("r", "e"), ("o", "n")]
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_random_model(
    folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> None:
    """A folder for `config`, the content of a config.json; its vocabulary has at least 300 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    end_ids = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "chat_template": _CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
        },
    )
    stored = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", {**config, "eos_token_id": end_ids[0], "torch_dtype": stored})
    _write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": end_ids})
    _write_weights(folder, ModelConfig.from_dir(folder), dtype, seed)


def _write_weights(folder: Path, config: ModelConfig, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors, norm = expected_tensors(config), 1.0 - config.norm_offset
    shards = _shards(tensors, dtype.itemsize)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        drawn = {name: _draw(name, tensors[name], norm, dtype, generator) for name in names}
        save_file(drawn, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _shards(tensors: dict[str, Shape], itemsize: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in tensors.items():
        size = torch.Size(shape).numel() * itemsize
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _draw(
    name: str, shape: Shape, norm: float, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    centre = norm if name.endswith("norm.weight") else 0.0
    return torch.empty(shape).normal_(centre, _SPREAD, generator=generator).to(dtype)


def _tokenizer() -> Tokenizer:
    """Byte-level BPE: 256 bytes, a handful of merges, three special tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in _MERGES)]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.random_model", description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    begin = time.perf_counter()
    write_random_model(chosen.folder, SHAPES[chosen.shape], _DTYPES[chosen.dtype], chosen.seed)
    print(f"wrote {chosen.shape} to {chosen.folder} in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
