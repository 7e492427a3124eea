"""How much memory each tier gets, and what is said where that cannot be."""

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_sizes import KVSizes

PER_TOKEN = 1024  # bytes


def sizes(free: int = 1 << 30, **settings: object) -> KVSizes:
    return KVSizes.of(EngineConfig(Path("m"), **settings), PER_TOKEN, free)  # type: ignore[arg-type]


def test_without_being_asked_the_device_gets_a_share_of_what_is_free_and_the_host_nothing() -> None:
    got = sizes(free=1 << 30)
    assert got == KVSizes(int((1 << 30) * 0.3) // PER_TOKEN // 32, 0, 32 * PER_TOKEN)
    assert "host" not in got.describe(32)


def test_tokens_and_bytes_ask_for_the_same() -> None:
    in_tokens = sizes(device_kv_tokens=4096, host_kv_tokens=8192)
    assert in_tokens == sizes(device_kv_bytes=4096 * PER_TOKEN, host_kv_bytes=8192 * PER_TOKEN)
    assert (in_tokens.num_blocks, in_tokens.num_host_blocks) == (128, 256)
    assert in_tokens.describe(32) == (
        "KV 4,096 tokens, 0.00 GiB at most, room for 1 conversations of 4K | "
        "host 8,192 tokens, 0.01 GiB at most, 2 more"
    )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"device_kv_tokens": 63}, "would hold 63 tokens; give it at least 64"),
        ({"device_kv_tokens": 1 << 21}, "--device-kv-tokens 943718 would fit"),
        ({"device_kv_tokens": 1 << 19, "host_kv_tokens": 1 << 20}, "--host-kv-tokens 471859 would fit"),
        ({"host_kv_tokens": 31}, "host KV cache would hold 31 tokens; give it at least 32"),
        ({"host_kv_tokens": 64, "host_kv_bytes": 64}, "tokens or in memory, not both"),
        ({"host_kv_tokens": -1}, "host KV size is negative"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(settings: dict[str, int], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        sizes(**settings)
