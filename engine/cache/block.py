"""Blocks, by number: a block is a row in the columns of `Blocks`.

A block is logical: the KV of one run of `block_size` tokens, wherever it is, or nowhere.  Full blocks are
content-addressed (a chained hash of tenant, parent and tokens) and shared between the tables of
conversations, so whoever brings one back brings it back for all.  There are as many as conversations in
memory have tokens for, most of them idle: hence columns of numbers, some 60 bytes a block, which scans go
through at once.  Only `KVCacheManager` changes them.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NO_SLOT = -1
NO_BLOCK = -1
NAME_BYTES = 16
NO_NAME = bytes(NAME_BYTES)

NOT_COPIED, STORING, LOADING = 0, 1, 2

BlockIds = NDArray[np.int32]


class Residency(Enum):
    """Where a block's KV is."""

    DROPPED = "dropped"  # nowhere: it is computed from tokens when needed
    COMPUTING = "computing"  # a planned step writes some of it
    DEVICE = "device"
    BOTH = "both"  # all of it is on the host as well: its device slot can be given away at no cost
    HOST = "host"
    STORING = "storing"  # a planned step copies it to the host
    LOADING = "loading"  # a planned step copies it to the device


class BlockMove(NamedTuple):
    """A copy between the tiers, either way."""

    device_slot: int
    host_slot: int


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """A copy of `block` that has begun.  It counts only if the block is still of `generation` at its end."""

    block: int
    generation: int
    num_tokens: int  # valid at the source
    move: BlockMove
    is_load: bool


class Blocks:
    """On the device `num_valid` tokens of a block hold KV now; `num_scheduled` will once every planned step
    has been applied.  Steps run in the order they were planned, so a later step may already attend to what
    an earlier one, or the same one, is scheduled to write.  On the host the first `host_valid` tokens hold
    KV; what is written later on the device makes that a shorter copy, never a wrong one.
    """

    slot: NDArray[np.int32]  # the device slot that holds it, or NO_SLOT
    num_valid: NDArray[np.int16]
    num_scheduled: NDArray[np.int16]
    host_slot: NDArray[np.int32]
    host_valid: NDArray[np.int16]
    copying: NDArray[np.int8]  # NOT_COPIED, or a copy has begun and not yet ended
    num_refs: NDArray[np.int32]  # tables that name it
    num_active: NDArray[np.int32]  # those of them whose conversation has a running turn
    last_step: NDArray[np.int64]  # the last planned step that touches it, its copy included
    generation: NDArray[np.int32]  # grows when its content is given up: a late step must not validate it
    last_used: NDArray[np.float64]  # seconds on the engine's clock

    _EMPTY = {
        "slot": (np.int32, NO_SLOT),
        "num_valid": (np.int16, 0),
        "num_scheduled": (np.int16, 0),
        "host_slot": (np.int32, NO_SLOT),
        "host_valid": (np.int16, 0),
        "copying": (np.int8, NOT_COPIED),
        "num_refs": (np.int32, 0),
        "num_active": (np.int32, 0),
        "last_step": (np.int64, 0),
        "generation": (np.int32, 0),
        "last_used": (np.float64, 0.0),
    }

    def __init__(self) -> None:
        for column, (dtype, _) in self._EMPTY.items():
            setattr(self, column, np.empty(0, dtype))
        self._names = bytearray()  # NAME_BYTES of each
        self._spare = array("i")  # numbers that are not in use

    def __len__(self) -> int:
        """Blocks in use."""
        return len(self.slot) - len(self._spare)

    def new(self) -> int:
        """The number of an empty block without a name."""
        if not self._spare:
            self._grow()
        return self._spare.pop()

    def retire(self, block: int) -> None:
        """Nobody knows the block any more, and it has no slot.  Its number will serve another."""
        self.set_name(block, NO_NAME)
        self.generation[block] += 1
        self._spare.append(block)

    def name_of(self, block: int) -> bytes:
        """NO_NAME until all its tokens are known."""
        return bytes(self._names[block * NAME_BYTES : (block + 1) * NAME_BYTES])

    def set_name(self, block: int, name: bytes) -> None:
        self._names[block * NAME_BYTES : (block + 1) * NAME_BYTES] = name

    def residency(self, block: int) -> Residency:
        if copying := self.copying.item(block):
            return Residency.LOADING if copying == LOADING else Residency.STORING
        if self.num_scheduled[block] > self.num_valid[block]:
            return Residency.COMPUTING
        if self.num_valid[block]:
            return Residency.BOTH if self.host_valid[block] >= self.num_valid[block] else Residency.DEVICE
        return Residency.HOST if self.host_valid[block] else Residency.DROPPED

    def describe(self, block: int) -> str:
        """For people who look for a mistake."""
        columns = (f"{name}={getattr(self, name)[block]}" for name in self._EMPTY)
        return f"block {block} ({self.residency(block).value}, {', '.join(columns)})"

    def _grow(self) -> None:
        old = len(self.slot)
        new = max(64, old // 4)
        for column, (dtype, empty) in self._EMPTY.items():
            setattr(self, column, np.concatenate((getattr(self, column), np.full(new, empty, dtype))))
        self._names += NO_NAME * new
        self._spare.extend(range(old + new - 1, old - 1, -1))


def chain_names(tenant: str, parent: bytes | None, token_ids: "array[int]", size: int) -> Iterator[bytes]:
    """The names of consecutive full blocks that hold `token_ids` [num_blocks * size] behind block `parent`.

    A name is 128 bits over the tenant, all tokens before the block (through its parent) and its own tokens.
    """
    data, width = token_ids.tobytes(), size * token_ids.itemsize
    parent = parent if parent is not None else b"continuo\0" + tenant.encode()
    for start in range(0, len(data), width):
        parent = blake2b(parent + data[start : start + width], digest_size=NAME_BYTES).digest()
        yield parent
