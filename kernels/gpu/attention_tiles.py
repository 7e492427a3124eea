"""How large the tiles of attention are on a GPU, by what its kernels are specialised on."""

from dataclasses import dataclass, replace

import torch

from kernels.gpu.plan import KINDS, Tiling


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int | None = None  # of a multiprocessor; None: one for each item


# By kind of item, padded head size and bytes of an element.  All unmeasured: chosen from compiled code, so
# that nothing spills.
_TABLE: dict[tuple[str, int, int], Tile] = {
    ("short", 64, 2): Tile(16, 64, 4, 4, 4),
    ("middle", 64, 2): Tile(64, 64, 4, 3),
    ("long", 64, 2): Tile(128, 64, 8, 3),
    ("short", 128, 2): Tile(16, 64, 4, 4, 2),
    ("middle", 128, 2): Tile(64, 64, 4, 3),
    ("long", 128, 2): Tile(128, 64, 8, 3),
    ("short", 256, 2): Tile(16, 32, 4, 4, 2),
    ("middle", 256, 2): Tile(64, 32, 8, 2),
    ("long", 256, 2): Tile(64, 32, 8, 2),
    ("short", 64, 4): Tile(16, 32, 4, 3, 2),
    ("middle", 64, 4): Tile(32, 32, 8, 2),
    ("long", 64, 4): Tile(64, 32, 8, 2),
    ("short", 128, 4): Tile(16, 16, 4, 3, 2),
    ("middle", 128, 4): Tile(32, 16, 8, 2),
    ("long", 128, 4): Tile(32, 16, 8, 2),
    ("short", 256, 4): Tile(16, 16, 4, 2, 1),
    ("middle", 256, 4): Tile(32, 16, 8, 2),
    ("long", 256, 4): Tile(32, 16, 8, 2),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernels are specialised on."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    size: int
    slots: int
    block_stride: int  # elements
    has_softcap: bool = False

    @property
    def width(self) -> int:
        return max(16, _power_of_two(self.size))

    def tile(self, kind: int) -> Tile:
        """At least as many rows as a KV head has query heads."""
        tile = _TABLE[KINDS[kind], max(64, self.width), self.dtype.itemsize]
        return replace(tile, rows=max(tile.rows, _power_of_two(self.heads // self.kv_heads)))

    def tiling(self, chunk: int) -> Tiling:
        short, middle, long = (self.tile(kind).rows // (self.heads // self.kv_heads) for kind in range(3))
        return Tiling(short, middle, long, chunk)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
