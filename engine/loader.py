"""Builds an engine from its settings: the only place where the parts are put together."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.async_engine import AsyncEngine
from engine.cache.block_pool import BlockPool
from engine.cache.costs import CostTable
from engine.cache.kv_store import HostStore, KVStore
from engine.cache.manager import KVCacheManager
from engine.cache.policy import policy_named
from engine.cache.transfer import SyncTransfer, TransferEngine
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.cost_profile import Profile, Subject, processor, read_profile
from engine.errors import ConfigError, ModelFolderError
from engine.kv_sizes import KVSizes
from engine.memory import available, lockable
from engine.model_runner import ModelRunner
from engine.models import load_model
from engine.models.config import ModelConfig
from engine.models.dtype import default_dtype
from engine.models.layer_attention import reach
from engine.profile import QUICK, THOROUGH, Profiler
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.step_budget import Pacing
from engine.step_profile import StepFile, StepRecorder
from engine.text.tokenizer import Tokenizer
from engine.text_service import TextService
from engine.token_log import TokenLog
from engine.types import Clock, Limits, ModelInfo, SamplingParams
from kernels import __version__, dispatch
from kernels.marks import Mark, unmarked
from kernels.native.openmp import release_threads

_logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
POPULATED_BYTES = 1 << 30  # of the device tier: what a server of a few conversations soon writes
HOST_BLOCKS_TO_PROFILE = 256  # copies go through so many, so that caches hold few of them
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
    with ExitStack() as opened:
        recorder = StepFile(config.step_profile) if config.step_profile else StepRecorder()
        opened.callback(recorder.close)
        model_config = ModelConfig.from_dir(config.model)
        tokenizer = Tokenizer.from_dir(config.model)
        if tokenizer.vocab_size > model_config.vocab_size:
            raise ModelFolderError(
                f"{config.model}: the tokenizer has {tokenizer.vocab_size} tokens, "
                f"the model only {model_config.vocab_size}"
            )
        log = TokenLog.open(config.data_dir, clock=clock)
        opened.callback(log.close)
        engine = _build(config, clock, model_config, tokenizer, log, recorder)
        opened.pop_all()
        return engine


def _build(
    config: EngineConfig,
    clock: Clock,
    model: ModelConfig,
    tokenizer: Tokenizer,
    log: TokenLog,
    recorder: StepRecorder,
) -> AsyncEngine:
    parts = _load_parts(config, model, tokenizer, recorder.mark)
    kv, size = parts.kv, config.block_size
    transfer = None
    if kv.num_host_blocks:
        host = HostStore(parts.store, kv.num_host_blocks)
        transfer = SyncTransfer(parts.store, host, verify=config.verify_reloads)
    costs, costs_line = None, ""
    if config.policy == "retention" or transfer is not None:
        costs, origin = _costs(config, parts, transfer, clock.wall())
        costs_line = f" | costs {origin}"
    manager = KVCacheManager(
        BlockPool(kv.num_blocks),
        size,
        policy_named(config.policy, costs),
        BlockPool(kv.num_host_blocks),
        costs,
        pipelined=not config.verify_reloads,
        window=reach(model.layers),
    )
    scheduler = Scheduler(manager, config.max_step_tokens, config.max_concurrent, Pacing())
    core = EngineCore(
        manager, scheduler, parts.runner, clock, model.eos_ids, parts.context_tokens, transfer, recorder
    )
    subject = parts.subject
    info = ModelInfo(
        name=config.name or config.model.resolve().name,
        version=__version__,
        fingerprint=subject.model,
        architecture=model.architecture,
        dtype=subject.dtype,
        device=subject.device,
        vocab_size=model.vocab_size,
        eos_token_ids=tuple(sorted(model.eos_ids)),
        has_chat_template=tokenizer.chat_template is not None,
        limits=Limits(parts.context_tokens, config.max_concurrent, config.max_queue, MAX_MESSAGE_BYTES),
    )
    threads = subject.threads
    description = (
        f"continuo {__version__} | {info.name} ({model.architecture.removesuffix('ForCausalLM')}, "
        f"{model.num_layers} layers, context {parts.context_tokens:,})",
        f"device {subject.device}, {threads} thread{'s' * (threads > 1)} | {info.dtype}{costs_line}",
        kv.describe(size),
        f"data dir {config.data_dir}"
        if config.data_dir
        else "data dir none: conversations end with this process",
    )
    release_threads()  # this thread has loaded; from here on the step thread computes
    return AsyncEngine(
        config,
        core,
        log,
        TextService(tokenizer),
        parts.sampler,
        clock,
        info,
        model.sampling.over(GREEDY),
        _thread_setup(threads),
        (*description, f"attention: {dispatch.describe()}"),
    )


def profile_model(config: EngineConfig, on_position: Callable[[int], None]) -> Profile:
    """Measures what `load_engine` with these settings would use, in memory of its own.  Takes a while.

    Raises ModelFolderError or ConfigError.
    """
    config = replace(config, host_kv_tokens=HOST_BLOCKS_TO_PROFILE * config.block_size)
    parts = _load_parts(config, ModelConfig.from_dir(config.model), Tokenizer.from_dir(config.model))
    load_average, begun = os.getloadavg()[0], time.time()
    transfer = SyncTransfer(parts.store, HostStore(parts.store, parts.kv.num_host_blocks))
    costs = parts.profiler(config, transfer).measure(THOROUGH, on_position)
    return Profile(parts.subject, int(begun), load_average, costs)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What computes."""

    kv: KVSizes
    store: KVStore
    runner: ModelRunner
    sampler: Sampler
    context_tokens: int
    subject: Subject

    def profiler(self, config: EngineConfig, transfer: TransferEngine | None) -> Profiler:
        return Profiler(
            self.runner,
            self.store,
            transfer,
            self.kv.num_host_blocks,
            config.block_size,
            self.context_tokens,
        )


