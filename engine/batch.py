"""What crosses from the scheduler to the runner and back: plain frozen data, no torch.

A batch is a list of segments.  Decoding is a segment of length 1; a chunk of a prompt and a recomputed
prefix are longer ones; nothing else distinguishes them.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.cache.block import BlockMove
from engine.types import SamplingParams, TokenLogprobs


class RowParams(NamedTuple):
    """How to choose the token that follows one segment."""

    sampling: SamplingParams  # fully resolved
    seed: int
    position: int  # absolute position of the token being chosen
    num_generated: int  # tokens of the reply before it
    history: "array[int] | None" = None  # all `position` tokens before it, if `needs_history`; never written
    num_prompt: int = 0  # so many of `history` come before the reply
    bad_word_ids: tuple[tuple[int, ...], ...] = ()  # the reply may hold none of these


def needs_history(sampling: SamplingParams) -> bool:
    """Whether choosing a token takes more than logits: the tokens before it."""
    return bool(
        sampling.presence_penalty
        or sampling.frequency_penalty
        or (sampling.repetition_penalty or 1.0) != 1.0
        or sampling.bad_words
    )


class Segment(NamedTuple):
    """Consecutive positions of one conversation, computed in one step.

    `token_ids` is None for a single token that an earlier, not yet applied step samples for the same `row`.
    """

    row: int  # names the turn towards the runner
    first: int  # absolute position of the first token
    token_ids: tuple[int, ...] | None
    slots: NDArray[
        np.int32
    ]  # device slot of each block of the conversation up to the segment's end, -1 = hole
    draw: RowParams | None  # set if the last position's logits choose a token

    @property
    def length(self) -> int:
        return 1 if self.token_ids is None else len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Copies between the tiers, first the stores, then the loads, and then one forward pass, if there are
    segments.  Built by the scheduler, read by those who carry it out, changed by nobody.
    """

    number: int
    segments: tuple[Segment, ...]  # order = row order in the batch
    stores: tuple[BlockMove, ...] = ()
    loads: tuple[BlockMove, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    def overwritten(self, block_size: int) -> set[int]:
        """The device slots that loads and segments write: what is stored from there must have left before."""
        written = {move.device_slot for move in self.loads}
        for segment in self.segments:
            first, end = segment.first // block_size, -(-(segment.first + segment.length) // block_size)
            written.update(segment.slots[first:end].tolist())
        return written


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens that a step chose, by `Segment.row`, and how long it took."""

    sampled: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # of the rows that asked for them
    failed_moves: frozenset[BlockMove] = frozenset()
    load_s: float = 0.0  # of `seconds`: for the copies from the host


Collect = Callable[[], StepResult]
"""Waits for a step that was launched."""


def at_once(result: StepResult) -> Collect:
    """Of a step that was computed while it was launched."""
    return lambda: result
