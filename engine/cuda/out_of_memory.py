"""What is said at start where a GPU has less memory than it seemed: the sizes that would fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from engine.kv_sizes import KVSizes
from engine.memory import Room


@contextmanager
def kv_must_fit(kv: KVSizes, block_size: int, room: Callable[[], Room]) -> Iterator[None]:
    """The body takes the memory of the device tier.  ConfigError where it runs out, by what `room` then says
    is left for KV.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise kv.refused(block_size, room()) from None


@contextmanager
def steps_must_fit(kv: KVSizes, block_size: int) -> Iterator[None]:
    """The body runs steps of every size, as serving will.  ConfigError where they run out of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise kv.crowds_out(block_size) from None