def _load_parts(
    config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer, mark: Mark = unmarked
) -> _Parts:
    dtype = default_dtype("cpu") if config.dtype == "auto" else getattr(torch, config.dtype)
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    decoder = load_model(config.model, dtype)
    size = config.block_size
    can_be_pinned = lockable() if config.device == "cuda" else None
    kv = KVSizes.of(config, _bytes_per_token(model, dtype), available(), can_be_pinned)
    if kv.warning:
        _logger.warning("%s", kv.warning)
    store = KVStore(model.num_layers, kv.num_blocks, model.num_kv_heads, size, model.head_dim, dtype)
    store.populate(POPULATED_BYTES)
    sampler = Sampler(model.vocab_size, model.eos_ids)
    subject = Subject(
        model=fingerprint(config.model, tokenizer),
        device="cpu",
        dtype=str(dtype).removeprefix("torch."),
        threads=threads,
        block_size=size,
        machine=processor(),
        kernels=dispatch.describe(),
        version=__version__,
    )
    context_tokens = min(model.max_positions, (kv.num_blocks - 1) * size)
    runner = ModelRunner(decoder, store, sampler, size, mark)
    return _Parts(kv, store, runner, sampler, context_tokens, subject)


def _costs(
    config: EngineConfig, parts: _Parts, transfer: TransferEngine | None, now: float
) -> tuple[CostTable, str]:
    """From a profile, or else measured now, and where they come from, for people.  Raises ConfigError if the
    profile that was asked for does not hold here; one that was merely found is not used then.
    """
    path = config.profile
    found = config.profile_dir and config.profile_dir / parts.subject.file_name
    if path is None and found and found.exists() and not config.verify_reloads:
        path = found
    if path is not None:
        try:
            profile = read_profile(path, parts.subject)
            return profile.costs.table(), f"profiled {profile.age(now)}"
        except ConfigError as error:
            if config.profile is not None:
                raise
            _logger.warning("%s; until then costs are measured quickly at each start", error)
    measured = parts.profiler(config, transfer).measure(QUICK)
    return measured.table(), "measured quickly at start"


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
