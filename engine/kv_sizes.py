"""How many blocks each tier gets, from what was asked for and what memory is free."""

from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import ConfigError

KV_SHARE = 0.3
"""Of the memory that is left once the model is loaded.  It is taken only as it is used."""
MAX_DEFAULT_KV_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class KVSizes:
    num_blocks: int
    num_host_blocks: int  # 0: no host tier
    bytes_per_block: int

    @classmethod
    def of(cls, config: EngineConfig, bytes_per_token: int, free: int) -> "KVSizes":
        """`free` bytes are left for both tiers.  Raises ConfigError."""
        size = config.block_size
        device = _tokens(config.device_kv_tokens, config.device_kv_bytes, bytes_per_token)
        host = _tokens(config.host_kv_tokens, config.host_kv_bytes, bytes_per_token) or 0
        if device is None:
            device = min(int(free * KV_SHARE) // bytes_per_token, MAX_DEFAULT_KV_TOKENS)
        if device < 2 * size:
            raise ConfigError(
                f"the KV cache would hold {device} tokens; give it at least {2 * size} (two blocks)"
            )
        for tokens, flag, room in (
            (device, "--device-kv-tokens", free),
            (host, "--host-kv-tokens", free - device * bytes_per_token),
        ):
            if tokens * bytes_per_token > room:
                raise ConfigError(
                    f"a KV cache of {tokens:,} tokens takes {tokens * bytes_per_token / 2**30:.1f} GiB "
                    f"and {room / 2**30:.1f} GiB are free; "
                    f"{flag} {int(room * 0.9) // bytes_per_token} would fit"
                )
        if 0 < host < size:
            raise ConfigError(
                f"the host KV cache would hold {host} tokens; give it at least {size} (a block), or 0"
            )
        return cls(device // size, host // size, size * bytes_per_token)

    def describe(self, block_size: int) -> str:
        """For people."""
        tokens = self.num_blocks * block_size
        host = self.num_host_blocks
        return (
            f"KV {tokens:,} tokens, {self.num_blocks * self.bytes_per_block / 2**30:.2f} GiB at most, "
            f"room for {tokens // 4096:,} conversations of 4K"
        ) + (
            f" | host {host * block_size:,} tokens, {host * self.bytes_per_block / 2**30:.2f} GiB at most, "
            f"{host * block_size // 4096:,} more"
            if host
            else ""
        )


def _tokens(tokens: int | None, num_bytes: int | None, bytes_per_token: int) -> int | None:
    return tokens if num_bytes is None else num_bytes // bytes_per_token
