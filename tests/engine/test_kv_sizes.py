"""How much memory each tier gets, and what is said where that cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_sizes import FIXED_WORKSPACE_BYTES, KVSizes, gpu_room, workspace_bytes
from engine.memory import Room
from engine.models.config import ModelConfig
from tests.models.config_files import read

PER_TOKEN = 1024  # bytes
GPU = "the memory of NVIDIA H200"


def sizes(
    free: int = 1 << 30, lockable: int | None = None, gpu: int | None = None, **settings: object
) -> KVSizes:
    config = EngineConfig(Path("m"), **settings)  # type: ignore[arg-type]
    pinning = None if lockable is None else Room(lockable, "RLIMIT_MEMLOCK")
    of_gpu = None if gpu is None else Room(gpu, GPU)
    return KVSizes.of(config, PER_TOKEN, Room(free, "the control group /pod"), pinning, of_gpu)


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


# -- on a GPU


def test_a_gpu_gives_most_of_what_is_left_and_the_host_half_of_its_own() -> None:
    got = sizes(gpu=2 << 30, free=1 << 30)
    assert got.num_blocks == int(0.9 * (2 << 30)) // PER_TOKEN // 32
    assert got.num_host_blocks == (1 << 29) // PER_TOKEN // 32
    assert got.describe(32) == (
        "KV 1,887,424 tokens, 1.80 GiB, room for 460 conversations of 4K | "
        "host 524,288 tokens, 0.50 GiB pinned, 128 more"
    )


def test_neither_tier_of_a_gpu_takes_by_itself_what_it_could_never_use() -> None:
    got = sizes(gpu=1 << 40, free=1 << 40)
    assert (got.num_blocks, got.num_host_blocks) == ((1 << 22) // 32, (1 << 22) // 32)
    config = EngineConfig(Path("m"))
    wide = KVSizes.of(config, 1 << 20, Room(1 << 40, "all"), None, Room(1 << 40, GPU))
    assert wide.num_host_blocks == (64 << 30) // (32 << 20), "pinning takes its time at every start"


def test_the_host_tier_of_a_gpu_is_no_more_than_can_be_pinned() -> None:
    got = sizes(gpu=1 << 30, lockable=100 * 32 * PER_TOKEN)
    assert (got.num_host_blocks, got.warning) == (90, None)
    assert sizes(gpu=1 << 30, lockable=1 << 14).num_host_blocks == 0, "nobody asked for it: nothing to refuse"


@pytest.mark.parametrize("settings", [{"host_kv_tokens": 0}, {"host_kv_bytes": 0}, {"stateless": True}])
def test_a_gpu_has_no_host_tier_where_that_is_said_or_of_no_use(settings: dict[str, Any]) -> None:
    got = sizes(gpu=1 << 30, **settings)
    assert got.num_host_blocks == 0 and "host" not in got.describe(32)


def test_the_tiers_of_a_gpu_do_not_share_memory() -> None:
    got = sizes(gpu=1 << 20, free=1 << 20, device_kv_tokens=1024, host_kv_tokens=1024)
    assert (got.num_blocks, got.num_host_blocks, got.warning) == (32, 32, None)
    less = sizes(gpu=1 << 20, free=1 << 20, host_kv_tokens=2048)
    assert less.warning is not None and "are left by the control group /pod: it holds" in less.warning


def test_what_a_gpu_does_not_hold_is_refused_with_what_it_would_hold() -> None:
    complaint = "a KV cache of 2,048 tokens takes 2.0 MiB and 1.0 MiB are left by the memory of NVIDIA H200"
    with pytest.raises(ConfigError, match=f"{complaint}; --device-kv-tokens 921 would fit"):
        sizes(gpu=1 << 20, device_kv_tokens=2048)
    late = sizes(gpu=1 << 30, device_kv_tokens=2048).refused(32, Room(1 << 20, GPU))
    assert str(late) == f"{complaint}; --device-kv-tokens 921 would fit"


def llama(folder: Path, **changes: object) -> ModelConfig:
    heads = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes = {"intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    return read(folder, {**heads, **sizes, "max_position_embeddings": 131072, **changes})


def test_steps_keep_room_beside_kv(tmp_path: Path) -> None:
    model, config = llama(tmp_path), EngineConfig(Path("m"))
    free = Room(100 << 30, GPU)
    left = gpu_room(config, model, 2, free)
    reserved = workspace_bytes(config, model, 2, 131072)
    assert left.num_bytes == free.num_bytes - reserved
    assert left.limit == f"{GPU} beside {reserved / 2**30:.1f} GiB for steps"
    assert 1 << 30 < reserved < 4 << 30
    few = EngineConfig(Path("m"), device_kv_tokens=4096)
    assert gpu_room(few, model, 2, free).num_bytes > left.num_bytes, "no context is longer than the KV cache"


@pytest.mark.parametrize(
    "more", [{"max_step_tokens": 8192}, {"max_concurrent": 256}], ids=["rows", "conversations"]
)
def test_larger_steps_keep_more(more: dict[str, int], tmp_path: Path) -> None:
    model, usual = llama(tmp_path), EngineConfig(Path("m"))
    larger = EngineConfig(Path("m"), **more)  # type: ignore[arg-type]
    assert workspace_bytes(larger, model, 2, 4096) > workspace_bytes(usual, model, 2, 4096) * 1.05


def test_a_gpu_that_steps_alone_would_fill_is_refused(tmp_path: Path) -> None:
    complaint = r"steps may take .* GiB and 1.0 GiB are left by .* \(--max-step-tokens, now 512\)"
    with pytest.raises(ConfigError, match=complaint):
        gpu_room(EngineConfig(Path("m")), llama(tmp_path), 2, Room(1 << 30, GPU))


@pytest.mark.parametrize("max_step_tokens", [512, 4096])
def test_partial_results_of_attention_find_the_room_that_is_kept_for_them(
    max_step_tokens: int, tmp_path: Path
) -> None:
    """As the kernels' plan counts them, in its worst cases."""
    plan = pytest.importorskip("kernels.gpu.plan")
    from kernels.paged_attention import Extents

    context, config = 131072, EngineConfig(Path("m"), max_step_tokens=max_step_tokens, max_concurrent=64)
    model = llama(tmp_path, head_dim=128)
    kept = workspace_bytes(config, model, 2, context) - workspace_bytes(config, model, 2, 0)
    tiling = plan.Tiling(4, 16, 32)
    for lengths in ([1] * 64, [4] * 64, [16] * 32, [256] * (max_step_tokens // 256)):
        extents = Extents(np.array(lengths), np.full(len(lengths), context))
        partials = plan.bounds(extents, tiling, None).partials
        assert 0 < partials * 32 * (128 + 1) * 4 <= kept
    assert workspace_bytes(config, model, 2, 0) > FIXED_WORKSPACE_BYTES
