"""Which block has which name: a hash table over the column of names, at 4 to 13 bytes a block where a dict
of names would take over a hundred.
"""

from array import array

from engine.cache.block import NO_BLOCK, Blocks


class BlockIndex:
    """Open addressing with linear probing.  Names are hashes already: their first bytes say where to look."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._cells = array("i", [NO_BLOCK]) * 64
        self._num_named = 0

    def __len__(self) -> int:
        return self._num_named

    def find(self, name: bytes) -> int:
        """The block of that name, or NO_BLOCK."""
        return self._cells[self._cell(name)]

    def put(self, name: bytes, block: int) -> None:
        """`block`, which has this name, is the one to find; whoever was found before is not any more."""
        cell = self._cell(name)
        if self._cells[cell] == NO_BLOCK:
            self._num_named += 1
        self._cells[cell] = block
        if self._num_named * 3 > len(self._cells) * 2:
            self._resize(len(self._cells) * 2)

    def remove(self, name: bytes) -> None:
        """Of a block that is found by it.  Those behind it move up, so that no search ends too early."""
        cells, mask = self._cells, len(self._cells) - 1
        hole = at = self._cell(name)
        self._num_named -= 1
        while True:
            at = at + 1 & mask
            if cells[at] == NO_BLOCK:
                break
            home = self._home(self._blocks.name_of(cells[at]))
            if (at - home & mask) >= (at - hole & mask):
                cells[hole] = cells[at]
                hole = at
        cells[hole] = NO_BLOCK
        if 64 < self._num_named * 6 < len(cells):
            self._resize(len(cells) // 2)

    def named(self) -> list[int]:
        """All blocks that can be found."""
        return [block for block in self._cells if block != NO_BLOCK]

    def _home(self, name: bytes) -> int:
        return int.from_bytes(name[:8], "little") & len(self._cells) - 1

    def _cell(self, name: bytes) -> int:
        """Where the name is, or would be put."""
        cells, mask, name_of = self._cells, len(self._cells) - 1, self._blocks.name_of
        at = self._home(name)
        while cells[at] != NO_BLOCK and name_of(cells[at]) != name:
            at = at + 1 & mask
        return at

    def _resize(self, num_cells: int) -> None:
        named = self.named()
        self._cells = array("i", [NO_BLOCK]) * num_cells
        for block in named:
            self._cells[self._cell(self._blocks.name_of(block))] = block
