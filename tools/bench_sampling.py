"""What choosing tokens costs: a decode step of many conversations, plain and with every sampling feature on.

    python -m tools.bench_sampling [--model DIR] [--rows 64] [--context 512] [--history 2000] [--seconds 10]
                                   [--threads 2]

The model runner computes one step after another on a random model of the llama-160m shape; the time between
logits and chosen tokens is taken inside each step, so that share and step come from the same run.  Kinds of
sampling alternate step by step.  Rows have a KV cache of `context` tokens; penalties look at histories of
`history` tokens, of which the last 200 are the reply, and each step appends the token that was chosen.  With
one thread times are CPU time, which other work on the machine disturbs least.

Random weights choose nearly at random, which is the worst case of top-p and min-p alone: they keep most of
the vocabulary, and what they leave out must be found in all of it.
"""

import argparse
import random
import time
from array import array
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.batch import RowParams, Segment, StepPlan
from engine.cache.kv_store import KVStore
from engine.model_runner import ModelRunner
from engine.models import load_model
from engine.models.config import ModelConfig
from engine.sampler import Sampler
from engine.types import SamplingParams, TokenLogprobs
from kernels import dispatch
from tools.measure import median, model_of_shape, write_result

BLOCK = 32
REPLY = 200  # tokens of each history
SHAPE = "llama-160m"
PLAIN = SamplingParams(temperature=0.8)
FILTERS = replace(PLAIN, top_k=50, top_p=0.95, min_p=0.02)
PENALTIES = replace(PLAIN, presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.1)
BAD_WORDS = 4


def clock() -> float:
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


class TimedSampler(Sampler):
    """A sampler that remembers how long it took the last time."""

    seconds = 0.0

    def sample(
        self, logits: Tensor, params: Mapping[int, RowParams]
    ) -> tuple[dict[int, int], dict[int, TokenLogprobs]]:
        begun = clock()
        found = super().sample(logits, params)
        self.seconds = clock() - begun
        return found


class Rows:
    """Conversations that decode with one kind of sampling."""

    def __init__(self, first: int, num: int, sampling: SamplingParams, history: int, vocab: int) -> None:
        chance = random.Random(first)
        self.first = first
        self.sampling = sampling
        self.histories = [array("i", chance.choices(range(vocab), k=history)) for _ in range(num)]
        words = [tuple(chance.choices(range(vocab), k=1 + i % 3)) for i in range(BAD_WORDS)]
        self.bad_word_ids = tuple(words) if sampling.bad_words else ()
        self.num_prompt = max(0, history - REPLY)

    def plan(self, number: int, context: int, slots: list[tuple[int, ...]]) -> StepPlan:
        """A step in which each row computes one token at position `context` - 1."""
        return StepPlan(
            number,
            tuple(
                Segment(self.first + i, context - 1, (tokens[-1],), slots[i], self._draw(i, tokens))
                for i, tokens in enumerate(self.histories)
            ),
        )

    def _draw(self, i: int, tokens: "array[int]") -> RowParams:
        return RowParams(
            self.sampling,
            seed=i,
            position=len(tokens),
            num_generated=len(tokens) - self.num_prompt,
            history=tokens[:],
            num_prompt=self.num_prompt,
            bad_word_ids=self.bad_word_ids,
        )

    def take(self, chosen: Mapping[int, int]) -> None:
        for i, tokens in enumerate(self.histories):
            tokens.append(chosen[self.first + i])


def kinds(vocab: int) -> dict[str, SamplingParams]:
    """One feature after the other, and all of them."""
    biases = tuple((i * vocab // 16, float(i % 5 - 2)) for i in range(16))
    return {
        "greedy": SamplingParams(temperature=0.0),
        "temperature": PLAIN,
        "top-k, top-p, min-p": FILTERS,
        "top-k": replace(PLAIN, top_k=50),
        "top-p": replace(PLAIN, top_p=0.95),
        "min-p": replace(PLAIN, min_p=0.02),
        "penalties": PENALTIES,
        "16 biases": replace(PLAIN, logit_bias=biases),
        "logprobs 5": replace(PLAIN, logprobs=5),
        "bad words": replace(PLAIN, bad_words=("x",) * BAD_WORDS),
        "all": replace(
            FILTERS,
            presence_penalty=PENALTIES.presence_penalty,
            frequency_penalty=PENALTIES.frequency_penalty,
            repetition_penalty=PENALTIES.repetition_penalty,
            logit_bias=biases,
            logprobs=5,
            bad_words=("x",) * BAD_WORDS,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help=f"a folder that tools.random_model {SHAPE} has written")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--context", type=int, default=512, help="tokens in each row's KV cache")
    parser.add_argument("--history", type=int, default=2000, help="tokens that penalties look at")
    parser.add_argument("--seconds", type=float, default=10, help="of measuring, all kinds together")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with model_of_shape(SHAPE, chosen.model) as folder:
        figures = _measure(folder, chosen.rows, chosen.context, chosen.history, chosen.seconds)
    how = {
        "shape": SHAPE,
        "kernels": dispatch.describe(),
        "threads": chosen.threads,
        "clock": "CPU time" if chosen.threads == 1 else "wall time",
        "rows": chosen.rows,
        "context": chosen.context,
        "history": chosen.history,
    }
    print(write_result("sampling", how | figures))


def _measure(folder: Path, num_rows: int, context: int, history: int, seconds: float) -> dict[str, Any]:
    model = ModelConfig.from_dir(folder)
    per_row = -(-context // BLOCK)
    slots = [tuple(range(i * per_row, (i + 1) * per_row)) for i in range(num_rows)]
    store = KVStore(
        model.num_layers, num_rows * per_row, model.num_kv_heads, BLOCK, model.head_dim, torch.bfloat16
    )
    for layer in store.layers:
        layer.normal_()
    decoder = load_model(folder, torch.bfloat16)
    rows = {
        name: Rows(1000 * i, num_rows, sampling, history, model.vocab_size)
        for i, (name, sampling) in enumerate(kinds(model.vocab_size).items())
    }
    # A sampler forgets rows that are absent for some calls: each kind has its own.
    samplers = {name: TimedSampler(model.vocab_size, model.eos_ids) for name in rows}
    runners = {name: ModelRunner(decoder, store, sampler, BLOCK) for name, sampler in samplers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}  # (step, sampling)
    number, end = 0, time.perf_counter() + seconds
    while number < 3 or time.perf_counter() < end:
        for name, some in rows.items():
            plan = some.plan(number, context, slots)
            begun = clock()
            step = runners[name].run(plan)
            if number:  # the first time counts whole histories
                times[name].append((clock() - begun, samplers[name].seconds))
            some.take(step.sampled)
        number += 1
    return {"kinds": {name: _summary(name, taken) for name, taken in times.items()}}


def _summary(name: str, taken: list[tuple[float, float]]) -> dict[str, float]:
    """Medians in ms, and the median of each step's own share."""
    share = median([sampling / step for step, sampling in taken])
    step_ms, sampling_ms = (1000 * median(values) for values in zip(*taken, strict=True))
    print(f"{name:22}{step_ms:9.1f} ms a step{sampling_ms:8.2f} ms sampling{share:8.1%}", flush=True)
    return {
        "steps": len(taken),
        "step_ms": round(step_ms, 2),
        "sampling_ms": round(sampling_ms, 2),
        "share": round(share, 4),
    }


if __name__ == "__main__":
    main()
