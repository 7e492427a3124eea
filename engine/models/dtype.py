"""Which number format a model computes in when nobody has said."""

import torch

from kernels.native.build import cpu_flags


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs that multiply it in hardware; elsewhere float32 is faster."""
    if device != "cpu" or cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        return torch.bfloat16
    return torch.float32
