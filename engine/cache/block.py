"""A block and the table of a conversation.

A `Block` is logical: the KV of one run of `block_size` tokens, wherever it is, or nowhere.  A
conversation's `BlockTable` names its blocks from position 0 on; a hole is simply a block without KV.  Full
blocks are content-addressed (a chained hash of tenant, parent and tokens) and shared between tables, so
whoever brings one back brings it back for all.  Only `KVCacheManager` changes these objects.
"""

from array import array
from collections.abc import Iterator
from enum import Enum
from hashlib import blake2b

NO_SLOT = -1


class Residency(Enum):
    """Where a block's KV is."""

    DROPPED = "dropped"  # nowhere: it is computed from tokens when needed
    COMPUTING = "computing"  # a planned step writes some of it
    DEVICE = "device"


class Block:
    """The KV of up to `block_size` consecutive tokens.

    `num_valid` tokens hold KV now; `num_scheduled` will once every planned step has been applied.  Steps
    run in the order they were planned, so a later step may already attend to what an earlier one, or the
    same one, is scheduled to write.
    """

    __slots__ = (
        "slot",
        "num_valid",
        "num_scheduled",
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
        self.num_refs = 0  # tables that name it
        self.num_active = 0  # those of them whose conversation has a running turn
        self.num_pins = 0  # launched steps that touch it
        self.generation = 0  # grows when its content is given up, so that a late step cannot validate it
        self.hash = block_hash  # None until all its tokens are known
        self.last_used = 0.0  # seconds on the engine's clock

    @property
    def residency(self) -> Residency:
        if self.num_scheduled > self.num_valid:
            return Residency.COMPUTING
        return Residency.DROPPED if self.slot == NO_SLOT else Residency.DEVICE

    @property
    def evictable(self) -> bool:
        return self.slot != NO_SLOT and not self.num_active and not self.num_pins

    def __repr__(self) -> str:
        return (
            f"Block(slot={self.slot}, valid={self.num_valid}/{self.num_scheduled}, refs={self.num_refs}, "
            f"active={self.num_active}, pins={self.num_pins})"
        )


class BlockTable:
    """The blocks of one conversation, in order.  `num_tokens` are known; the last block may be partial."""

    __slots__ = ("tenant", "blocks", "num_tokens", "is_active", "last_active", "cursor", "num_dropped")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.blocks: list[Block] = []
        self.num_tokens = 0
        self.is_active = False
        self.last_active = 0.0
        self.cursor = 0  # while active: blocks before it are scheduled whole
        self.num_dropped = 0  # while idle: leading blocks that were found without KV


def chain_hashes(tenant: str, parent: bytes | None, token_ids: "array[int]", size: int) -> Iterator[bytes]:
    """The names of consecutive full blocks that hold `token_ids` [num_blocks * size] behind block `parent`.

    A name is 128 bits over the tenant, all tokens before the block (through its parent) and its own tokens.
    """
    data, width = token_ids.tobytes(), size * token_ids.itemsize
    parent = parent if parent is not None else b"continuo\0" + tenant.encode()
    for start in range(0, len(data), width):
        parent = blake2b(parent + data[start : start + width], digest_size=16).digest()
        yield parent
