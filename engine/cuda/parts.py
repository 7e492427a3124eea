"""What computes on a GPU, put together from the settings, as engine/parts.py does for a CPU."""

import logging

import torch

from engine.cache.kv_store import KVStore
from engine.cache.transfer import TransferEngine
from engine.config import EngineConfig
from engine.cost_profile import Subject
from engine.cuda.calibration import calibrated_transfer
from engine.cuda.copies import PinnedStore, Tiers
from engine.cuda.device import Device, TorchDevice
from engine.cuda.out_of_memory import kv_must_fit, steps_must_fit
from engine.cuda.runner import CudaRunner
from engine.cuda.sampler import DeviceSampler
from engine.devices import gpu_kernels, gpu_machine
from engine.kv_sizes import KVSizes, gpu_room
from engine.memory import available, lockable
from engine.models import load_model
from engine.models.config import ModelConfig
from engine.models.dtype import default_dtype
from engine.parts import Parts, fingerprint, kv_bytes_per_token
from engine.text.tokenizer import Tokenizer
from kernels import __version__

_logger = logging.getLogger(__name__)

RUN_AHEAD = 1
"""While the device computes a step, the host plans and launches the next one."""


def cuda_parts(
    config: EngineConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    device: Device | None = None,
) -> Parts:
    """On the first GPU, unless `device` is given.  Every kernel is compiled and every graph captured when
    this returns.  Raises ModelFolderError or ConfigError.
    """
    device = device or TorchDevice(torch.device("cuda", 0))
    threads = config.threads or 1  # the host computes next to nothing
    torch.set_num_threads(threads)
    dtype = default_dtype("cuda") if config.dtype == "auto" else getattr(torch, config.dtype)
    decoder = load_model(config.model, dtype, device.torch_device)
    size = config.block_size
    bytes_per_token = kv_bytes_per_token(model, dtype)
    room = gpu_room(config, model, dtype.itemsize, device.room())
    kv = KVSizes.of(config, bytes_per_token, available(), lockable(), room)
    if kv.warning:
        _logger.warning("%s", kv.warning)
    with kv_must_fit(kv, size, lambda: gpu_room(config, model, dtype.itemsize, device.room())):
        store = KVStore(
            *(model.num_layers, kv.num_blocks, model.num_kv_heads, size, model.head_dim, dtype),
            allocate=device.empty,
        )
    sampler = DeviceSampler(device, model.vocab_size, model.eos_ids)
    context_tokens = min(model.max_positions, (kv.num_blocks - 1) * size)
    runner = CudaRunner(
        *(device, decoder, store, sampler, size, config.max_step_tokens, config.max_concurrent),
        context_blocks=-(-context_tokens // size),
    )
    with steps_must_fit(kv, size):
        runner.warm_up()

    def new_transfer(num_blocks: int) -> TransferEngine:
        tiers = Tiers(store, PinnedStore(device, store, num_blocks))
        transfer, calibration = calibrated_transfer(device, tiers)
        _logger.info("%s", calibration.describe())
        return transfer

    def set_up_thread() -> None:
        torch.set_num_threads(threads)
        if device.torch_device.type == "cuda":  # some of the driver's calls ask for a thread that has it
            torch.cuda.set_device(device.torch_device)

    machine = gpu_machine()
    return Parts(
        kv,
        store,
        runner,
        sampler,
        context_tokens,
        Subject(
            model=fingerprint(config.model, tokenizer),
            device="cuda",
            dtype=str(dtype).removeprefix("torch."),
            threads=threads,
            block_size=size,
            machine=machine,
            kernels=gpu_kernels(),
            version=__version__,
        ),
        device=f"cuda, {machine.partition(',')[0]}",
        new_transfer=new_transfer,
        thread_setup=set_up_thread,
        loaded=lambda: None,
        pacing=None,  # a step of this size takes a GPU a few milliseconds
        run_ahead=RUN_AHEAD,
    )
