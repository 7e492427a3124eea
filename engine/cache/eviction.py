"""The order in which idle blocks leave a tier: by value, lowest first, one cursor per conversation.

Within a conversation the order is fixed, so only the next block of each is compared: choosing costs
O(conversations), not O(blocks).  A block that several conversations share has the largest of their values,
which is that of the one used last: the others pass it over.
"""

import heapq
from collections.abc import Iterable, Iterator
from enum import IntEnum

from engine.cache.block import NO_SLOT, Block, BlockTable
from engine.cache.policy import Policy


class Way(IntEnum):
    """Where to; also the index of the cursor in `BlockTable.passed`."""

    OFF_DEVICE = 0
    TO_HOST = 1
    OFF_HOST = 2


def may_go(block: Block, way: Way) -> bool:
    if way is Way.OFF_HOST:
        return block.evictable_from_host
    return block.evictable and (way is Way.OFF_DEVICE or not block.clean)


def has_gone(block: Block, way: Way) -> bool:
    if way is Way.OFF_HOST:
        return block.host_slot == block.slot == NO_SLOT  # what is on the device may yet be stored
    return block.slot == NO_SLOT or (way is Way.TO_HOST and block.clean)


def lowest_first(
    tables: Iterable[BlockTable], way: Way, policy: Policy, block_size: int, now: float
) -> Iterator[tuple[float, Block]]:
    """Pairs of value and block that may go `way`.  The caller takes each, or stops.

    Last come blocks whose latest user has left, or that came back through somebody else: they are found by
    looking everywhere, in no order.
    """
    idle = [table for table in tables if not table.is_active]
    heap: list[tuple[float, int, int]] = []

    def push_next(number: int, at: int) -> None:
        table = idle[number]
        for i in range(at, len(table.blocks)):
            block = _block_at(table, i, policy)
            if may_go(block, way) and block.last_used <= table.last_active:
                value = policy.value(_end(table, i, policy, block_size), now - table.last_active)
                heapq.heappush(heap, (value, number, i))
                return
            if i == table.passed[way] and has_gone(block, way):
                table.passed[way] += 1

    for number, table in enumerate(idle):
        if table.passed[way] < len(table.blocks):
            push_next(number, table.passed[way])
    while heap:
        value, number, at = heapq.heappop(heap)
        yield value, _block_at(idle[number], at, policy)
        push_next(number, at + 1)
    for table in idle:
        for i in range(len(table.blocks)):
            block = _block_at(table, i, policy)
            if may_go(block, way):
                yield policy.value(_end(table, i, policy, block_size), now - block.last_used), block


def _block_at(table: BlockTable, at: int, policy: Policy) -> Block:
    return table.blocks[-1 - at if policy.from_tail else at]


def _end(table: BlockTable, at: int, policy: Policy, block_size: int) -> int:
    return (len(table.blocks) - at if policy.from_tail else at + 1) * block_size
