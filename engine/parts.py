"""What computes on a CPU, put together from the settings; engine/cuda/parts.py does so for a GPU."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.cache.kv_store import HostStore, KVStore
from engine.cache.transfer import SyncTransfer, TransferEngine
from engine.config import EngineConfig
from engine.core import Runner
from engine.cost_profile import Subject, processor
from engine.kv_sizes import KVSizes
from engine.memory import available
from engine.model_runner import ModelRunner
from engine.models import load_model
from engine.models.config import ModelConfig
from engine.models.dtype import default_dtype
from engine.profile import Profiler
from engine.sampler import Sampler, SamplerRules
from engine.step_budget import Pacing
from engine.text.tokenizer import Tokenizer
from kernels import __version__, dispatch
from kernels.marks import Mark, unmarked
from kernels.native.openmp import release_threads

_logger = logging.getLogger(__name__)

POPULATED_BYTES = 1 << 30  # of the device tier: what a server of a few conversations soon writes


@dataclass(frozen=True, slots=True)
class Parts:
    """What computes, and what it is to be used like."""

    kv: KVSizes
    store: KVStore
    runner: Runner
    sampler: SamplerRules
    context_tokens: int
    subject: Subject
    device: str  # for people
    new_transfer: Callable[[int], TransferEngine]  # with a host tier of so many blocks
    thread_setup: Callable[[], None]  # the first that the step thread does
    loaded: Callable[[], None]  # the last that the loading thread does
    pacing: Pacing | None
    run_ahead: int

    def profiler(self, config: EngineConfig, transfer: TransferEngine | None) -> Profiler:
        return Profiler(
            self.runner,
            self.store,
            transfer,
            self.kv.num_host_blocks,
            config.block_size,
            self.context_tokens,
            config.max_step_tokens,
        )


def cpu_parts(config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer, mark: Mark = unmarked) -> Parts:
    """Raises ModelFolderError or ConfigError."""
    dtype = default_dtype("cpu") if config.dtype == "auto" else getattr(torch, config.dtype)
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    decoder = load_model(config.model, dtype)
    size = config.block_size
    kv = KVSizes.of(config, kv_bytes_per_token(model, dtype), available())
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
    return Parts(
        kv,
        store,
        ModelRunner(decoder, store, sampler, size, mark),
        sampler,
        min(model.max_positions, (kv.num_blocks - 1) * size),
        subject,
        device=f"cpu, {threads} thread{'s' * (threads > 1)}",
        new_transfer=lambda num_blocks: SyncTransfer(
            store, HostStore(store, num_blocks), verify=config.verify_reloads
        ),
        thread_setup=lambda: torch.set_num_threads(threads),  # OpenMP keeps this number per calling thread
        loaded=release_threads,  # this thread has loaded; from here on the step thread computes
        pacing=Pacing(),
        run_ahead=config.run_ahead,
    )


def kv_bytes_per_token(model: ModelConfig, dtype: torch.dtype) -> int:
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
