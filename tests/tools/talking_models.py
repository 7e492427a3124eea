"""Models that say what a test wants: the next token follows from the last one alone, by a table."""

import json
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from tools.random_model import write_random_model

WIDTH = 320  # hidden size: one dimension per token, so that a token's embedding names it
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": WIDTH,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
REPLY = "Miso."  # no letter twice: each says which one follows
THOUGHT = "<think>Hu?</think>"
_FORGETS_THOUGHTS = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{# the model begins with <think> #}{% endif %}"
)


def write_talking_model(folder: Path, max_positions: int = 2048) -> Path:
    """Answers everything with REPLY."""
    return _write(folder, ["\n", *REPLY, "<|im_end|>"], max_positions)


def write_endless_model(folder: Path, max_positions: int = 30_000) -> Path:
    """Answers everything with 'abababab' until it is stopped."""
    return _write(folder, ["\n", "a", "b", "a"], max_positions)


def write_thinking_model(folder: Path, max_positions: int = 2048) -> Path:
    """Answers everything with THOUGHT and REPLY; its template leaves thoughts out of the past."""
    _write(folder, [], max_positions)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": _FORGETS_THOUGHTS}))
    return _teach(folder, ["\n", "<think>", *"Hu?", "</think>", *REPLY, "<|im_end|>"])


def _write(folder: Path, chain: list[str], max_positions: int) -> Path:
    write_random_model(folder, {**CONFIG, "max_position_embeddings": max_positions}, torch.float32)
    return _teach(folder, chain)


def _teach(folder: Path, chain: list[str]) -> Path:
    """Each token of `chain` is followed by the next."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[0] for text in chain]
    weights = {
        name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()
    }
    for name in weights:
        if "norm" in name:
            weights[name].fill_(1.0)
    weights["model.embed_tokens.weight"] = torch.eye(WIDTH)
    for last, following in pairwise(ids):
        weights["lm_head.weight"][following, last] = 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
