"""Measures what a block costs on this machine with this model: quickly, before the first turn."""

import time
from collections.abc import Callable
from functools import partial

from engine.batch import Segment, StepPlan
from engine.cache.block import BlockMove
from engine.cache.costs import CostTable
from engine.cache.transfer import TransferEngine
from engine.kv_sizes import KVSizes
from engine.model_runner import ModelRunner

BUDGET_S = 1.0
"""After so long no larger position is tried: costs go on from there as between the last two."""
NUM_MOVES = 4
REPEATS = 3


def measured_costs(
    runner: ModelRunner, transfer: TransferEngine | None, kv: KVSizes, block_size: int, context_tokens: int
) -> CostTable:
    """Computes a block at positions that are powers of two, and copies a few to the host and back, if there
    is one.

    The blocks hold nothing yet, and what this leaves in them counts as nothing.
    """
    compute_s: dict[int, float] = {}
    begun = time.perf_counter()
    end = block_size
    while end <= context_tokens and (len(compute_s) < 2 or time.perf_counter() - begun < BUDGET_S):
        slots = (*range(1, end // block_size), 0)  # all writing goes to one block: memory is not taken up
        plan = StepPlan(0, (Segment(0, end - block_size, (0,) * block_size, slots, None),))
        compute_s[end] = _seconds(partial(runner.run, plan))
        end *= 2
    if transfer is None:
        return CostTable(compute_s, 0.0)
    moves = [BlockMove(i, i) for i in range(min(NUM_MOVES, kv.num_blocks, kv.num_host_blocks))]
    transfer.store(moves)
    return CostTable(compute_s, _seconds(partial(transfer.load, moves)) / len(moves))


def _seconds(run: Callable[[], object]) -> float:
    """The least of a few: nothing else makes a run faster than it is."""
    best = float("inf")
    for _ in range(REPEATS):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return best
