"""The tables of conversations: which blocks hold a history, in order.

What deciding goes through for all conversations at once stands in columns, a row per table.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engine.cache.block import BlockIds


class BlockTable:
    """The blocks of one conversation.  `num_tokens` are known; the last block may be partial; a hole is
    simply a block without KV.
    """

    __slots__ = ("tenant", "row", "num_tokens", "cursor", "fetched", "_columns", "_blocks", "_length")

    def __init__(self, tenant: str, columns: "BlockTables", row: int) -> None:
        self.tenant = tenant
        self.row = row
        self.num_tokens = 0
        self.cursor = 0  # while active: blocks before it are scheduled whole or not needed
        self.fetched: tuple[int, ...] = ()  # blocks that were loaded because a turn waits
        self._columns = columns
        self._blocks: BlockIds = np.empty(4, np.int32)
        self._length = 0

    def __len__(self) -> int:
        """Blocks."""
        return self._length

    def __getitem__(self, at: int) -> int:
        return self._blocks.item(at)

    def __setitem__(self, at: int, block: int) -> None:
        self._blocks[at] = block

    @property
    def blocks(self) -> BlockIds:
        """[num_blocks]; valid until the table changes."""
        return self._blocks[: self._length]

    def append(self, block: int) -> None:
        if self._length == len(self._blocks):
            more = np.empty(max(4, self._length // 4), np.int32)
            self._blocks = np.concatenate((self._blocks, more))
        self._blocks[self._length] = block
        self._length += 1
        self._columns.num_blocks[self.row] = self._length

    def pop(self) -> int:
        self._length -= 1
        self._columns.num_blocks[self.row] = self._length
        return self._blocks.item(self._length)

    @property
    def is_active(self) -> bool:
        return bool(self._columns.is_active[self.row])

    @property
    def last_active(self) -> float:
        return self._columns.last_active.item(self.row)

    @property
    def passed(self) -> NDArray[np.int32]:
        """[num_ways], to be written to: see `BlockTables`."""
        return self._columns.passed[:, self.row]


class BlockTables:
    """Iterates over the tables in use, in no particular order.  Columns by `BlockTable.row`:

    num_blocks, and last_active: when its last turn ended or its next one was accepted, in seconds.
    passed [num_ways, num_rows]: while idle, by `eviction.Way`, blocks at the beginning found to be through.
    """

    def __init__(self, num_ways: int) -> None:
        self.is_active = np.zeros(0, np.bool_)
        self.last_active = np.zeros(0, np.float64)
        self.num_blocks = np.zeros(0, np.int32)  # 0 for rows that are not in use
        self.passed = np.zeros((num_ways, 0), np.int32)
        self._tables: list[BlockTable | None] = []
        self._spare: list[int] = []

    def __len__(self) -> int:
        return len(self._tables) - len(self._spare)

    def __iter__(self) -> Iterator[BlockTable]:
        return (table for table in self._tables if table is not None)

    def __getitem__(self, row: int) -> BlockTable:
        table = self._tables[row]
        assert table is not None
        return table

    def new(self, tenant: str, now: float) -> BlockTable:
        if not self._spare:
            self._grow()
        row = self._spare.pop()
        table = self._tables[row] = BlockTable(tenant, self, row)
        self.is_active[row], self.last_active[row], self.num_blocks[row] = False, now, 0
        self.passed[:, row] = 0
        return table

    def remove(self, table: BlockTable) -> None:
        """It names no blocks any more."""
        self._tables[table.row] = None
        self._spare.append(table.row)

    def _grow(self) -> None:
        old = len(self._tables)
        new = max(64, old // 4)
        for name in ("is_active", "last_active", "num_blocks"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate((column, np.zeros(new, column.dtype))))
        self.passed = np.concatenate((self.passed, np.zeros((len(self.passed), new), np.int32)), axis=1)
        self._tables += [None] * new
        self._spare.extend(range(old + new - 1, old - 1, -1))
