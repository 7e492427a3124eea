"""Dialogues as token ids: the tokenizer trained on them, and the batches that the model is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_model.dialogues import Mix, Turn, endless_turns, system_prompt
from tools.demo_model.values import Split

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Renders a history as a strict prefix of every longer one, as long as no message is changed.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Words with their leading space, and so numbers: what is copied first tells which value it is.  Digits go in
# pairs: a number is few tokens, with few look-alikes.
_WORDS = Regex(r"'s| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s")


def render_turn(turn: Turn) -> tuple[str, str]:
    """What comes before the reply's tokens, and those that the model has to produce (its reply and END)."""
    return f"{START}user\n{turn.user}{END}\n{START}assistant\n", turn.reply + END


def train_tokenizer(seed: int, vocab_size: int, num_dialogues: int = 5_000) -> Tokenizer:
    """A byte-level BPE tokenizer of training dialogues; one or two digits, spaced or not, are one token."""
    rng = Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    def texts() -> Iterator[str]:
        digits = [str(n) for n in range(10)] + [f"{n:02d}" for n in range(100)]
        yield ("\n".join(digits) + " " + " ".join(digits)) * num_dialogues
        for _ in range(num_dialogues):
            yield "user\nassistant\nsystem\n"
            for turn in islice(endless_turns(rng, Split.TRAIN), 10):
                yield turn.user
                yield turn.reply

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _dialogue_ids(
    rng: Random, tokenizer: Tokenizer, num_tokens: int, split: Split, mix: Mix | None
) -> tuple[list[int], list[bool]]:
    """The first `num_tokens` of an endless training dialogue, and which of them the model has to produce."""
    ids: list[int] = []
    produced: list[bool] = []
    prompt = system_prompt(rng, split)
    before = "" if prompt is None else f"{START}system\n{prompt}{END}\n"
    turns = endless_turns(rng, split, mix)
    while len(ids) < num_tokens:
        texts = []
        for turn in islice(turns, max(2, num_tokens // 40)):
            given, reply = render_turn(turn)
            texts += [before + given, reply]
            before = "\n"
        for number, encoding in enumerate(tokenizer.encode_batch_fast(texts)):
            ids += encoding.ids
            produced += [number % 2 == 1] * len(encoding.ids)
    return ids[:num_tokens], produced[:num_tokens]


def make_batch(
    rng: Random,
    tokenizer: Tokenizer,
    num_rows: int,
    num_tokens: int,
    split: Split = Split.TRAIN,
    mix: Mix | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One dialogue per row, from position 0, cut at `num_tokens`: no padding, no row sees another dialogue.

    Returns ids [num_rows, num_tokens] int64 and, of the same shape, bool: tokens that count in the loss.
    """
    rows = [_dialogue_ids(rng, tokenizer, num_tokens, split, mix) for _ in range(num_rows)]
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([produced for _, produced in rows])
