"""A GPU that runs out of memory at start names the sizes that would fit."""

import pytest
import torch

from engine.cuda.out_of_memory import kv_must_fit, steps_must_fit
from engine.errors import ConfigError
from engine.kv_sizes import KVSizes
from engine.memory import Room

KV = KVSizes(num_blocks=1024, num_host_blocks=0, bytes_per_block=1 << 20, on_gpu=True)


def test_kv_that_finds_no_memory_says_how_much_would() -> None:
    with pytest.raises(ConfigError) as refused, kv_must_fit(KV, 32, lambda: Room(512 << 20, "the GPU")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    assert str(refused.value) == (
        "a KV cache of 32,768 tokens takes 1.0 GiB and 512.0 MiB are left by the GPU; "
        "--device-kv-tokens 14745 would fit"
    )
    assert refused.value.__suppress_context__, "the allocator's own account helps nobody who starts a server"


def test_steps_that_find_no_memory_say_what_to_leave_them() -> None:
    with pytest.raises(ConfigError) as refused, steps_must_fit(KV, 32):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    assert str(refused.value) == (
        "a KV cache of 32,768 tokens leaves too little of the GPU's memory for steps; --device-kv-tokens "
        "29491 leaves them a tenth of it, and a smaller --max-step-tokens asks for less"
    )


def test_other_errors_are_what_they_are() -> None:
    for must_fit in (kv_must_fit(KV, 32, lambda: Room(0, "?")), steps_must_fit(KV, 32)):
        with pytest.raises(RuntimeError, match="illegal address"), must_fit:
            raise RuntimeError("illegal address")
