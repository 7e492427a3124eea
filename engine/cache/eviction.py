"""The order in which idle blocks leave a tier: by value, lowest first, one cursor per conversation.

Within a conversation the order is fixed, so only the next block of each is compared, all of them at once in
arrays: choosing costs O(conversations), not O(blocks).  A block that several conversations share has the
largest of their values, which is that of the one used last: the others pass it over.
"""

import heapq
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from engine.cache.block import NO_SLOT, BlockIds, Blocks
from engine.cache.block_table import BlockTable, BlockTables
from engine.cache.policy import Policy

CHUNK = 64
"""So many conversations are put in order first; more only if these do not give enough."""

Mask = NDArray[np.bool_]


class Way(IntEnum):
    """Where to; also the row of the cursors in `BlockTables.passed`."""

    OFF_DEVICE = 0
    OFF_DEVICE_AT_NO_COST = 1
    TO_HOST = 2
    OFF_HOST = 3


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


def has_gone(blocks: Blocks, ids: BlockIds, way: Way) -> Mask:
    gone: Mask = blocks.slot[ids] == NO_SLOT
    if way is Way.OFF_HOST:
        gone &= blocks.host_slot[ids] == NO_SLOT  # what is on the device may yet be stored
    if way is Way.TO_HOST:
        gone |= blocks.host_valid[ids] >= blocks.num_valid[ids]
    return gone


def lowest_first(
    tables: BlockTables, blocks: Blocks, way: Way, policy: Policy, block_size: int, now: float, settled: int
) -> Iterator[tuple[float, int]]:
    """Pairs of value and block that may go `way`, of which nothing may change meanwhile.  One that several
    conversations share may come twice.

    Last come blocks whose latest user has left, or that came back through somebody else: they are found by
    looking everywhere, in no order, and count as the first of their conversation.
    """
    passed = tables.passed[way]
    rows = np.flatnonzero(~tables.is_active & (passed < tables.num_blocks))
    at = passed[rows]
    ends = (tables.num_blocks[rows] - at if policy.from_tail else at + 1) * block_size
    floors = policy.value(ends, now - tables.last_active[rows])
    heap: list[tuple[float, int, int]] = []
    opened: dict[int, tuple[list[float], list[int]]] = {}  # row -> its values and blocks

    def push(row: int, number: int) -> None:
        values, ids = opened[row]
        if number < len(ids):
            heapq.heappush(heap, (values[number], row, number))

    upcoming = _ascending(floors)
    next_up = next(upcoming, None)
    while heap or next_up is not None:
        if next_up is not None and (not heap or floors[next_up] <= heap[0][0]):
            table = tables[rows.item(next_up)]
            opened[table.row] = _own(table, blocks, way, policy, block_size, now, settled)
            push(table.row, 0)
            next_up = next(upcoming, None)
            continue
        value, row, number = heapq.heappop(heap)
        yield value, opened[row][1][number]
        push(row, number + 1)
    every = np.flatnonzero(blocks.num_refs).astype(np.int32)
    seen = [block for _, own in opened.values() for block in own]
    left = np.setdiff1d(every[may_go(blocks, every, way, settled)], seen)
    values = policy.value(np.full(len(left), block_size), now - blocks.last_used[left])
    yield from zip(values.tolist(), left.tolist(), strict=True)


def _own(
    table: BlockTable, blocks: Blocks, way: Way, policy: Policy, block_size: int, now: float, settled: int
) -> tuple[list[float], list[int]]:
    """Values and blocks, in the policy's order, that may go and are this conversation's to give.  What has
    gone for good is passed.
    """
    ids = table.blocks[:: -1 if policy.from_tail else 1][table.passed[way] :]
    stays = ~has_gone(blocks, ids, way)
    num_gone = int(stays.argmax()) if stays.any() else len(ids)
    table.passed[way] += num_gone
    own = may_go(blocks, ids, way, settled) & (blocks.last_used[ids] <= table.last_active)
    places = table.passed[way] + np.flatnonzero(own[num_gone:])
    ends = (len(table) - places if policy.from_tail else places + 1) * block_size
    values = policy.value(ends, now - table.last_active)
    return np.broadcast_to(values, ends.shape).tolist(), ids[own].tolist()


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
