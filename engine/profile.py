"""Measures what a block costs on this machine with this model: to compute it, and to copy it either way.

A few blocks are computed together, as they are where a history has been dropped: reading the weights is a
cost that they share.  What they attend to is KV that the model has computed, in memory of its own: pages that
nothing was ever written to are all one and the same, and reading them costs less.  Runs and copies are begun
and ended as a step's are, each before the next one begins.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from engine.batch import Collect, Segment, StepPlan
from engine.cache.block import BlockMove
from engine.cache.costs import MeasuredCosts
from engine.cache.kv_store import KVStore
from engine.cache.transfer import TransferEngine

RUN = 4
"""Blocks that are computed together, if a step may be so large."""


@dataclass(frozen=True, slots=True)
class Effort:
    budget_s: float  # for computing: no position is tried that would exceed it, after the first
    repeats: int
    step: int  # from one position to the next, as a factor
    num_bytes: int  # of device memory that is written to: beyond it the same blocks are attended to again
    num_copied: tuple[int, ...]  # blocks at once


QUICK = Effort(budget_s=0.8, repeats=3, step=4, num_bytes=64 << 20, num_copied=(64,))
"""At a server's start."""
THOROUGH = Effort(budget_s=600.0, repeats=9, step=2, num_bytes=1 << 50, num_copied=(1, 4, 16, 64))


class Launching(Protocol):
    """What is needed of a runner."""

    def launch(self, plan: StepPlan) -> Collect: ...


class Profiler:
    """The KV memory must be unused.  It holds nothing of worth afterwards."""

    def __init__(
        self,
        runner: Launching,
        store: KVStore,
        transfer: TransferEngine | None,
        num_host_blocks: int,
        block_size: int,
        context_tokens: int,
        max_step_tokens: int,
    ) -> None:
        self._runner, self._store, self._transfer = runner, store, transfer
        self._size = block_size
        self._context_tokens = context_tokens
        self._num_host_blocks = num_host_blocks
        in_a_step = max_step_tokens // block_size * block_size or max_step_tokens
        self._num_computed = min(RUN * block_size, in_a_step, context_tokens)  # tokens per run
        self._num_written = -(-self._num_computed // block_size)  # blocks, the first ones of the device
        self._num_filled = 0  # blocks behind these that hold copies of the first
        self._spread = 0.0

    def measure(self, effort: Effort, on_position: Callable[[int], None] = lambda end: None) -> MeasuredCosts:
        """`on_position` is told which position is measured now."""
        compute_s: dict[int, float] = {}
        spread = 0.0
        self._run(self._plan(self._num_computed))  # KV to attend to; and no measurement pays for firsts
        until = time.perf_counter() + effort.budget_s
        for end in self._positions(effort.step):
            on_position(end)
            self._fill(end, effort.num_bytes)
            run = partial(self._run, self._plan(end))
            seconds = _timed([run] * effort.repeats, until)
            compute_s[end] = min(seconds) * self._size / self._num_computed
            spread = max(spread, statistics.median(seconds) / min(seconds) - 1)
            if time.perf_counter() + min(seconds) > until:
                break
        stores, loads = self._measure_copies(effort)
        return MeasuredCosts(compute_s, loads, stores, spread)

    def _run(self, plan: StepPlan) -> None:
        self._runner.launch(plan)()

    def _positions(self, step: int) -> Iterator[int]:
        """Where a run ends: powers of two, unless the context is shorter than a run."""
        end = self._num_computed
        while end <= self._context_tokens:
            yield end
            end *= step

    def _plan(self, end: int) -> StepPlan:
        num_before = -(-end // self._size) - self._num_written
        before = (self._num_written + i % self._num_filled for i in range(num_before))
        slots = np.array([*before, *range(self._num_written)], np.int32)
        length = self._num_computed
        return StepPlan(0, (Segment(0, end - length, (0,) * length, slots, None),))

    def _fill(self, end: int, num_bytes: int) -> None:
        """See to it that a run that ends at `end` finds KV before it, in up to `num_bytes` of memory."""
        slab, have = self._store.slab, self._num_written + self._num_filled
        want = min(
            -(-end // self._size), max(have, num_bytes // self._bytes_per_block, self._num_written + 1)
        )
        slab[:, have:want] = slab[:, :1]
        if slab.is_cuda:  # not on the stream that the runner computes on
            torch.cuda.synchronize(slab.device)
        self._num_filled = max(have, want) - self._num_written

    def _measure_copies(self, effort: Effort) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds per block to store and to load, by the number of blocks."""
        stores: dict[int, float] = {}
        loads: dict[int, float] = {}
        if self._transfer is None:
            return stores, loads
        room = min(self._store.slab.shape[1], self._num_host_blocks, 4 * max(effort.num_copied))
        room = max(1, min(room, effort.num_bytes // self._bytes_per_block))
        everything = [BlockMove(i, i) for i in range(room)]
        self._copy(everything, [])  # no measurement pays for pages that are touched for the first time
        self._copy([], everything)
        for num in sorted({min(num, room) for num in effort.num_copied}):
            turns = [  # each through other memory than the one before
                [BlockMove(i, i) for i in range(first, first + num)]
                for first in (number * num % (room - num + 1) for number in range(effort.repeats))
            ]
            stores[num] = min(_timed([partial(self._copy, moves, []) for moves in turns])) / num
            loads[num] = min(_timed([partial(self._copy, [], moves) for moves in turns])) / num
        return stores, loads

    def _copy(self, stores: Sequence[BlockMove], loads: Sequence[BlockMove]) -> None:
        assert self._transfer is not None
        self._transfer.store(stores)
        loading = self._transfer.load(loads)
        for layer in range(len(self._store.layers) if loads else 0):
            loading.wait_for(layer)  # as a step does; blocks copied as a whole would cost less
        loading.finish()

    @property
    def _bytes_per_block(self) -> int:
        return self._store.slab[:, 0].nbytes


def _timed(runs: Sequence[Callable[[], object]], until: float = float("inf")) -> list[float]:
    """Seconds of the first run, and of the others as long as there is time.  The least is what counts:
    nothing makes a run faster than it is.
    """
    seconds: list[float] = []
    for run in runs:
        begun = time.perf_counter()
        if seconds and begun > until:
            break
        run()
        seconds.append(time.perf_counter() - begun)
    return seconds
