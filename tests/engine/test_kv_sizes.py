"""How much memory each tier gets, and what is said where that cannot be."""

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_sizes import KVSizes
from engine.memory import Room

PER_TOKEN = 1024  # bytes


def sizes(free: int = 1 << 30, lockable: int | None = None, **settings: object) -> KVSizes:
    config = EngineConfig(Path("m"), **settings)  # type: ignore[arg-type]
    pinning = None if lockable is None else Room(lockable, "RLIMIT_MEMLOCK")
    return KVSizes.of(config, PER_TOKEN, Room(free, "the control group /pod"), pinning)


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
        (
            {"device_kv_tokens": 1 << 21},
            "a KV cache of 2,097,152 tokens takes 2.0 GiB and 1.0 GiB are left by the control group /pod",
        ),
        ({"host_kv_tokens": 31}, "host KV cache would hold 31 tokens; give it at least 32"),
        ({"host_kv_tokens": 64, "host_kv_bytes": 64}, "tokens or in memory, not both"),
        ({"host_kv_tokens": -1}, "host KV size is negative"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(settings: dict[str, int], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        sizes(**settings)


def test_a_host_tier_that_does_not_fit_becomes_one_that_does_and_says_so() -> None:
    got = sizes(device_kv_tokens=1 << 19, host_kv_tokens=1 << 20)
    assert got.num_blocks == (1 << 19) // 32
    assert got.num_host_blocks == int(0.9 * (1 << 19)) // 32
    assert got.warning == (
        "a host KV cache of 1,048,576 tokens takes 1.0 GiB and 512.0 MiB are left by the control group /pod "
        "beside the device tier: it holds 471,840 tokens instead"
    )
    assert got.describe(32).endswith("host 471,840 tokens, 0.45 GiB at most, 115 more (less than asked for)")


def test_a_host_tier_that_just_fits_is_left_as_it_is() -> None:
    got = sizes(device_kv_tokens=1 << 19, host_kv_tokens=1 << 19)
    assert (got.num_host_blocks, got.warning) == ((1 << 19) // 32, None)
    assert "less than asked for" not in got.describe(32)


def test_where_memory_must_be_pinned_its_limit_binds_the_host_tier_alone() -> None:
    got = sizes(lockable=8 << 20, device_kv_tokens=1 << 15, host_kv_tokens=1 << 14)
    assert (got.num_blocks, got.num_host_blocks) == ((1 << 15) // 32, int(0.9 * (1 << 13)) // 32)
    assert (
        got.warning is not None and "8.0 MiB are left by RLIMIT_MEMLOCK: it holds 7,360 tokens" in got.warning
    )
    roomy = sizes(lockable=1 << 40, device_kv_tokens=1 << 15, host_kv_tokens=1 << 14)
    assert (roomy.num_host_blocks, roomy.warning) == ((1 << 14) // 32, None)


def test_a_host_tier_of_which_not_even_a_block_would_be_left_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="left by RLIMIT_MEMLOCK: not even a block; make more room, or leave"
    ):
        sizes(lockable=32 * PER_TOKEN, host_kv_tokens=64)
    with pytest.raises(ConfigError, match="beside the device tier: not even a block"):
        sizes(free=64 * PER_TOKEN, device_kv_tokens=64, host_kv_tokens=64)
