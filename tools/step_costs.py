"""Measures what steps cost on this machine with a model, and fits the simulated engine's constants to it.

A few real steps go through `engine.model_runner`: decoding with few and many rows, short and long histories,
and prompts at the beginning and far into a history.  Each constant is one column of a linear system, solved
for the least squares of relative errors.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.batch import RowParams, Segment, StepPlan
from engine.cache.block import BlockMove
from engine.cache.kv_store import HostStore, KVStore
from engine.cache.transfer import SyncTransfer
from engine.loader import GREEDY
from engine.model_runner import ModelRunner
from engine.models import load_model
from engine.models.config import ModelConfig
from engine.sampler import Sampler
from engine.simulation.step_costs import StepCosts

BLOCK_SIZE = 32
NUM_BLOCKS = 2048
NUM_HOST_BLOCKS = 256
ROWS = (1, 2, 4, 8, 16, 32)
CONTEXTS = (64, 1024, 2000)
PROMPTS = ((0, 64), (0, 128), (0, 256), (0, 512), (512, 128), (1024, 512), (1800, 200))  # position, length
COPIED = (1, 8, 64)  # blocks at once


@dataclass(frozen=True, slots=True)
class Case:
    """`num_rows` segments of `length` tokens from position `first` on; single tokens choose the next one."""

    num_rows: int
    first: int
    length: int

    @property
    def num_blocks(self) -> int:
        return -(-(self.first + self.length) // BLOCK_SIZE)

    def plan(self) -> StepPlan:
        """Over blocks of their own, as far as there are enough."""
        segments = []
        for row in range(self.num_rows):
            slots = (row * self.num_blocks + np.arange(self.num_blocks, dtype=np.int32)) % NUM_BLOCKS
            end = self.first + self.length
            draw = RowParams(GREEDY, 0, end, 0) if self.length == 1 else None
            segments.append(Segment(row, self.first, (1,) * self.length, slots, draw))
        return StepPlan(0, tuple(segments))


CASES = [
    *(Case(rows, context, 1) for context in CONTEXTS for rows in ROWS if rows * context <= 40_000),
    *(Case(1, first, length) for first, length in PROMPTS),
]


def measure(folder: Path, dtype_name: str, threads: int, repeats: int) -> dict[str, Any]:
    """The costs, with what was measured and what the costs say of it."""
    torch.set_num_threads(threads)
    model, dtype = ModelConfig.from_dir(folder), getattr(torch, dtype_name)
    heads = (model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    store = KVStore(model.num_layers, NUM_BLOCKS, *heads, dtype)
    runner = ModelRunner(
        load_model(folder, dtype), store, Sampler(model.vocab_size, model.eos_ids), BLOCK_SIZE
    )
    store.slab.normal_()  # pages that were never written are all one, and reading them costs less
    steps = _least([partial(runner.run, case.plan()) for case in CASES], repeats)
    transfer = SyncTransfer(store, HostStore(store, NUM_HOST_BLOCKS))
    moves = [[BlockMove(i, i) for i in range(count)] for count in COPIED]
    stores = _least([partial(transfer.store, each) for each in moves], repeats)
    loads = _least([partial(_load, transfer, each) for each in moves], repeats)
    costs = fitted(steps, loads, stores, model.num_layers)
    return {
        "dtype": dtype_name,
        "threads": threads,
        "repeats": repeats,
        "kv_bytes_per_token": 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize,
        "costs": {name: value for name, value in asdict(costs).items() if name != "overlaps"},
        "steps": [
            {
                **asdict(case),
                "measured_ms": round(1000 * seconds, 3),
                "fitted_ms": round(1000 * costs.compute_s(case.plan()), 3),
            }
            for case, seconds in zip(CASES, steps, strict=True)
        ],
        "load_ms": {count: round(1000 * s, 3) for count, s in zip(COPIED, loads, strict=True)},
        "store_ms": {count: round(1000 * s, 3) for count, s in zip(COPIED, stores, strict=True)},
    }


def _load(transfer: SyncTransfer, moves: Sequence[BlockMove]) -> None:
    transfer.load(moves).finish()


def fitted(
    steps: Sequence[float], loads: Sequence[float], stores: Sequence[float], num_layers: int
) -> StepCosts:
    """`steps` [len(CASES)], `loads` and `stores` [len(COPIED)] in seconds.

    Up to so many tokens a step's linears take as long as reading the weights does, beyond that they grow with
    the tokens: where the one ends and the other begins is tried out.
    """
    tokens = [case.num_rows * case.length for case in CASES]
    fits = [_fit(steps, [count <= few for count in tokens]) for few in sorted(set(tokens))]
    fixed_s, weights_s, token_s, row_s, kv_token_s, pair_s = min(fits, key=lambda fit: fit[0])[1]
    load, store = np.polyfit(COPIED, loads, 1, w=1 / np.array(loads)), stores[-1] / COPIED[-1]
    return StepCosts(
        fixed_s=fixed_s,
        weights_s=weights_s,
        token_s=token_s,
        row_s=row_s,
        kv_token_s=kv_token_s,
        pair_s=pair_s,
        load_s=float(load[0]),
        store_s=store,
        copy_latency_s=max(0.0, float(load[1])),
        num_layers=num_layers,
        overlaps=False,
    )


def _fit(steps: Sequence[float], is_read: Sequence[bool]) -> tuple[float, list[float]]:
    """Sum of squared relative errors, and the constants.  `is_read`: the weights set the time."""
    table = np.array(
        [
            [
                1.0,
                float(reads),
                0.0 if reads else case.num_rows * case.length,
                case.num_rows if case.length == 1 else 0.0,
                case.num_rows * (case.first + 1) if case.length == 1 else 0.0,
                0.0 if case.length == 1 else case.length * (case.first + (case.length + 1) / 2),
            ]
            for case, reads in zip(CASES, is_read, strict=True)
        ]
    )
    relative = table / np.array(steps)[:, None]
    used = list(range(table.shape[1]))
    while True:  # constants are not negative: leave out the worst until none is
        found, *_ = np.linalg.lstsq(relative[:, used], np.ones(len(steps)), rcond=None)
        if found.min() >= 0:
            break
        del used[int(found.argmin())]
    constants = np.zeros(table.shape[1])
    constants[used] = found
    return float(((relative @ constants - 1) ** 2).sum()), constants.tolist()


def _least(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each, the least of `repeats`, which take turns: other load slows down some, not all."""
    least = [float("inf")] * len(runs)
    for _ in range(repeats + 1):
        for i, run in enumerate(runs):
            begun = time.perf_counter()
            run()
            least[i] = min(least[i], time.perf_counter() - begun)
    return least
