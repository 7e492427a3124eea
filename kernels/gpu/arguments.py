"""What the kernels ask of their tensors beyond the contracts one floor up."""

import torch
from torch import Tensor

from kernels.checks import described

ALIGNMENT = 16  # bytes: the widest access of a thread
_DTYPES = torch.float32, torch.bfloat16, torch.float16


def require_float(name: str, x: Tensor) -> None:
    """Raises ValueError for a dtype that is not computed in."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16 on a GPU, got {described(x)}")


def require_rows(name: str, x: Tensor) -> None:
    """Raises ValueError unless the elements of a row are side by side, and the first is aligned."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must have the elements of a row side by side, got {described(x)}")
    require_aligned(name, x)


def require_aligned(name: str, x: Tensor) -> None:
    """Raises ValueError for a tensor that begins elsewhere than a launch is compiled for."""
    if x.data_ptr() % ALIGNMENT:
        at = f"{described(x)} at {x.data_ptr():#x}"
        raise ValueError(f"{name} must begin at a multiple of {ALIGNMENT} bytes, got {at}")


def require_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raises ValueError for a tensor that lies elsewhere than the others."""
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like the others, got {described(x)} on {x.device}")
