"""Runs a plan: integers become tensors once per step, the decoder computes, the sampler chooses."""

import time
from collections.abc import Callable

import numpy as np
import torch

from engine.batch import Collect, StepPlan, StepResult, at_once
from engine.cache.kv_store import KVStore
from engine.models.decoder import Decoder
from engine.sampler import Sampler
from kernels.marks import Mark, unmarked
from kernels.paged_attention import AttnMeta


class ModelRunner:
    """Knows nothing of queues, turns or conversations: a `row` is a number under which it remembers the
    last token.  `mark` is told what the time of a step goes to.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: KVStore,
        sampler: Sampler,
        block_size: int,
        mark: Mark = unmarked,
    ) -> None:
        self._decoder = decoder
        self._store = store
        self._sampler = sampler
        self._block_size = block_size
        self._mark = mark
        self._last: dict[int, int] = {}  # row -> token of the step before

    def launch(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> Collect:
        """Computes the step here and now."""
        return at_once(self.run(plan, wait_for))

    @torch.inference_mode()
    def run(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> StepResult:
        begun = time.perf_counter()
        meta = attn_meta(plan, self._block_size)
        ids = torch.tensor(
            [id for s in plan.segments for id in (s.token_ids or (self._last[s.row],))], dtype=torch.int64
        )
        ends = meta.q_indptr[1:].tolist()
        rows = [end - 1 for segment, end in zip(plan.segments, ends, strict=True) if segment.draw is not None]
        rows_of_logits = torch.tensor(rows, dtype=torch.int64)
        self._mark("host")
        layers = self._store.layers
        logits = self._decoder.forward(ids, meta, layers, rows_of_logits, wait_for, self._mark)
        draws = {segment.row: segment.draw for segment in plan.segments if segment.draw is not None}
        self._last, logprobs = self._sampler.sample(logits, draws)
        self._mark("sampling")
        return StepResult(dict(self._last), time.perf_counter() - begun, logprobs)


def attn_meta(plan: StepPlan, block_size: int) -> AttnMeta:
    """The plan's positions and block tables as tensors."""
    segments = plan.segments
    lengths = np.fromiter((segment.length for segment in segments), np.int64, len(segments))
    first = np.fromiter((segment.first for segment in segments), np.int64, len(segments))
    indptr = np.concatenate(([0], np.cumsum(lengths)))
    tables = np.full((len(segments), max(len(segment.slots) for segment in segments)), -1, np.int32)
    for i, segment in enumerate(segments):
        tables[i, : len(segment.slots)] = segment.slots
    owner = np.repeat(np.arange(len(segments)), lengths)
    positions = np.arange(indptr[-1]) - indptr[owner] + first[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return AttnMeta(
        q_indptr=torch.from_numpy(indptr.astype(np.int32)),
        first_pos=torch.from_numpy(first.astype(np.int32)),
        block_tables=torch.from_numpy(tables),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
    )
