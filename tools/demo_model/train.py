"""Trains the demo model and writes it as a Hugging Face folder: python -m tools.demo_model.train --out DIR.

Seeded and meant for a CPU: bf16 matmuls, and dialogues that grow from short to the full context.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from tools.demo_model.corpus import CHAT_TEMPLATE, END, PAD, START, make_batch, train_tokenizer
from tools.demo_model.values import Split

CONTEXT = 2048
VOCAB = 2048


@dataclass(frozen=True)
class Stage:
    """A part of training: so many steps, on batches of these shapes in turn."""

    num_steps: int
    batches: tuple[tuple[int, int], ...]  # (dialogues, tokens of each)


# Copying is learned soon from short dialogues and hardly from long ones; then the reach is extended.
STAGES = (
    Stage(1500, ((8, 256),)),
    Stage(800, ((8, 256), (6, 512))),
    Stage(800, ((6, 512), (8, 256), (6, 512), (2, 2048))),
)


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """An untrained model of the demo's shape, float32."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def produced_logits(
    model: LlamaForCausalLM, backbone, ids: Tensor, produced: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [N, V] fp32 before each of the N tokens that count, and those tokens [N] int64."""
    keep = produced[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[keep])
    return logits.float(), ids[:, 1:][keep]


@torch.no_grad()
def token_accuracy(
    model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int, split: Split, length: int
) -> float:
    """Share of reply tokens that are the likeliest ones after the right history, in one batch."""
    ids, produced = make_batch(Random(seed), tokenizer, 4096 // length, length, split)
    logits, wanted = produced_logits(model, model.model, ids, produced)
    return (logits.argmax(-1) == wanted).float().mean().item()


def train(tokenizer: Tokenizer, seed: int, lr: float, out: Path) -> LlamaForCausalLM:
    """Trains through all STAGES; reports to stderr and writes the model so far into `out` now and then."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    rng = Random(seed)
    model = new_model(tokenizer)
    compiled = torch.compile(model.model, dynamic=False)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = (
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    )
    schedule = [stage for stage in STAGES for _ in range(stage.num_steps)]
    started = time.monotonic()
    running = math.log(VOCAB)
    for step, stage in enumerate(schedule):
        # Warm up, hold, and fall linearly to zero over the last two fifths.
        factor = min(1.0, (step + 1) / 50, (len(schedule) - step) / (0.4 * len(schedule)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        ids, produced = make_batch(rng, tokenizer, *stage.batches[step % len(stage.batches)])
        loss = cross_entropy(*produced_logits(model, compiled, ids, produced))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running += 0.05 * (loss.item() - running)
        if (step + 1) % 100 == 0:
            accuracies = {
                f"{split.value} {length}": round(token_accuracy(model, tokenizer, step, split, length), 4)
                for split, length in ((Split.TRAIN, 256), (Split.HELD_OUT, 256), (Split.HELD_OUT, 2048))
            }
            print(
                f"{time.monotonic() - started:5.0f} s step {step + 1} loss {running:.4f} {accuracies}",
                file=sys.stderr,
                flush=True,
            )
        if (step + 1) % 300 == 0:
            write_folder(model, tokenizer, out)
    return model


def write_folder(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes a Hugging Face folder with the weights in bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    about_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(about_tokenizer, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.seed, VOCAB)
    model = train(tokenizer, arguments.seed, arguments.lr, arguments.out)
    write_folder(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
