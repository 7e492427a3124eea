"""Memory for what is read from end to end at every step: huge pages where the system gives them.

With 4 KB pages the cores look up addresses so often that they read a fifth less per second.
"""

import ctypes
import mmap
import sys
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
_MADV_POPULATE_WRITE = 23  # the mmap module does not know it


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory of their own, given back when the tensor and all its views are gone.  Linux only.

    They take up what is written to, by whole huge pages; what remains behind the last of these lies in
    ordinary pages.  Before, the heap gives back what it holds free: packed weights no longer fill the holes
    that the plain ones leave there.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # in glibc only
        trim(0)
    size = prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE_BYTES
    if whole := size // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES:
        with suppress(OSError):  # a kernel built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, begin, whole)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=begin).view(shape)


def populate(part: Tensor) -> None:
    """Takes the memory of a contiguous `part` of such a tensor now, not when it is first written; its values
    stay.  On a virtual machine whose host has yet to find the memory, that costs a second for 400 MB.  Other
    threads run meanwhile.  Where the system cannot (Linux before 5.14), nothing happens.
    """
    begin = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = ctypes.c_size_t(part.data_ptr() + part.nbytes - begin)
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), size, _MADV_POPULATE_WRITE)


def let_go(mapped: Tensor) -> None:
    """Gives up the pages of a tensor that lies in a mapped file and was not written: they come back when they
    are read.  Without that, a file that was read once counts as memory of the process for as long as any of
    it is mapped.  Any other tensor is left as it is.
    """
    begin = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and _is_in_a_file(begin, end):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _is_in_a_file(begin: int, end: int) -> bool:
    """Whether all these addresses are one file's."""
    if sys.platform != "linux":
        return False
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= begin < last:
            return end <= last and inode != "0"
    return False
