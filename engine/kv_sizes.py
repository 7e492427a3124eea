"""How many blocks each tier gets, from what was asked for and what memory is free.

On a CPU both tiers share the host's memory, and the host tier is only there if asked for.  On a GPU the
device tier takes most of what weights and steps leave there; the host tier is of the host's memory.
"""

from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.memory import Room
from engine.models.config import ModelConfig

KV_SHARE = 0.3
"""Of the host's memory that is left once the model is loaded.  It is taken only as it is used."""
MAX_DEFAULT_KV_TOKENS = 1 << 20

GPU_KV_SHARE = 0.9
"""Of the GPU's memory that is left beside weights and workspace: nothing else is to run there."""
PINNED_SHARE = 0.5
"""Of the host's free memory, for the host tier of a GPU.  Pinned memory is taken at once and never given
back: tokenizers, the token log and what the system caches must do with the rest.
"""
MAX_DEFAULT_PINNED_BYTES = 64 << 30
"""To pin memory takes time at every start, and that much some seconds."""
MAX_DEFAULT_GPU_KV_TOKENS = 1 << 22
"""Of either tier of a GPU: each block costs the host some bookkeeping."""

FITTING_SHARE = 0.9
"""Of the room there is: a tier that is made to fit leaves some to everything else."""

FIXED_WORKSPACE_BYTES = 1 << 30
"""Unmeasured: code of kernels that is loaded when it first runs, cuBLAS's scratch memory, captured graphs
themselves, the tables of rows and block ids.
"""
# From kernels/gpu/plan.py, where keys are cut into chunks, and a row has a partial result for each:
_CHUNK = 512  # positions of a chunk, and twice as many where the segment is not short
_MOST_SHORT = 16  # rows of a short segment
_MOST_CHUNKS = 32  # of a segment that is not


