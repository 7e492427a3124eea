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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.logging import disable_progress_bar

from tools.demo_model.corpus import CHAT_TEMPLATE, END, PAD, START, make_batch, train_tokenizer
from tools.demo_model.dialogues import Mix
from tools.demo_model.values import Split

CONTEXT = 2048
VOCAB = 2048
RATE = 2e-3
Backbone = Callable[..., BaseModelOutputWithPast]


@dataclass(frozen=True)
class Stage:
    """A part of training: so many steps, on batches of these shapes in turn."""

    num_steps: int
    batches: tuple[tuple[int, int], ...]  # (dialogues, tokens of each)
    mix: Mix | None = None  # of the dialogues; None: each dialogue has its own


# Copying comes first and is learned from echoes, then what to copy, then from how far.
STAGES = (
    Stage(600, ((8, 256),), Mix(echo=12, arithmetic=4)),
    Stage(2000, ((8, 256),), Mix(tell=4, ask=5, ask_unknown=2, change=1.2, digress=1, story=0.1)),
    Stage(3500, ((16, 256), (8, 512))),
    Stage(3500, ((8, 512), (4, 1024), (16, 256), (2, 2048))),
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
    model: LlamaForCausalLM, backbone: Backbone, ids: Tensor, produced: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [N, V] fp32 before each of the N tokens that count, and those tokens [N] int64.

    `backbone` is `model.model`, as it is or compiled.
    """
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


def make_optimizers(model: LlamaForCausalLM, rate: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms, at one rate for both."""
    layers = list(model.model.layers.parameters())
    matrices = [weight for weight in layers if weight.ndim == 2]
    others = [weight for weight in layers if weight.ndim == 1]
    others += [*model.model.embed_tokens.parameters(), *model.model.norm.parameters()]
    return (
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    )


def rate_factor(step: int, num_steps: int) -> float:
    """Warms up, holds, and falls linearly to zero over the last three fifths."""
    return min(1.0, (step + 1) / 50, (num_steps - step) / (0.6 * num_steps))


def train(tokenizer: Tokenizer, seed: int, rate: float, out: Path) -> LlamaForCausalLM:
    """Trains through all STAGES; reports to stderr and writes what there is into `out` on the way."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    rng = Random(seed)
    model = new_model(tokenizer)
    compiled = torch.compile(model.model, dynamic=False)
    optimizers = make_optimizers(model, rate)
    schedule = [stage for stage in STAGES for _ in range(stage.num_steps)]
    started = time.monotonic()
    smooth_loss = math.log(VOCAB)
    for step, stage in enumerate(schedule):
        num_rows, length = stage.batches[step % len(stage.batches)]
        ids, produced = make_batch(rng, tokenizer, num_rows, length, Split.TRAIN, stage.mix)
        loss = cross_entropy(*produced_logits(model, compiled, ids, produced))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(step, len(schedule))
            optimizer.step()
            optimizer.zero_grad()
        smooth_loss += 0.05 * (loss.item() - smooth_loss)
        if (step + 1) % 200 == 0:
            shares = [token_accuracy(model, tokenizer, step, Split.HELD_OUT, n) for n in (256, CONTEXT)]
            elapsed_s = time.monotonic() - started
            print(
                f"{elapsed_s:5.0f} s, step {step + 1} of {len(schedule)}, loss {smooth_loss:.4f}",
                f"held-out tokens right: {shares[0]:.3f} of 256, {shares[1]:.3f} of {CONTEXT}",
                file=sys.stderr,
                flush=True,
            )
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
    """Trains tokenizer and model, and writes the folder."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="where the Hugging Face folder goes")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    disable_progress_bar()
    tokenizer = train_tokenizer(arguments.seed, VOCAB)
    model = train(tokenizer, arguments.seed, RATE, arguments.out)
    write_folder(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
