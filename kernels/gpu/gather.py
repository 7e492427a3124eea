"""Copies of many small pieces between the tiers, by the GPU's own loads and stores: a copy engine spends more
time between small pieces than in them.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import dispatch
from kernels.checks import described
from kernels.gpu.arguments import require_aligned, require_device
from kernels.gpu.launch import Launch, require_gpu

_UNIT = 16  # bytes: an access of a thread, four words
# What a program has under way: 16 KiB, four accesses of each thread in 8 warps.  Twelve programs: 192 KiB; a
# link of 50 GB/s and a round trip of 2 us would need 100 KB.  Unmeasured.
_TILE_WORDS = 4096


def copy_pieces_ref(
    to: Tensor, source: Tensor, to_offsets: Tensor, source_offsets: Tensor, piece_bytes: int
) -> None:
    for a, b in zip(to_offsets.tolist(), source_offsets.tolist(), strict=True):
        to[a : a + piece_bytes] = source[b : b + piece_bytes]


@triton.jit(do_not_specialize=["num_pieces"], do_not_specialize_on_alignment=["to_offsets", "source_offsets"])
def _copy(
    to,
    source,
    to_offsets,
    source_offsets,
    num_pieces,
    WORDS: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The programs take the tiles [PIECES, WIDTH] of words in turn: a part of a piece of WORDS words, or
    several pieces.  The offsets of a tile are loaded while the one before it is on its way.
    """
    PARTS: tl.constexpr = (WORDS + WIDTH - 1) // WIDTH
    num_tiles = tl.cdiv(num_pieces, PIECES) * PARTS
    word = tl.arange(0, WIDTH)[None, :]
    tile = tl.program_id(0)
    piece = (tile // PARTS) * PIECES + tl.arange(0, PIECES)[:, None]
    source_at = tl.load(source_offsets + piece, mask=piece < num_pieces, other=0)
    to_at = tl.load(to_offsets + piece, mask=piece < num_pieces, other=0)
    for this in range(tile, num_tiles, tl.num_programs(0)):
        column = (this % PARTS) * WIDTH + word
        inside = ((this // PARTS) * PIECES + tl.arange(0, PIECES)[:, None] < num_pieces) & (column < WORDS)
        # Multiples of 16 bytes, which the compiler is told by these divisions.
        values = tl.load(source + source_at // 16 * 4 + column, mask=inside, other=0)
        piece = ((this + tl.num_programs(0)) // PARTS) * PIECES + tl.arange(0, PIECES)[:, None]
        next_source_at = tl.load(source_offsets + piece, mask=piece < num_pieces, other=0)
        next_to_at = tl.load(to_offsets + piece, mask=piece < num_pieces, other=0)
        tl.store(to + to_at // 16 * 4 + column, values, mask=inside)
        source_at, to_at = next_source_at, next_to_at


def copy_pieces(
    to: Tensor,
    source: Tensor,
    to_offsets: Tensor,
    source_offsets: Tensor,
    piece_bytes: int,
    num_programs: int = 12,
) -> None:
    """to[to_offsets[i] + j] = source[source_offsets[i] + j] for j < piece_bytes and every i.

    to, source: flat uint8; one of them may lie in pinned host memory, which the GPU reads and writes by
    itself.  Offsets: [N] int64, in bytes, multiples of 16, on the GPU or in pinned memory; on a GPU they are
    not read on the host, and the caller's to keep in range.  Pieces of `to` do not overlap, nor do `to` and
    `source`.  At most `num_programs` multiprocessors are kept from other work.  Raises ValueError.
    """
    _check(to, source, to_offsets, source_offsets, piece_bytes, num_programs)
    device = to.device if to.is_cuda else source.device
    launch = _launch(device, piece_bytes)
    words, pieces, width = (launch.constants[name] for name in ("WORDS", "PIECES", "WIDTH"))
    tiles = triton.cdiv(len(to_offsets), pieces) * triton.cdiv(words, width)
    flat = to.view(torch.int32), source.view(torch.int32)
    launch((min(num_programs, tiles),), *flat, to_offsets, source_offsets, len(to_offsets))


def _check(
    to: Tensor,
    source: Tensor,
    to_offsets: Tensor,
    source_offsets: Tensor,
    piece_bytes: int,
    num_programs: int,
) -> None:
    device = to.device if to.is_cuda else source.device
    if device.type != "cuda" and not dispatch.is_triton(to):
        raise ValueError(f"to or source must be on a GPU, got {described(to)} and {described(source)}")
    if piece_bytes < _UNIT or piece_bytes % _UNIT:
        raise ValueError(f"piece_bytes must be a positive multiple of {_UNIT}, got {piece_bytes}")
    if num_programs < 1:
        raise ValueError(f"num_programs must be at least 1, got {num_programs}")
    for name, x in (("to", to), ("source", source)):
        if x.dtype != torch.uint8 or x.dim() != 1 or not x.is_contiguous() or len(x) % _UNIT:
            wanted = f"flat uint8 of a multiple of {_UNIT} bytes"
            raise ValueError(f"{name} must be {wanted}, got {described(x)}")
        require_aligned(name, x)
        _require_readable(name, x, device)
    if len(to_offsets) != len(source_offsets):
        wanted = f"as many as to_offsets, {len(to_offsets)}"
        raise ValueError(f"source_offsets must be {wanted}, got {len(source_offsets)}")
    for name, offsets, x in (("to_offsets", to_offsets, to), ("source_offsets", source_offsets, source)):
        if offsets.dtype != torch.int64 or offsets.dim() != 1 or not offsets.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64 [N], got {described(offsets)}")
        _require_readable(name, offsets, device)
        if offsets.is_cpu and len(offsets):
            _check_offsets(name, offsets, len(x) - piece_bytes)


def _require_readable(name: str, x: Tensor, device: torch.device) -> None:
    if not x.is_cpu:
        require_device(name, x, device)
    elif device.type == "cuda" and not x.is_pinned():
        raise ValueError(f"{name} must be on {device} or in pinned memory, got {described(x)} in neither")


def _check_offsets(name: str, offsets: Tensor, most: int) -> None:
    if int(offsets.min()) < 0 or int(offsets.max()) > most:
        given = f"{int(offsets.min())} .. {int(offsets.max())}"
        raise ValueError(f"{name} must lie in 0 .. {most}, got {given}")
    if (offsets % _UNIT).any():
        raise ValueError(f"{name} must be multiples of {_UNIT}, got {int(offsets[offsets % _UNIT > 0][0])}")


@functools.cache
def _launch(device: torch.device, piece_bytes: int) -> Launch:
    require_gpu(device)
    words = piece_bytes // 4
    width = min(triton.next_power_of_2(words), _TILE_WORDS)
    return Launch(
        _copy,
        {"to": "*i32", "source": "*i32", "to_offsets": "*i64", "source_offsets": "*i64", "num_pieces": "i32"},
        {"WORDS": words, "PIECES": _TILE_WORDS // width, "WIDTH": width},
        num_warps=8,
        name=f"copy_pieces of {piece_bytes} bytes",
    )


def shipped() -> list[Launch]:
    """Pieces of one layer's block in models small enough to need this, and of a smaller and a larger one."""
    return [_launch(torch.device("cpu"), piece_bytes) for piece_bytes in (2048, 8192, 16384, 24576)]
