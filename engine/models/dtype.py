"""Which number format a model computes in when nobody has said."""

from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")  # Linux; elsewhere nothing is known and float32 is right
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def default_dtype(device: str, cpu_info: Path = _CPU_INFO) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs that multiply it in hardware; elsewhere float32 is faster."""
    if device != "cpu":
        return torch.bfloat16
    try:
        lines = cpu_info.read_text(encoding="utf-8").splitlines()
    except OSError:
        return torch.float32
    flags = next((line for line in lines if line.startswith("flags")), "")
    return torch.bfloat16 if _BF16_FLAGS & set(flags.split()) else torch.float32
