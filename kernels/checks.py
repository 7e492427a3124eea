"""What the kernels say about tensors they refuse."""

from torch import Tensor


def described(x: Tensor) -> str:
    """dtype and shape; strides, address and device where they are unusual."""
    words = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    if not x.is_contiguous():
        words += f" with strides {x.stride()}"
    if x.data_ptr() % x.itemsize:
        words += f" misaligned at {x.data_ptr():#x}"
    return words if x.is_cpu else f"{words} on {x.device}"
