"""How many blocks each tier gets, from what was asked for and what memory is free."""

from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.memory import Room

KV_SHARE = 0.3
"""Of the memory that is left once the model is loaded.  It is taken only as it is used."""
MAX_DEFAULT_KV_TOKENS = 1 << 20


FITTING_SHARE = 0.9
"""Of the room there is: a tier that is made to fit leaves some to everything else."""


@dataclass(frozen=True, slots=True)
class KVSizes:
    num_blocks: int
    num_host_blocks: int  # 0: no host tier
    bytes_per_block: int
    warning: str | None = None  # the host tier is smaller than was asked for, and why

    @classmethod
    def of(
        cls, config: EngineConfig, bytes_per_token: int, free: Room, lockable: Room | None = None
    ) -> "KVSizes":
        """`free` is left for both tiers; of the host tier, no more than `lockable` can be had.

        A host tier that does not fit becomes one that does.  Raises ConfigError if the device tier does not
        fit, or less than a block would be left of the host tier.
        """
        size = config.block_size
        device = _tokens(config.device_kv_tokens, config.device_kv_bytes, bytes_per_token)
        host = _tokens(config.host_kv_tokens, config.host_kv_bytes, bytes_per_token) or 0
        if device is None:
            device = min(int(free.num_bytes * KV_SHARE) // bytes_per_token, MAX_DEFAULT_KV_TOKENS)
        if device < 2 * size:
            raise ConfigError(
                f"the KV cache would hold {device} tokens; give it at least {2 * size} (two blocks)"
            )
        if device * bytes_per_token > free.num_bytes:
            raise ConfigError(
                f"{_does_not_fit('', device, bytes_per_token, free)}; "
                f"--device-kv-tokens {_fitting(free, bytes_per_token)} would fit"
            )
        if 0 < host < size:
            raise ConfigError(
                f"the host KV cache would hold {host} tokens; give it at least {size} (a block), or 0"
            )
        room = Room(free.num_bytes - device * bytes_per_token, f"{free.limit} beside the device tier")
        if lockable is not None and lockable.num_bytes < room.num_bytes:
            room = lockable
        warning = None
        if host * bytes_per_token > room.num_bytes:
            fitting = _fitting(room, bytes_per_token) // size * size
            complaint = _does_not_fit("host ", host, bytes_per_token, room)
            if not fitting:
                raise ConfigError(
                    f"{complaint}: not even a block; make more room, or leave out the host tier"
                )
            host, warning = fitting, f"{complaint}: it holds {fitting:,} tokens instead"
        return cls(device // size, host // size, size * bytes_per_token, warning)

    def describe(self, block_size: int) -> str:
        """For people."""
        tokens = self.num_blocks * block_size
        host = self.num_host_blocks
        return (
            f"KV {tokens:,} tokens, {self.num_blocks * self.bytes_per_block / 2**30:.2f} GiB at most, "
            f"room for {tokens // 4096:,} conversations of 4K"
        ) + (
            f" | host {host * block_size:,} tokens, {host * self.bytes_per_block / 2**30:.2f} GiB at most, "
            f"{host * block_size // 4096:,} more{' (less than asked for)' if self.warning else ''}"
            if host
            else ""
        )


def _tokens(tokens: int | None, num_bytes: int | None, bytes_per_token: int) -> int | None:
    return tokens if num_bytes is None else num_bytes // bytes_per_token


def _fitting(room: Room, bytes_per_token: int) -> int:
    """Tokens."""
    return int(room.num_bytes * FITTING_SHARE) // bytes_per_token


def _does_not_fit(which: str, tokens: int, bytes_per_token: int, room: Room) -> str:
    return (
        f"a {which}KV cache of {tokens:,} tokens takes {_in_units(tokens * bytes_per_token)} "
        f"and {_in_units(room.num_bytes)} are left by {room.limit}"
    )


def _in_units(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"
