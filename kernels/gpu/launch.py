"""One compiled form of a kernel: what it takes to launch it, and to compile it without a GPU."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

LEAST_CAPABILITY = (8, 0)  # what the kernels are compiled and checked for
Unit = Literal["none", "mma", "wgmma"]

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
"""Triton's names."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with all that it is specialised on.  `signature`: the type of every other argument, in the
    kernel's order, which is that of its parameters with the constants last.  All pointers are to multiples
    of 16 bytes.
    """

    kernel: Any  # made by triton.jit, which has no types
    signature: dict[str, str]  # "*bf16", "i32", "fp32", ...
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 2
    unit: Unit = "none"  # what multiplies matrices in it on sm_90; on sm_80 wgmma is mma
    name: str = field(default="")

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """Does not wait for the device."""
        if 0 not in grid:
            self.kernel[grid](*args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)


def pointer(dtype: torch.dtype) -> str:
    return f"*{TYPES[dtype]}"


def require_gpu(device: torch.device) -> None:
    """Raises ValueError for a GPU that the kernels are not made for."""
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < LEAST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise ValueError(
                f"device must have compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or more, "
                f"got {found[0]}.{found[1]} ({name}); use --device cpu"
            )


def chosen_compiler() -> str | None:
    """The C compiler with which the environment tells Triton to build what launches kernels."""
    from triton import knobs

    return knobs.build.cc  # type: ignore[no-any-return]
