"""A block and the table of a conversation.

A `Block` is logical: the KV of one run of `block_size` tokens, wherever it is, or nowhere.  A
conversation's `BlockTable` names its blocks from position 0 on; a hole is simply a block without KV.  Full
blocks are content-addressed (a chained hash of tenant, parent and tokens) and shared between tables, so
whoever brings one back brings it back for all.  Only `KVCacheManager` changes these objects.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import NamedTuple

NO_SLOT = -1


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

    block: "Block"
    generation: int
    num_tokens: int  # valid at the source
    move: BlockMove
    is_load: bool


class Block:
    """The KV of up to `block_size` consecutive tokens.

    On the device `num_valid` tokens hold KV now; `num_scheduled` will once every planned step has been
    applied.  Steps run in the order they were planned, so a later step may already attend to what an earlier
    one, or the same one, is scheduled to write.  On the host the first `host_valid` tokens hold KV; what is
    written later on the device makes that a shorter copy, never a wrong one.
    """

    __slots__ = (
        "slot",
        "num_valid",
        "num_scheduled",
        "host_slot",
        "host_valid",
        "copy",
        "num_refs",
        "num_active",
        "num_pins",
        "generation",
        "hash",
        "last_used",
    )

    def __init__(self, block_hash: bytes | None = None) -> None:
        self.slot = NO_SLOT  # the device block that holds it
        self.num_valid = 0
        self.num_scheduled = 0
        self.host_slot = NO_SLOT
        self.host_valid = 0
        self.copy: Copy | None = None  # between the tiers, begun and not yet ended
        self.num_refs = 0  # tables that name it
        self.num_active = 0  # those of them whose conversation has a running turn
        self.num_pins = 0  # launched steps that touch it, its copy included
        self.generation = 0  # grows when its content is given up, so that a late step cannot validate it
        self.hash = block_hash  # None until all its tokens are known
        self.last_used = 0.0  # seconds on the engine's clock

    @property
    def residency(self) -> Residency:
        if self.copy is not None:
            return Residency.LOADING if self.copy.is_load else Residency.STORING
        if self.num_scheduled > self.num_valid:
            return Residency.COMPUTING
        if self.num_valid:
            return Residency.BOTH if self.host_valid >= self.num_valid else Residency.DEVICE
        return Residency.HOST if self.host_valid else Residency.DROPPED

    @property
    def evictable(self) -> bool:
        """Its device slot may be given to another block."""
        return self.slot != NO_SLOT and not self.num_active and not self.num_pins

    @property
    def clean(self) -> bool:
        """Nothing is lost with its device slot."""
        return self.host_valid >= self.num_valid

    @property
    def evictable_from_host(self) -> bool:
        return self.host_slot != NO_SLOT and not self.num_active and not self.num_pins

    @property
    def num_reloadable(self) -> int:
        """Tokens that are on the host, or on their way, while nothing of the block is on the device."""
        if self.num_scheduled:
            return 0
        return self.host_valid if self.copy is None else self.copy.num_tokens

    @property
    def reach(self) -> int:
        """Tokens that hold KV somewhere, or will."""
        return max(self.num_scheduled, self.host_valid, 0 if self.copy is None else self.copy.num_tokens)

    def __repr__(self) -> str:
        return (
            f"Block({self.residency.value}, slot={self.slot}, valid={self.num_valid}/{self.num_scheduled}, "
            f"host_slot={self.host_slot}, host_valid={self.host_valid}, refs={self.num_refs}, "
            f"active={self.num_active}, pins={self.num_pins})"
        )


class BlockTable:
    """The blocks of one conversation, in order.  `num_tokens` are known; the last block may be partial."""

    __slots__ = ("tenant", "blocks", "num_tokens", "is_active", "last_active", "cursor", "passed")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.blocks: list[Block] = []
        self.num_tokens = 0
        self.is_active = False
        self.last_active = 0.0
        self.cursor = 0  # while active: blocks before it are scheduled whole
        self.passed = [0, 0, 0]  # while idle, by `eviction.Way`: blocks at its beginning found to be through


def chain_hashes(tenant: str, parent: bytes | None, token_ids: "array[int]", size: int) -> Iterator[bytes]:
    """The names of consecutive full blocks that hold `token_ids` [num_blocks * size] behind block `parent`.

    A name is 128 bits over the tenant, all tokens before the block (through its parent) and its own tokens.
    """
    data, width = token_ids.tobytes(), size * token_ids.itemsize
    parent = parent if parent is not None else b"continuo\0" + tenant.encode()
    for start in range(0, len(data), width):
        parent = blake2b(parent + data[start : start + width], digest_size=16).digest()
        yield parent
