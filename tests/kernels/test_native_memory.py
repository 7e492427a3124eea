"""Memory in huge pages: aligned, zero, and gone when nobody looks at it any more."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kernels.native.memory import HUGE_PAGE_BYTES, let_go, populate, zeros

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages by madvise are Linux's")


def resident_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def mapped_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) * 1024


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (3 * HUGE_PAGE_BYTES // 2 + 1, 2)])
def test_zeros_of_every_size_are_zero_and_begin_on_a_huge_page(shape: tuple[int, ...]) -> None:
    tensor = zeros(shape, torch.bfloat16)
    assert tensor.shape == shape and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
    assert not tensor.any() and tensor.data_ptr() % HUGE_PAGE_BYTES == 0
    tensor.fill_(1)
    assert tensor.view(-1)[-1] == 1


def test_memory_lives_as_long_as_its_last_view_and_not_longer() -> None:
    size = 64 << 20
    before = resident_bytes()
    view = zeros((size // 4,), torch.float32).fill_(1)[5:]
    assert resident_bytes() - before > 0.9 * size
    assert view[-1] == 1
    del view
    assert resident_bytes() - before < 0.1 * size


def test_untouched_memory_is_not_taken() -> None:
    before = resident_bytes()
    tensor = zeros((1 << 30,), torch.uint8)
    assert resident_bytes() - before < 16 << 20
    assert len(tensor) == 1 << 30


def test_populated_memory_is_taken_and_keeps_its_values() -> None:
    before = resident_bytes()
    tensor = zeros((256 << 20,), torch.uint8)
    tensor[70 << 20] = 7
    populate(tensor[64 << 20 : 192 << 20])
    if resident_bytes() - before < 32 << 20:
        pytest.skip("this Linux is older than 5.14 and cannot populate memory")
    assert 120 << 20 < resident_bytes() - before < 144 << 20
    assert tensor[70 << 20] == 7 and tensor.count_nonzero() == 1


def test_a_mapped_file_is_let_go_and_comes_back(tmp_path: Path) -> None:
    values = torch.arange(8 << 20, dtype=torch.float32)
    save_file({"a": values, "b": values + 1}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        mapped = file.get_tensor("a"), file.get_tensor("b")
    assert torch.equal(mapped[0], values) and torch.equal(mapped[1], values + 1)
    before = mapped_bytes()
    let_go(mapped[0])
    assert 31 << 20 <= before - mapped_bytes() < 33 << 20
    assert torch.equal(mapped[0], values) and torch.equal(mapped[1], values + 1)


def test_memory_that_is_no_file_is_not_let_go() -> None:
    for tensor in (torch.full((4 << 20,), 7.0), zeros((4 << 20,), torch.float32).fill_(7.0)):
        let_go(tensor)
        assert (tensor == 7.0).all()
