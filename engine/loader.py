"""Builds an engine from its settings: the only place where the parts are put together."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.async_engine import AsyncEngine
from engine.cache.block_pool import BlockPool
from engine.cache.kv_store import HostStore, KVStore
from engine.cache.manager import KVCacheManager
from engine.cache.policy import policy_named
from engine.cache.transfer import SyncTransfer
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ModelFolderError
from engine.kv_sizes import KVSizes
from engine.memory import available_bytes
from engine.model_runner import ModelRunner
from engine.models import load_model
from engine.models.config import ModelConfig
from engine.models.dtype import default_dtype
from engine.profile import measured_costs
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.text.tokenizer import Tokenizer
from engine.text_service import TextService
from engine.token_log import TokenLog
from engine.types import Clock, Limits, ModelInfo, SamplingParams
from kernels import __version__, dispatch

MAX_MESSAGE_BYTES = 64 << 20
GREEDY = SamplingParams(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    min_tokens=0,
    stop=(),
    stop_token_ids=(),
    ignore_eos=False,
)
"""What holds where neither the request, nor the conversation, nor the model's makers say otherwise."""


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


def load_engine(config: EngineConfig, clock: Clock | None = None) -> AsyncEngine:
    """Blocks while the model loads.  Raises ModelFolderError, ConfigError or DataDirError, each saying what
    to do.
    """
    clock = clock or SystemClock()
    model_config = ModelConfig.from_dir(config.model)
    tokenizer = Tokenizer.from_dir(config.model)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ModelFolderError(
            f"{config.model}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model only {model_config.vocab_size}"
        )
    log = TokenLog.open(config.data_dir, clock=clock)
    try:
        return _build(config, clock, model_config, tokenizer, log)
    except BaseException:
        log.close()
        raise


def _build(
    config: EngineConfig, clock: Clock, model: ModelConfig, tokenizer: Tokenizer, log: TokenLog
) -> AsyncEngine:
    dtype = default_dtype("cpu") if config.dtype == "auto" else getattr(torch, config.dtype)
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    decoder = load_model(config.model, dtype)
    size = config.block_size
    kv = KVSizes.of(config, _bytes_per_token(model, dtype), available_bytes())
    context_tokens = min(model.max_positions, (kv.num_blocks - 1) * size)
    store = KVStore(model.num_layers, kv.num_blocks, model.num_kv_heads, size, model.head_dim, dtype)
    transfer = None
    if kv.num_host_blocks:
        transfer = SyncTransfer(store, HostStore(store, kv.num_host_blocks), verify=config.verify_reloads)
    sampler = Sampler(model.vocab_size, model.eos_ids)
    runner = ModelRunner(decoder, store, sampler, size)
    costs = None
    if config.policy == "retention" or transfer is not None:
        costs = measured_costs(runner, transfer, kv, size, context_tokens)
    manager = KVCacheManager(
        BlockPool(kv.num_blocks),
        size,
        policy_named(config.policy, costs),
        BlockPool(kv.num_host_blocks),
        costs,
    )
    scheduler = Scheduler(manager, config.max_step_tokens, config.max_concurrent)
    core = EngineCore(manager, scheduler, runner, clock, model.eos_ids, context_tokens, transfer)
    info = ModelInfo(
        name=config.name or config.model.resolve().name,
        version=__version__,
        fingerprint=fingerprint(config.model, tokenizer),
        architecture=model.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        vocab_size=model.vocab_size,
        eos_token_ids=tuple(sorted(model.eos_ids)),
        has_chat_template=tokenizer.chat_template is not None,
        limits=Limits(context_tokens, config.max_concurrent, config.max_queue, MAX_MESSAGE_BYTES),
    )
    description = (
        f"continuo {__version__} | {info.name} ({model.architecture.removesuffix('ForCausalLM')}, "
        f"{model.num_layers} layers, context {context_tokens:,})",
        f"device cpu, {threads} thread{'s' * (threads > 1)} | {info.dtype}",
        kv.describe(size),
        f"data dir {config.data_dir}"
        if config.data_dir
        else "data dir none: conversations end with this process",
    )
    return AsyncEngine(
        config,
        core,
        log,
        TextService(tokenizer),
        sampler,
        clock,
        info,
        model.sampling.over(GREEDY),
        _thread_setup(threads),
        (*description, f"attention {dispatch.describe()}"),
    )


def _thread_setup(threads: int) -> Callable[[], None]:
    return lambda: torch.set_num_threads(threads)  # OpenMP keeps this number per calling thread


def _bytes_per_token(model: ModelConfig, dtype: torch.dtype) -> int:
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize


def fingerprint(folder: Path, tokenizer: Tokenizer) -> str:
    """16 hex digits that change with the architecture, the tokenizer, or the weights (their files' sizes
    and samples).
    """
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    config = json.loads((folder / "config.json").read_text())
    digest.update(
        json.dumps({k: v for k, v in config.items() if k != "transformers_version"}, sort_keys=True).encode()
    )
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for offset in range(0, size, max(1, size // 64)):
                stream.seek(offset)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]
