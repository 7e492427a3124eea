"""Plays conversations with a model folder through transformers: a yardstick independent of our engine."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS = 96


class Player:
    """One conversation at a time, greedy, in float32; the KV cache is kept from turn to turn."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.margins: list[float] = []  # of every generated token: best logit less second best
        self.open()

    def open(self, system: str | None = None) -> None:
        """Starts a fresh conversation, perhaps with a system prompt."""
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._cache = None
        self._num_cached = 0

    @torch.inference_mode()
    def say(self, text: str) -> str:
        """The model's reply to `text`."""
        self._messages.append({"role": "user", "content": text})
        prompt = self.tokenizer.apply_chat_template(
            self._messages, add_generation_prompt=True, tokenize=False
        )
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        reply: list[int] = []
        while len(reply) < MAX_NEW_TOKENS:
            new_ids = torch.tensor([(ids + reply)[self._num_cached :]])
            output = self.model(new_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = output.past_key_values
            self._num_cached += new_ids.shape[1]
            logits, best = output.logits[0, -1].topk(2)
            self.margins.append((logits[0] - logits[1]).item())
            if best[0] == self.tokenizer.eos_token_id:
                break
            reply.append(int(best[0]))
        self._messages.append({"role": "assistant", "content": self.tokenizer.decode(reply)})
        return self._messages[-1]["content"]
