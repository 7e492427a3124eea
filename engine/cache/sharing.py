"""Which blocks hold which history: equal beginnings share theirs.

A table gets its blocks as its tokens become known.  A full block is looked up by its name, a hash of all
tokens up to its end, so that histories which begin alike name the same blocks, however they came to be.
"""

from array import array

import numpy as np
from numpy.typing import NDArray

from engine.cache.block import NO_BLOCK, NO_NAME, BlockIds, Blocks, chain_names
from engine.cache.block_index import BlockIndex
from engine.cache.block_table import BlockTable, BlockTables
from engine.cache.tiers import Tiers
from engine.errors import InvariantError


class Sharing:
    def __init__(self, tables: BlockTables, blocks: Blocks, tiers: Tiers, block_size: int) -> None:
        self._tables, self._blocks, self._tiers = tables, blocks, tiers
        self._block_size = block_size
        self._index = BlockIndex(blocks)
        self._twins: set[int] = set()  # blocks whose name finds another block, that holds more

    def extend(self, table: BlockTable, tokens: "array[int]") -> None:
        """`tokens` [num_known] is the whole history; what is new beyond `table.num_tokens` gets its
        blocks.
        """
        size, num_tokens = self._block_size, len(tokens)
        first, num_full = table.num_tokens // size, num_tokens // size
        table.num_tokens = num_tokens
        if num_full > first:
            parent = self._blocks.name_of(table[first - 1]) if first else None
            full = tokens[first * size : num_full * size]
            for i, name in enumerate(chain_names(table.tenant, parent, full, size), first):
                if i < len(table):
                    self._name(table, i, name)
                else:
                    self._append(table, self._named(name))
        if len(table) * size < num_tokens:
            self._append(table, self._blocks.new())

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Forget what is at `num_tokens` and after.  A shared or full block that is cut is left to its
        other owners and its remaining tokens are computed again; an exclusively owned partial one is kept."""
        size, blocks = self._block_size, self._blocks
        while len(table) * size > num_tokens:
            kept = num_tokens - (len(table) - 1) * size
            block = table[len(table) - 1]
            if kept > 0 and blocks.name_of(block) == NO_NAME:
                if self._tiers.reach(block) > kept:
                    self._tiers.idle.count_one(block, -1)
                    blocks.generation[block] += 1
                    valid = min(blocks.num_valid.item(block), kept)
                    blocks.num_valid[block] = blocks.num_scheduled[block] = valid
                    blocks.host_valid[block] = min(blocks.host_valid.item(block), kept)
                    self._tiers.idle.count_one(block, +1)
                break
            self._drop_last(table)
            if kept > 0:
                self._append(table, blocks.new())
                break
        table.num_tokens = num_tokens
        table.cursor = min(table.cursor, num_tokens // size)
        table.passed[:] = 0

    def release(self, table: BlockTable) -> None:
        """The conversation leaves memory: its blocks go, except those that others share."""
        while len(table):
            self._drop_last(table)
        self._tables.remove(table)

    def join_twins(self, table: BlockTable) -> None:
        """Go on with blocks of the same tokens that hold more than the table's own."""
        for i, block in enumerate(table.blocks.tolist() if self._twins else ()):
            if block in self._twins:
                twin = self._index.find(self._blocks.name_of(block))
                if twin != NO_BLOCK and self._holds(twin) > self._holds(block):
                    self._replace(table, i, twin)

    def append(self, table: BlockTable) -> None:
        """An empty block, for tokens that are not known yet."""
        self._append(table, self._blocks.new())

    def check(self) -> BlockIds:
        """What tables name is counted right, and found by its name.  Returns it; raises InvariantError."""
        blocks, count = self._blocks, len(self._blocks.slot)
        refs, active = np.zeros(count, np.int64), np.zeros(count, np.int64)
        wrong: NDArray[np.bool_]
        for table in self._tables:
            if len(table) * self._block_size < table.num_tokens:
                raise InvariantError(f"{table.num_tokens} tokens do not fit {len(table)} blocks")
            refs[table.blocks] += 1
            active[table.blocks] += table.is_active
        named = np.flatnonzero(refs).astype(np.int32)
        for wrong, what in (
            ((blocks.num_refs != refs) | (blocks.num_active != active), "is counted wrongly by its tables"),
            (
                (blocks.num_valid < 0)
                | (blocks.num_scheduled < blocks.num_valid)
                | (blocks.num_scheduled > self._block_size),
                "has impossible lengths",
            ),
        ):
            for block in np.flatnonzero(wrong).tolist():
                raise InvariantError(
                    f"{blocks.describe(block)} {what}: {refs[block]} name it, {active[block]} of them active"
                )
        for block in self._index.named():
            if not refs[block] or self._index.find(blocks.name_of(block)) != block:
                raise InvariantError(f"the index knows {blocks.describe(block)}, which no table names")
        return named

    # -- private

    def _named(self, name: bytes) -> int:
        """The block of that name, which may be new."""
        block = self._index.find(name)
        if block == NO_BLOCK:
            block = self._blocks.new()
            self._set_name(block, name)
        return block

    def _set_name(self, block: int, name: bytes) -> None:
        self._blocks.set_name(block, name)
        self._index.put(name, block)

    def _append(self, table: BlockTable, block: int) -> None:
        table.append(block)
        blocks = self._blocks
        blocks.num_refs[block] += 1
        blocks.last_used[block] = max(blocks.last_used.item(block), table.last_active)
        if table.is_active:
            self._set_active(block, +1)

    def _drop_last(self, table: BlockTable) -> None:
        block = table.pop()
        if table.is_active:
            self._set_active(block, -1)
        self._unref(block)

    def _unref(self, block: int) -> None:
        self._blocks.num_refs[block] -= 1
        if self._blocks.num_refs.item(block):
            return
        name = self._blocks.name_of(block)
        if name != NO_NAME and self._index.find(name) == block:
            self._index.remove(name)
        self._twins.discard(block)
        self._blocks.last_used[block] = 0.0
        self._tiers.retire(block)

    def _name(self, table: BlockTable, i: int, name: bytes) -> None:
        """The block at `i` has become full of known tokens: share it, or take the one that another table
        has.
        """
        mine, known = table[i], self._index.find(name)
        if self._blocks.name_of(mine) != NO_NAME:
            raise InvariantError(f"block {i} was named before")
        if known == NO_BLOCK:
            self._set_name(mine, name)
        elif self._blocks.num_scheduled[known] >= self._blocks.num_scheduled[mine]:
            self._replace(table, i, known)
        else:  # theirs holds less than mine: mine is the one to find, and `activate` lets them change over
            self._twins.add(known)
            self._set_name(mine, name)

    def _holds(self, block: int) -> tuple[int, int]:
        return self._tiers.reach(block), self._blocks.num_scheduled.item(block)

    def _replace(self, table: BlockTable, i: int, by: int) -> None:
        """Go on with block `by`, which has the same tokens, in the place of the one at `i`."""
        mine = table[i]
        table[i] = by
        self._blocks.num_refs[by] += 1
        if table.is_active:
            self._set_active(by, +1)
            self._set_active(mine, -1)
        self._unref(mine)

    def _set_active(self, block: int, by: int) -> None:
        self._tiers.idle.count_one(block, -1)
        self._blocks.num_active[block] += by
        self._tiers.idle.count_one(block, +1)
