"""Copies of small pieces: every byte of them, and no other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.gpu.gather import copy_pieces, copy_pieces_ref


def pieces(count: int, piece_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """to, source and where so many pieces lie in them: out of order, at multiples of 16, with gaps of 16."""
    places = 2 * count + 3
    step = piece_bytes + 16
    source = torch.randint(1, 256, (places * step,), dtype=torch.uint8)
    to = torch.zeros(places * step, dtype=torch.uint8)
    to_offsets, source_offsets = (torch.randperm(places)[:count] * step + 16 for _ in range(2))
    return to, source, to_offsets, source_offsets


@pytest.mark.parametrize("num_programs", [1, 3, 12])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("piece_bytes", [16, 48, 1024, 8192, 16384, 24576])
def test_pieces_arrive_whole_and_nothing_else_is_written(
    piece_bytes: int, count: int, num_programs: int
) -> None:
    to, *given = pieces(count, piece_bytes)
    expected, source = to.clone(), given[0].clone()
    copy_pieces_ref(expected, *given, piece_bytes)
    assert (expected != 0).sum() == count * piece_bytes
    copy_pieces(to, *given, piece_bytes, num_programs)
    assert torch.equal(to, expected) and torch.equal(given[0], source)


def test_one_piece_may_go_to_several_places() -> None:
    to, source, to_offsets, _ = pieces(5, 2048)
    copy_pieces(to, source, to_offsets, torch.zeros(5, dtype=torch.int64), 2048)
    for at in to_offsets.tolist():
        assert torch.equal(to[at : at + 2048], source[:2048])


def test_the_last_bytes_of_both_can_be_copied() -> None:
    to, source = torch.zeros(4096, dtype=torch.uint8), torch.randint(1, 256, (8192,), dtype=torch.uint8)
    copy_pieces(to, source, torch.tensor([4096 - 48]), torch.tensor([8192 - 48]), 48)
    assert torch.equal(to[-48:], source[-48:]) and not to[:-48].any()


def test_offsets_may_count_more_bytes_than_32_bits(tmp_path: Path) -> None:
    size = 2**33 + 4096
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
    slab = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
    source = torch.randint(1, 256, (64,), dtype=torch.uint8)
    copy_pieces(slab, source, torch.tensor([2**33 + 16, 48]), torch.tensor([0, 32]), 32)
    assert torch.equal(slab[2**33 + 16 :][:32], source[:32]) and torch.equal(slab[48:80], source[32:])
    back = torch.zeros(64, dtype=torch.uint8)
    copy_pieces(back, slab, torch.tensor([0, 32]), torch.tensor([2**33 + 16, 48]), 32)
    assert torch.equal(back, source)


def changed(**changes: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        to, source, to_offsets, source_offsets = pieces(4, 64)
        given = {"to": to, "source": source, "to_offsets": to_offsets, "source_offsets": source_offsets}
        given["piece_bytes"] = 64
        for name, change in changes.items():
            given[name] = change(given[name]) if callable(change) else change
        return given

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(to=lambda x: x.float()), "to must be flat uint8 of a multiple of 16 bytes, got float32"),
        (changed(source=lambda x: x.view(-1, 16)), r"source must be flat uint8 .* got uint8 \[55, 16\]"),
        (changed(source=lambda x: x[::2]), r"source must be flat uint8 .* with strides \(2,\)"),
        (changed(to=lambda x: x[:-1]), r"to must be .* a multiple of 16 bytes, got uint8 \[879\]"),
        (changed(to=lambda x: x[8:-8]), "to must begin at a multiple of 16 bytes"),
        (
            changed(to_offsets=lambda x: x.int()),
            r"to_offsets must be contiguous int64 \[N\], got int32 \[4\]",
        ),
        (changed(source_offsets=lambda x: x[::2]), "source_offsets must be as many as to_offsets, 4, got 2"),
        (
            changed(source_offsets=lambda x: torch.stack((x, x), dim=1)[:, 0]),
            r"source_offsets must be contiguous int64 \[N\], got int64 \[4\] with strides \(2,\)",
        ),
        (changed(to_offsets=lambda x: x.new_full((4,), -16)), r"to_offsets must lie in 0 \.\. 816, got -16"),
        (changed(source_offsets=lambda x: x.new_full((4,), 832)), r"lie in 0 \.\. 816, got 832 \.\. 832"),
        (changed(source_offsets=lambda x: x + 8), "source_offsets must be multiples of 16, got "),
        (changed(piece_bytes=0), "piece_bytes must be a positive multiple of 16, got 0"),
        (changed(piece_bytes=72), "piece_bytes must be a positive multiple of 16, got 72"),
        (lambda: changed()() | {"num_programs": 0}, "num_programs must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Callable[[], dict[str, Any]], message: str) -> None:
    given = make()
    with pytest.raises(ValueError, match=message):
        copy_pieces(**given)


def test_memory_that_no_gpu_reaches_is_refused() -> None:
    with dispatch.use("torch"), pytest.raises(ValueError, match="to or source must be on a GPU, got uint8"):
        copy_pieces(*pieces(1, 16), 16)
