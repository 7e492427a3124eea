"""The order in which idle blocks leave a tier: by value, lowest first, one cursor per conversation.

Within a conversation the order is fixed, so only the next block of each is compared, all of them at once in
arrays: choosing costs O(conversations), not O(blocks).  A block that several conversations share has the
largest of their values, which is that of the one used last: the others pass it over.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from enum import IntEnum
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.cache.block import NO_SLOT, STORING, BlockIds, Blocks
from engine.cache.block_table import BlockTable, BlockTables
from engine.cache.policy import Policy

NO_ROW = -1
LOOKS = 4
CHUNK = 64
"""So many conversations are put in order first; more only if these do not give enough."""
RANKED_AT_ONCE = 64
"""Blocks."""
RANKED_FOR_S = 0.25
"""So long an order of values is good for."""

Mask = NDArray[np.bool_]


class Way(IntEnum):
    """Where to; also the row of the cursors in `BlockTables.passed`."""

    OFF_DEVICE = 0
    OFF_DEVICE_AT_NO_COST = 1
    TO_HOST = 2
    OFF_HOST = 3


class Candidate(NamedTuple):
    """A block that may go one way."""

    value: float  # lowest first
    block: int
    row: int  # of its table, or NO_ROW
    place: int  # in that table, in the policy's order


class Ranking:
    """What leaves next, by each way: ranked once for several uses, and looked at again before it is used."""

    def __init__(self, tables: BlockTables, blocks: Blocks, policy: Policy, block_size: int) -> None:
        self._tables, self._blocks, self._policy, self._block_size = tables, blocks, policy, block_size
        # With their blocks' generations; and the times at which they were ranked.
        self._queues: dict[Way, deque[tuple[Candidate, int]]] = {way: deque() for way in Way}
        self._ranked_at = dict.fromkeys(Way, -1.0)

    def lowest(self, way: Way, now: float, settled: int, num_that_may_go: int) -> Iterator[Candidate]:
        """Lowest first.  The caller takes each away, or will be given it again.  What was used since it was
        ranked is worth more now, and left out.
        """
        blocks, queue = self._blocks, self._queues[way]
        while True:
            if not queue or now - self._ranked_at[way] > RANKED_FOR_S:
                ranked = lowest_first(self._tables, blocks, way, self._policy, self._block_size, now, settled)
                queue.clear()
                for found in islice(ranked, min(RANKED_AT_ONCE, num_that_may_go)):
                    queue.append((found, blocks.generation.item(found.block)))
                self._ranked_at[way] = now
            if not queue:
                return
            candidate, generation = queue.popleft()
            block = candidate.block
            is_unused = blocks.last_used.item(block) <= self._ranked_at[way]
            is_same = blocks.generation.item(block) == generation
            if is_same and is_unused and may_go_one(blocks, block, way, settled):
                yield candidate

    def put_back(self, way: Way, candidate: Candidate) -> None:
        """It stays after all."""
        self._queues[way].appendleft((candidate, self._blocks.generation.item(candidate.block)))

    def may_go_again(self, way: Way, candidate: Candidate) -> None:
        """What had gone or could not go `way` before."""
        if candidate.row != NO_ROW:
            passed = self._tables.passed[way]
            passed[candidate.row] = min(passed.item(candidate.row), candidate.place)


def may_go(blocks: Blocks, ids: BlockIds, way: Way, settled: int) -> Mask:
    """Which of `ids` may leave now: no running turn needs them, no step behind `settled` touches them."""
    may: Mask = blocks.num_active[ids] == 0
    may &= blocks.last_step[ids] <= settled
    may &= (blocks.host_slot if way is Way.OFF_HOST else blocks.slot)[ids] != NO_SLOT
    if way is Way.OFF_DEVICE_AT_NO_COST:
        may &= blocks.host_valid[ids] >= blocks.num_valid[ids]
    if way is Way.TO_HOST:
        may &= blocks.host_valid[ids] < blocks.num_valid[ids]
    return may


def may_go_one(blocks: Blocks, block: int, way: Way, settled: int) -> bool:
    """As `may_go`, of one block."""
    if blocks.num_active.item(block) or blocks.last_step.item(block) > settled:
        return False
    if way is Way.OFF_HOST:
        return blocks.host_slot.item(block) != NO_SLOT
    is_clean = blocks.host_valid.item(block) >= blocks.num_valid.item(block)
    is_wanted = way is Way.OFF_DEVICE or is_clean == (way is Way.OFF_DEVICE_AT_NO_COST)
    return is_wanted and blocks.slot.item(block) != NO_SLOT


def has_gone(blocks: Blocks, ids: BlockIds, way: Way) -> Mask:
    """Which of `ids` cannot go `way` before they have been copied the other way.  A store that fails is not
    tried again before the conversation has gone on.
    """
    if way is Way.OFF_HOST:
        gone: Mask = blocks.host_slot[ids] == NO_SLOT
        return gone
    gone = blocks.slot[ids] == NO_SLOT
    if way is not Way.OFF_DEVICE:
        is_clean = blocks.host_valid[ids] >= blocks.num_valid[ids]
        gone |= is_clean | (blocks.copying[ids] == STORING) if way is Way.TO_HOST else ~is_clean
    return gone


def has_gone_one(blocks: Blocks, block: int, way: Way) -> bool:
    """As `has_gone`, of one block."""
    if way is Way.OFF_HOST:
        return blocks.host_slot.item(block) == NO_SLOT
    if blocks.slot.item(block) == NO_SLOT:
        return True
    is_clean = blocks.host_valid.item(block) >= blocks.num_valid.item(block)
    if way is Way.TO_HOST:
        return is_clean or blocks.copying.item(block) == STORING
    return way is Way.OFF_DEVICE_AT_NO_COST and not is_clean


def lowest_first(
    tables: BlockTables, blocks: Blocks, way: Way, policy: Policy, block_size: int, now: float, settled: int
) -> Iterator[Candidate]:
    """What may go `way`, lowest value first; nothing of it may change meanwhile.  One that several
    conversations share may come twice.

    Last come blocks whose latest user has left, or that came back through somebody else: they are found by
    looking everywhere, in no order, count as the first of their conversation, and belong to row NO_ROW.
    """
    rows = np.flatnonzero(~tables.is_active & (tables.passed[way] < tables.num_blocks))
    at = tables.passed[way][rows]
    ends = (tables.num_blocks[rows] - at if policy.from_tail else at + 1) * block_size
    floors = policy.value(ends, now - tables.last_active[rows])
    heap: list[tuple[float, int, int, int]] = []  # value, row, place, block
    seen: list[int] = []

    def push(row: int, at: int) -> None:
        table = tables[row]
        at = _next(table, at, blocks, way, policy, settled)
        if at < len(table):
            end = (len(table) - at if policy.from_tail else at + 1) * block_size
            value = float(policy.value(end, now - table.last_active))
            heapq.heappush(heap, (value, row, at, table[len(table) - 1 - at if policy.from_tail else at]))

    upcoming = _ascending(floors)
    next_up = next(upcoming, None)
    while heap or next_up is not None:
        if next_up is not None and (not heap or floors[next_up] <= heap[0][0]):
            push(rows.item(next_up), at.item(next_up))
            next_up = next(upcoming, None)
            continue
        value, row, place, block = heapq.heappop(heap)
        seen.append(block)
        yield Candidate(value, block, row, place)
        push(row, place + 1)
    every = np.flatnonzero(blocks.num_refs).astype(np.int32)
    left = np.setdiff1d(every[may_go(blocks, every, way, settled)], seen)
    values = policy.value(np.full(len(left), block_size), now - blocks.last_used[left])
    for value, block in zip(values.tolist(), left.tolist(), strict=True):
        yield Candidate(value, block, NO_ROW, 0)


def _next(table: BlockTable, at: int, blocks: Blocks, way: Way, policy: Policy, settled: int) -> int:
    """The first place from `at` on, in the policy's order, whose block may go and is this conversation's to
    give; the table's length if there is none.  What has gone is passed.
    """
    length, last_active = len(table), table.last_active
    until = min(at + LOOKS, length)
    while at < until:  # mostly one of the first may: a scan costs more than some looks
        block = table[length - 1 - at if policy.from_tail else at]
        if may_go_one(blocks, block, way, settled) and blocks.last_used.item(block) <= last_active:
            return at
        if at == table.passed.item(way) and has_gone_one(blocks, block, way):
            table.passed[way] += 1
        at += 1
    ids = table.blocks[:: -1 if policy.from_tail else 1][at:]
    if at == table.passed[way]:
        stays = ~has_gone(blocks, ids, way)
        num_gone = int(stays.argmax()) if stays.any() else len(ids)
        table.passed[way] = at = at + num_gone
        ids = ids[num_gone:]
    own = may_go(blocks, ids, way, settled) & (blocks.last_used[ids] <= last_active)
    return at + (int(own.argmax()) if own.any() else len(ids))


def _ascending(values: NDArray[np.float64]) -> Iterator[int]:
    """Where the values are, lowest first, sorted only as far as somebody looks."""
    rest, size = np.arange(len(values)), CHUNK
    while len(rest):
        if len(rest) > size:
            order = np.argpartition(values[rest], size)
            chunk, rest = rest[order[:size]], rest[order[size:]]
        else:
            chunk, rest = rest, rest[:0]
        yield from chunk[np.argsort(values[chunk], kind="stable")].tolist()
        size *= 4
