"""Which number format a model computes in: where nobody has said, and which ones a device can."""

import torch

from engine.errors import ConfigError
from kernels.native.build import cpu_flags


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 on GPUs, all of which multiply it from the least capability on that the kernels are made for,
    and on CPUs that do so in hardware; elsewhere float32 is faster.
    """
    if device != "cpu" or cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        return torch.bfloat16
    return torch.float32


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError for what the kernels of that device do not compute in."""
    if device.type == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"{dtype} is not supported on the CPU; use float32 or bfloat16")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"{dtype} is not supported on a GPU; use bfloat16, float16 or float32")
