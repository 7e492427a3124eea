"""What the device keeps of each request from step to step, mirrored here, so that a step sends changes.

A request has a row of the block tables, found by the name that segments know it by.  Names are never used
again, rows are: a new name takes the row that was used least recently.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.batch import Segment
from engine.errors import InvariantError
from engine.types import SamplingParams
from kernels.prepare import HEADER, NUM_FACTS, PLAIN_FACTS, Struct

_MOST_TOP_K = 2**31 - 1  # more than any vocabulary
_NOT_NEW = -1


class Rows:
    """The row behind the last one belongs to no request: its table is nothing but holes, its draws are
    greedy.  Segments of it read and write nothing; they fill a step up, and are what a step is tried with.
    """

    def __init__(
        self, num_rows: int, table_width: int, num_blocks: int, block_size: int, vocab_size: int
    ) -> None:
        """`table_width`: blocks of the longest conversation; `num_blocks`: of the device tier."""
        self.num_rows = num_rows
        self.holes = num_rows
        self.table_width = table_width
        self._num_blocks, self._block_size, self._vocab_size = num_blocks, block_size, vocab_size
        self._tables = np.full((num_rows, table_width), -1, np.int32)  # as they will be on the device
        self._facts: list[tuple[SamplingParams, int] | None] = [None] * num_rows
        self._row_of: dict[int, int] = {}  # by name, the least recently used first
        self._free = list(reversed(range(num_rows)))

    def initial_tables(self) -> NDArray[np.int32]:
        """What the device begins with, the row of holes included."""
        return np.full((self.num_rows + 1, self.table_width), -1, np.int32)

    def initial_facts(self) -> NDArray[np.int32]:
        return np.tile(PLAIN_FACTS, (self.num_rows + 1, 1))

    def capacity(self, num_tokens: int, num_draws: int) -> int:
        """Integers that the largest struct of so many tokens and draws takes."""
        most_changes = 3 * self._tables.size
        return HEADER + most_changes + 7 * num_tokens + (4 + NUM_FACTS) * num_draws

    def struct(self, segments: Sequence[Segment], num_pads: int = 0) -> Struct:
        """The step of these segments, and of `num_pads` idle ones that draw a token each.  Of several
        segments of a name, the longest table holds for all.  From here on the device is taken to know it.

        InvariantError, with nothing changed that the device would have to know, for what is out of range.
        """
        for segment in segments:
            self._check(segment)
        rows = self._rows(segment.row for segment in segments)
        changes = self._changes(rows, segments)
        ids = self._ids(segments)
        first = [segment.first for segment in segments] + [0] * num_pads
        length = [segment.length for segment in segments] + [1] * num_pads
        written = [self._written(segment) for segment in segments]
        num_blocks = [len(blocks) for blocks in written] + [1] * num_pads
        end = np.cumsum(length)
        parts = (
            [*rows, *[self.holes] * num_pads],
            first,
            end - length,
            length,
            np.cumsum(num_blocks) - num_blocks,
        )
        blocks = np.concatenate((*written, np.full(num_pads, -1, np.int32)))
        draws, facts = self._draws(rows, segments, end)
        draws += [(int(at) - 1, self.holes, 0, _NOT_NEW) for at in end[len(segments) :]]
        self._tables[changes[0], changes[1]] = changes[2]
        return Struct(
            changes,
            np.array(parts, np.int32),
            np.concatenate((ids, np.zeros(num_pads, np.int32))),
            blocks,
            np.array(draws, np.int32).reshape(-1, 4).T,
            np.array(facts, np.int32).reshape(-1, NUM_FACTS),
        )

    def idle(self, lengths: Sequence[int]) -> Struct:
        """A step that leaves nothing behind: idle segments, each of which draws a token."""
        length = np.array(lengths, np.int32)
        begin, num, num_tokens = np.cumsum(length) - length, len(lengths), int(length.sum())
        none = np.zeros(num, np.int32)
        holes = np.full(num, self.holes, np.int32)
        blocks = np.full(-(-max(lengths) // self._block_size), -1, np.int32)  # shared by all
        return Struct(
            np.empty((3, 0), np.int32),
            np.array((holes, none, begin, length, none), np.int32),
            np.zeros(num_tokens, np.int32),
            blocks,
            np.array((begin + length - 1, holes, none, none + _NOT_NEW), np.int32),
            np.empty((0, NUM_FACTS), np.int32),
        )

    # -- private

    def _check(self, segment: Segment) -> None:
        first, length, num_blocks = segment.first, segment.length, len(segment.slots)
        room = min(num_blocks, self.table_width) * self._block_size
        if length < 1 or first < 0 or first + length > room or num_blocks > self.table_width:
            raise InvariantError(
                f"row {segment.row}: {length} tokens from position {first} with {num_blocks} blocks of "
                f"{self._block_size}, of which a table holds {self.table_width}"
            )
        if segment.token_ids is None and self._facts_of(segment.row) is None:
            raise InvariantError(f"row {segment.row} goes on from a token that no step has sampled")

    def _facts_of(self, name: int) -> tuple[SamplingParams, int] | None:
        row = self._row_of.get(name)
        return None if row is None else self._facts[row]

    def _rows(self, names: Iterable[int]) -> list[int]:
        """The row of each name, found or taken from others."""
        row_of, names = self._row_of, list(names)
        for name in dict.fromkeys(names):  # what the step uses is not taken: it comes to the end first
            if name in row_of:
                row_of[name] = row_of.pop(name)
        wanted = dict.fromkeys(names)
        if len(wanted) > self.num_rows:
            raise InvariantError(f"a step of {len(wanted)} requests, but there are rows for {self.num_rows}")
        for name in wanted:
            if name not in row_of:
                row = self._free.pop() if self._free else row_of.pop(next(iter(row_of)))
                row_of[name] = row
                self._facts[row] = None
        return [row_of[name] for name in names]

    def _changes(self, rows: Sequence[int], segments: Sequence[Segment]) -> NDArray[np.int32]:
        """[3, N]: row, index of the block, slot, where the device knows another slot."""
        longest: dict[int, NDArray[np.int32]] = {}
        for row, segment in zip(rows, segments, strict=True):
            if row not in longest or len(longest[row]) < len(segment.slots):
                longest[row] = segment.slots
        parts = [np.empty((3, 0), np.int32)]
        for row, slots in longest.items():
            changed = (self._tables[row, : len(slots)] != slots).nonzero()[0]
            if len(changed):
                parts.append(np.stack((np.full(len(changed), row), changed, slots[changed])).astype(np.int32))
        changes = np.concatenate(parts, axis=1)
        wrong = (changes[2] < -1) | (changes[2] >= self._num_blocks)
        if wrong.any():
            row, index, slot = changes[:, wrong.argmax()].tolist()
            name = next(name for name, other in self._row_of.items() if other == row)
            raise InvariantError(f"row {name}: block {index} in slot {slot} of {self._num_blocks}")
        return changes

    def _ids(self, segments: Sequence[Segment]) -> NDArray[np.int32]:
        """[T], -1 where the token is not known yet."""
        ids: list[int] = []
        for segment in segments:
            if segment.token_ids is None:
                ids.append(-1)
            else:
                ids += segment.token_ids
        found = np.array(ids, np.int64)
        num_unknown = sum(segment.token_ids is None for segment in segments)
        if int((found < 0).sum()) != num_unknown or int(found.max()) >= self._vocab_size:
            given = [id for segment in segments for id in segment.token_ids or ()]
            raise InvariantError(f"token ids {min(given)} .. {max(given)} of {self._vocab_size}")
        return found.astype(np.int32)

    def _written(self, segment: Segment) -> NDArray[np.int32]:
        """The slots of the blocks that hold the segment's own positions."""
        size, last = self._block_size, segment.first + segment.length - 1
        return segment.slots[segment.first // size : last // size + 1]

    def _draws(
        self, rows: Sequence[int], segments: Sequence[Segment], ends: NDArray[np.int64]
    ) -> tuple[list[tuple[int, int, int, int]], list[NDArray[np.int32]]]:
        """Each draw's row of the step, row, position, and facts or -1; and the facts that are new."""
        draws: list[tuple[int, int, int, int]] = []
        facts: list[NDArray[np.int32]] = []
        for row, segment, end in zip(rows, segments, ends.tolist(), strict=False):
            if (draw := segment.draw) is None:
                continue
            known, new_at = self._facts[row], _NOT_NEW
            if known is None or known[0] is not draw.sampling or known[1] != draw.seed:
                self._facts[row] = draw.sampling, draw.seed
                new_at = len(facts)
                facts.append(facts_of(draw.sampling, draw.seed))
            draws.append((end - 1, row, draw.position, new_at))
        return draws, facts


def facts_of(sampling: SamplingParams, seed: int) -> NDArray[np.int32]:
    """[NUM_FACTS], in the order of FACT_NAMES."""
    facts = np.zeros(NUM_FACTS, np.int32)
    floats = facts.view(np.float32)
    floats[[0, 2, 3]] = sampling.temperature or 0.0, sampling.top_p or 1.0, sampling.min_p or 0.0
    facts[1] = min(sampling.top_k or 0, _MOST_TOP_K)
    facts[4:6] = np.array([seed], np.int64).view(np.int32)  # the low half first, as on any x86
    return facts