@dataclass(frozen=True, slots=True)
class KVSizes:
    num_blocks: int
    num_host_blocks: int  # 0: no host tier
    bytes_per_block: int
    warning: str | None = None  # the host tier is smaller than was asked for, and why
    on_gpu: bool = False  # memory is taken as a whole, at the start

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        bytes_per_token: int,
        free: Room,
        lockable: Room | None = None,
        gpu: Room | None = None,
    ) -> "KVSizes":
        """`gpu` is left for the device tier and `free` for the host tier; without a GPU `free` is left for
        both.  Of the host tier, no more than `lockable` can be had.

        A host tier that does not fit becomes one that does.  Raises ConfigError if the device tier does not
        fit, or less than a block would be left of the host tier.
        """
        size = config.block_size
        device = _tokens(config.device_kv_tokens, config.device_kv_bytes, bytes_per_token)
        host = _tokens(config.host_kv_tokens, config.host_kv_bytes, bytes_per_token)
        room = gpu or free
        if device is None:
            share, most = (
                (GPU_KV_SHARE, MAX_DEFAULT_GPU_KV_TOKENS) if gpu else (KV_SHARE, MAX_DEFAULT_KV_TOKENS)
            )
            device = min(int(room.num_bytes * share) // bytes_per_token, most)
        if device < 2 * size:
            raise ConfigError(
                f"the KV cache would hold {device} tokens; give it at least {2 * size} (two blocks)"
            )
        if device * bytes_per_token > room.num_bytes:
            raise _no_room(device, bytes_per_token, room)
        if gpu is None:
            free = Room(free.num_bytes - device * bytes_per_token, f"{free.limit} beside the device tier")
        host, warning = _host_tokens(config, host, bytes_per_token, free, lockable, has_gpu=gpu is not None)
        return cls(device // size, host // size, size * bytes_per_token, warning, gpu is not None)

    def refused(self, block_size: int, room: Room) -> ConfigError:
        """For a device tier that `room` turned out not to hold: an error that says what would fit."""
        return _no_room(self.num_blocks * block_size, self.bytes_per_block // block_size, room)

    def crowds_out(self, block_size: int) -> ConfigError:
        """For a device tier beside which steps turned out not to fit."""
        tokens = self.num_blocks * block_size
        return ConfigError(
            f"a KV cache of {tokens:,} tokens leaves too little of the GPU's memory for steps; "
            f"--device-kv-tokens {int(tokens * FITTING_SHARE)} leaves them a tenth of it, "
            f"and a smaller --max-step-tokens asks for less"
        )

    def describe(self, block_size: int) -> str:
        """For people."""
        tokens = self.num_blocks * block_size
        host = self.num_host_blocks
        on_device, on_host = ("", "pinned, ") if self.on_gpu else (" at most", "at most, ")
        return (
            f"KV {tokens:,} tokens, {self.num_blocks * self.bytes_per_block / 2**30:.2f} GiB{on_device}, "
            f"room for {tokens // 4096:,} conversations of 4K"
        ) + (
            f" | host {host * block_size:,} tokens, {host * self.bytes_per_block / 2**30:.2f} GiB {on_host}"
            f"{host * block_size // 4096:,} more{' (less than asked for)' if self.warning else ''}"
            if host
            else ""
        )


def gpu_room(config: EngineConfig, model: ModelConfig, itemsize: int, free: Room) -> Room:
    """What is left for KV of a GPU's free memory, once the weights are there.  `itemsize`: bytes of a number
    that the model computes in.  Raises ConfigError.
    """
    bytes_per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize
    context = min(model.max_positions, config.device_kv_tokens or free.num_bytes // bytes_per_token)
    reserved = workspace_bytes(config, model, itemsize, context)
    if reserved >= free.num_bytes:
        raise ConfigError(
            f"steps may take {_in_units(reserved)} and {_in_units(free.num_bytes)} are left by {free.limit}: "
            f"take a smaller model, or fewer tokens a step (--max-step-tokens, now {config.max_step_tokens})"
        )
    return Room(free.num_bytes - reserved, f"{free.limit} beside {_in_units(reserved)} for steps")


def workspace_bytes(config: EngineConfig, model: ModelConfig, itemsize: int, context: int) -> int:
    """The most that steps take of a GPU's memory beside weights and KV, with `context` tokens a conversation.

    A step has `max_step_tokens` rows at most and logits of `max_concurrent`.  Graphs have memory of their own
    beside that of other steps, so what both need counts twice.
    """
    requests = config.max_concurrent
    rows = max(config.max_step_tokens, requests)
    q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    # All that a layer makes of a row, none of it reused: residual before and after, normed, linear's result;
    # gate and up, and their product; fused q, k and v, rotated q, what attention gives.
    per_row = 4 * model.hidden_size + 3 * model.ffn_size + 3 * q_size + 2 * kv_size
    # As the linear gives them, as float32, and changed by penalties.
    logits = requests * model.vocab_size * (itemsize + 4 + 4)
    # Output and lse of a row in float32 for each chunk of its keys: of all rows, and of a graph's.
    windows = {layer.window for layer in model.layers}
    short = min(rows, _MOST_SHORT * requests)
    chunks = (short + requests) * -(-context // _CHUNK)
    chunks += (rows - short) * min(_MOST_CHUNKS, -(-context // (2 * _CHUNK)))
    partials = len(windows) * chunks * 4 * (q_size + model.num_heads)
    return FIXED_WORKSPACE_BYTES + 2 * (rows * per_row * itemsize + logits) + partials


def _host_tokens(
    config: EngineConfig,
    asked: int | None,
    bytes_per_token: int,
    free: Room,
    lockable: Room | None,
    *,
    has_gpu: bool,
) -> tuple[int, str | None]:
    """Tokens of the host tier, and why they are fewer than what was asked for, if they are."""
    size = config.block_size
    room = free if lockable is None or lockable.num_bytes >= free.num_bytes else lockable
    if asked is None:
        if not has_gpu or config.stateless:
            return 0, None
        most = min(int(free.num_bytes * PINNED_SHARE), MAX_DEFAULT_PINNED_BYTES) // bytes_per_token
        return min(most, _fitting(room, bytes_per_token), MAX_DEFAULT_GPU_KV_TOKENS), None
    if 0 < asked < size:
        raise ConfigError(
            f"the host KV cache would hold {asked} tokens; give it at least {size} (a block), or 0"
        )
    if asked * bytes_per_token <= room.num_bytes:
        return asked, None
    fitting = _fitting(room, bytes_per_token) // size * size
    complaint = _does_not_fit("host ", asked, bytes_per_token, room)
    if not fitting:
        raise ConfigError(f"{complaint}: not even a block; make more room, or leave out the host tier")
    return fitting, f"{complaint}: it holds {fitting:,} tokens instead"


def _tokens(tokens: int | None, num_bytes: int | None, bytes_per_token: int) -> int | None:
    return tokens if num_bytes is None else num_bytes // bytes_per_token


def _fitting(room: Room, bytes_per_token: int) -> int:
    """Tokens."""
    return int(room.num_bytes * FITTING_SHARE) // bytes_per_token


def _no_room(tokens: int, bytes_per_token: int, room: Room) -> ConfigError:
    return ConfigError(
        f"{_does_not_fit('', tokens, bytes_per_token, room)}; "
        f"--device-kv-tokens {_fitting(room, bytes_per_token)} would fit"
    )


def _does_not_fit(which: str, tokens: int, bytes_per_token: int, room: Room) -> str:
    return (
        f"a {which}KV cache of {tokens:,} tokens takes {_in_units(tokens * bytes_per_token)} "
        f"and {_in_units(room.num_bytes)} are left by {room.limit}"
    )


def _in_units(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"
