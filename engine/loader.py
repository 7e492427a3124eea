"""Builds an engine from its settings: the only place where the parts are put together."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from engine.async_engine import AsyncEngine
from engine.cache.block_pool import BlockPool
from engine.cache.costs import CostTable
from engine.cache.manager import KVCacheManager
from engine.cache.policy import policy_named
from engine.cache.tiers import STORE_ALWAYS, STORE_BELOW
from engine.cache.transfer import TransferEngine
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.cost_profile import Profile, read_profile
from engine.devices import with_device
from engine.errors import ConfigError, ModelFolderError
from engine.models.config import ModelConfig
from engine.models.layer_attention import reach
from engine.parts import Parts, cpu_parts
from engine.profile import QUICK, THOROUGH
from engine.scheduler import Scheduler
from engine.step_profile import StepFile, StepRecorder
from engine.text.tokenizer import Tokenizer
from engine.text_service import TextService
from engine.token_log import TokenLog
from engine.types import Clock, Limits, ModelInfo, SamplingParams
from kernels import __version__
from kernels.marks import Mark, unmarked

_logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
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
    clock, config = clock or SystemClock(), with_device(config)
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
    parts = _parts(config, model, tokenizer, recorder.mark)
    kv, size = parts.kv, config.block_size
    transfer = parts.new_transfer(kv.num_host_blocks) if kv.num_host_blocks else None
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
        store_below=STORE_ALWAYS if config.eager_stores else STORE_BELOW,
    )
    scheduler = Scheduler(manager, config.max_step_tokens, config.max_concurrent, parts.pacing)
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
    description = (
        f"continuo {__version__} | {info.name} ({model.architecture.removesuffix('ForCausalLM')}, "
        f"{model.num_layers} layers, context {parts.context_tokens:,})",
        f"device {parts.device} | {info.dtype}{costs_line}",
        kv.describe(size),
        f"data dir {config.data_dir}"
        if config.data_dir
        else "data dir none: conversations end with this process",
    )
    parts.loaded()
    return AsyncEngine(
        replace(config, run_ahead=parts.run_ahead),
        core,
        log,
        TextService(tokenizer),
        parts.sampler,
        clock,
        info,
        model.sampling.over(GREEDY),
        parts.thread_setup,
        (*description, f"attention: {subject.kernels}"),
    )


def profile_model(config: EngineConfig, on_position: Callable[[int], None]) -> Profile:
    """Measures what `load_engine` with these settings would use, in memory of its own.  Takes a while.

    Raises ModelFolderError or ConfigError.
    """
    config = with_device(replace(config, host_kv_tokens=HOST_BLOCKS_TO_PROFILE * config.block_size))
    parts = _parts(config, ModelConfig.from_dir(config.model), Tokenizer.from_dir(config.model))
    load_average, begun = os.getloadavg()[0], time.time()
    transfer = parts.new_transfer(parts.kv.num_host_blocks)
    costs = parts.profiler(config, transfer).measure(THOROUGH, on_position)
    return Profile(parts.subject, int(begun), load_average, costs)


def _parts(config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer, mark: Mark = unmarked) -> Parts:
    if config.device == "cuda":
        from engine.cuda.parts import cuda_parts  # which brings in Triton

        return cuda_parts(config, model, tokenizer)
    return cpu_parts(config, model, tokenizer, mark)


def _costs(
    config: EngineConfig, parts: Parts, transfer: TransferEngine | None, now: float
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
