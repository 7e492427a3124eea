"""Random histories of steps, as a scheduler might plan them, for the tests of rows and of their kernel."""

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import RowParams, Segment
from engine.cuda.rows import Rows
from engine.types import SamplingParams
from kernels.prepare import StepTensors, Struct
from kernels.sampling import SamplingRows

BLOCK_SIZE, NUM_BLOCKS, WIDTH, VOCAB, NUM_ROWS = 4, 50, 8, 1000, 5
POISON = -77


def new_rows() -> Rows:
    return Rows(NUM_ROWS, WIDTH, NUM_BLOCKS, BLOCK_SIZE, VOCAB)


def step_tensors(rows: Rows, num_tokens: int = 256, num_draws: int = 16) -> StepTensors:
    """As on a device that has not run a step; what a step is to write is poisoned."""

    def poison(num: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full((num,), POISON if dtype != torch.float32 else torch.nan, dtype=dtype)

    floats = {name: poison(num_draws, torch.float32) for name in ("temperature", "top_p", "min_p")}
    whole = {name: poison(num_draws) for name in ("top_k", "seed", "position")}
    return StepTensors(
        tables=torch.from_numpy(rows.initial_tables()),
        last=torch.full((rows.num_rows + 1,), 5),
        facts=torch.from_numpy(rows.initial_facts()),
        ids=poison(num_tokens),
        positions=poison(num_tokens),
        slots=poison(num_tokens),
        q_indptr=poison(num_tokens + 1, torch.int32),
        first_pos=poison(num_tokens, torch.int32),
        table_rows=poison(num_tokens, torch.int32),
        logits_rows=poison(num_draws),
        draw_rows=poison(num_draws),
        sampling=SamplingRows(**floats, **whole),
    )


def packed(struct: Struct) -> Tensor:
    parts = (struct.changes, struct.segments, struct.ids, struct.blocks, struct.draws, struct.facts)
    memory = torch.full((16 + sum(part.size for part in parts),), POISON, dtype=torch.int32)
    struct.pack(memory.numpy())
    return memory


@dataclass
class _Request:
    slots: NDArray[np.int32]
    sampling: SamplingParams
    seed: int
    drew_in: int = -1  # step


@dataclass
class RandomSteps:
    """Requests come and go; their blocks move, become holes, and grow in number."""

    random: random.Random
    block_size: int = BLOCK_SIZE
    num_blocks: int = NUM_BLOCKS
    num_steps: int = 0
    _num_names: int = 0
    _requests: dict[int, _Request] = field(default_factory=dict)

    def next(self) -> list[Segment]:
        """One or two segments of one to NUM_ROWS - 1 requests."""
        self.num_steps += 1
        random = self.random
        while len(self._requests) < NUM_ROWS + 2:
            self._num_names += 1
            self._requests[self._num_names] = self._request(random.randint(1, WIDTH))
        names = random.sample(list(self._requests), random.randint(1, NUM_ROWS - 1))
        segments = [segment for name in names for segment in self._segments(name)]
        for name in names:
            if random.random() < 0.2:
                del self._requests[name]
        return segments

    def segment(self, name: int, num_tokens: int) -> Segment:
        """One segment of a new request, from its beginning."""
        request = self._request(-(-num_tokens // self.block_size))
        return Segment(name, 0, self._ids(num_tokens), request.slots, self._draw(request, num_tokens))

    def _segments(self, name: int) -> list[Segment]:
        random, request = self.random, self._requests[name]
        for at in range(len(request.slots)):
            if random.random() < 0.2:
                request.slots[at] = random.randrange(-1, self.num_blocks)
        if len(request.slots) < WIDTH and random.random() < 0.5:
            request.slots = np.append(request.slots, np.int32(random.randrange(self.num_blocks)))
        drew_before, request.drew_in = request.drew_in == self.num_steps - 1, self.num_steps
        if drew_before and random.random() < 0.7:
            slots = request.slots.copy()
            end = random.randint(1, len(slots) * self.block_size)
            return [Segment(name, end - 1, None, slots, self._draw(request, end))]
        segments, begin = [], 0
        ends = sorted(random.sample(range(1, len(request.slots) * self.block_size + 1), random.randint(1, 2)))
        for end in ends:
            first = random.randint(begin, end - 1)
            draws = end == ends[-1] and random.random() < 0.7
            slots = request.slots[: -(-end // self.block_size)].copy()
            draw = self._draw(request, end) if draws else None
            segments.append(Segment(name, first, self._ids(end - first), slots, draw))
            begin = end
        if segments[-1].draw is None:
            request.drew_in = -1
        return segments

    def _request(self, num_blocks: int) -> _Request:
        random = self.random
        slots = np.array([random.randrange(-1, self.num_blocks) for _ in range(num_blocks)], np.int32)
        sampling = SamplingParams(
            temperature=random.choice([0.0, 0.7, None]),
            top_k=random.choice([0, 40, None]),
            top_p=random.choice([0.9, 1.0, None]),
            min_p=random.choice([0.0, 0.05]),
        )
        return _Request(slots, sampling, random.getrandbits(64) - 2**63)

    def _ids(self, num: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(VOCAB) for _ in range(num))

    def _draw(self, request: _Request, position: int) -> RowParams:
        return RowParams(request.sampling, request.seed, position, 0)
