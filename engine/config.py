"""Every setting of the engine, frozen.  Sizes are in tokens or bytes, times in seconds; None means: decided
at start.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import ConfigError

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
BLOCK_SIZES = (16, 32, 64)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model: Path  # folder in Hugging Face format
    name: str | None = None  # of the model, for people; None: the folder's
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where one can be used
    dtype: DTypeName = "auto"
    block_size: int = 32  # tokens
    device_kv_tokens: int | None = None
    device_kv_bytes: int | None = None
    host_kv_tokens: int | None = None  # KV that leaves the device is kept there; 0: no host tier
    host_kv_bytes: int | None = None
    policy: Literal["retention", "lru", "lru-tail"] = "retention"  # which idle KV leaves first
    profile: Path | None = None  # costs that `continuo profile` measured; must fit this model and machine
    profile_dir: Path | None = None  # where such a file may lie under its own name; None: nowhere
    eager_stores: bool = False  # idle KV is copied to the host at once, not only when slots run out
    verify_reloads: bool = False  # checksums of what is on the host; a mismatch is computed again
    max_step_tokens: int = 512
    max_concurrent: int = 32  # turns computed at once
    max_queue: int = 256  # turns that may wait
    max_conversations: int = (
        10_000  # kept in memory; idle ones beyond it are reloaded from the token log when used
    )
    step_profile: Path | None = None  # a file to be written: where the time of every step goes
    data_dir: Path | None = None  # None: nothing survives the process
    stateless: bool = False  # give KV up after every turn, to compare against
    threads: int | None = None  # of the step; None: all cores
    disconnect_grace_s: float = 10.0  # a turn goes on so long without its client
    stall_s: float = 120.0  # a step that takes longer means that the engine has failed
    run_ahead: int = 0  # 0 or 1: steps planned before the one before them is known

    def __post_init__(self) -> None:
        if self.device == "cuda" and self.verify_reloads:
            raise ConfigError("--verify-reloads is not for a GPU, whose copies the host does not see")
        if self.device == "cuda" and self.step_profile is not None:
            raise ConfigError("--step-profile tells where a CPU's time goes; for a GPU use torch's profiler")
        if self.device == "cpu" and self.dtype == "float16":
            raise ConfigError("dtype float16 has no fast path on CPUs; use bfloat16 or float32")
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(
                f"block size is {self.block_size}; it must be one of {', '.join(map(str, BLOCK_SIZES))}"
            )
        if self.device_kv_tokens is not None and self.device_kv_bytes is not None:
            raise ConfigError("give the KV size in tokens or in memory, not both")
        if self.host_kv_tokens is not None and self.host_kv_bytes is not None:
            raise ConfigError("give the host KV size in tokens or in memory, not both")
        if min(self.host_kv_tokens or 0, self.host_kv_bytes or 0) < 0:
            raise ConfigError("the host KV size is negative; 0 is no host tier")
        if self.profile is not None and self.verify_reloads:
            raise ConfigError("a profile knows nothing of checksums: leave out --profile or --verify-reloads")
        for name in ("max_step_tokens", "max_concurrent", "max_queue", "max_conversations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.run_ahead not in (0, 1):
            raise ConfigError(f"run-ahead is {self.run_ahead}; it must be 0 or 1")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; it must be at least 1")
