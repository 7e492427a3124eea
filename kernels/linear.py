"""Linear layers whose weight is packed once, so that a few rows stream it at memory speed.

bfloat16 goes to the native kernel (native/linear.c) on CPUs with AVX-512 BF16 dots or AMX, everything else to
oneDNN.  In the native kernel the bits of a row do not depend on how many rows it comes with.  Whether they do
in oneDNN was measured (torch 2.13, one thread, shapes of 160M to 0.5B models, 1 to 300 rows):

    float32             independent from 2 rows on, so fewer than 4 are padded
    bfloat16            independent on CPUs with AVX-512 BF16 dots
    bfloat16 with AMX   dependent: tile kernels split the sum by the number of rows
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.native import memory
from kernels.native.build import cpu_flags
from kernels.native.library import Library, LinearArgs

_LEAST_ROWS = 4  # of a float32 product in oneDNN
_PANEL = 32  # outputs of a panel in native/linear.c, and what inputs are rounded up to
_CAN_PACK = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def rows_are_independent(dtype: torch.dtype) -> bool:
    """Whether a PackedLinear made now gives a row the same bits alone as among others."""
    if _native_library(dtype):
        return True
    return _CAN_PACK and (dtype == torch.float32 or "amx_bf16" not in cpu_flags())


class PackedLinear:
    """x @ weight.T + bias.

    weight: [N, K], bias: [N] or None, same dtype.  float32 and bfloat16 are copied into the packed form and
    the weight is not kept: when the caller drops it, its memory is free.  Other dtypes, GPUs, and platforms
    without oneDNN, keep the weight as it is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.dim() != 2 or (
            bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype)
        ):
            given = None if bias is None else f"{bias.dtype} {list(bias.shape)}"
            raise ValueError(
                f"weight must be [N, K] and bias [N] of its dtype, got {list(weight.shape)} and {given}"
            )
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._product = _product(weight.detach(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N], both in the weight's dtype."""
        if x.dtype != self.dtype or x.shape[1:] != (self.in_features,):
            raise ValueError(f"x must be {self.dtype} [T, {self.in_features}], got {x.dtype} {list(x.shape)}")
        return self._product(x) if len(x) else x.new_empty(0, self.out_features)

    @property
    def native_args(self) -> LinearArgs | None:
        """For native code that computes this on rows of K values; None where it does not, or pads them."""
        product = self._product
        return product.args if isinstance(product, _NativeProduct) and not product.padding else None


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if weight.device.type != "cpu":
        return lambda x: F.linear(x, weight, bias)
    library = _native_library(weight.dtype)
    if library is not None and weight.numel():
        return _NativeProduct(library, weight, bias)
    if _CAN_PACK and weight.numel() and weight.dtype in (torch.float32, torch.bfloat16):
        return _OneDnnProduct(weight, bias)
    return lambda x: F.linear(x, weight, bias)


def _native_library(dtype: torch.dtype) -> Library | None:
    library = dispatch.library() if dtype == torch.bfloat16 else None
    return library if library is not None and library.linear is not None else None


class _NativeProduct:
    """In native C, on a weight in the panels that its inner loops read."""

    def __init__(self, library: Library, weight: Tensor, bias: Tensor | None) -> None:
        (outputs, inputs), weight = weight.shape, weight if weight.stride(1) == 1 else weight.contiguous()
        panels, self.padding = -(-outputs // _PANEL), -inputs % _PANEL
        self._outputs, self._linear = outputs, library.linear
        self._packed = memory.zeros((panels, inputs + self.padding, _PANEL), torch.bfloat16)
        self._bias = None if bias is None else bias.detach().contiguous()
        library.pack_linear(
            *(weight.data_ptr(), self._packed.data_ptr()),
            *(outputs, inputs, weight.stride(0), torch.get_num_threads()),
        )
        bias_address = None if self._bias is None else self._bias.data_ptr()
        padded = inputs + self.padding
        self.args = LinearArgs(self._packed.data_ptr(), bias_address, outputs, padded)

    def __call__(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, self.padding)) if self.padding else x.contiguous()
        out = x.new_empty(len(x), self._outputs)
        self._linear(self.args, x.data_ptr(), out.data_ptr(), len(x), torch.get_num_threads())
        return out


def _padded(rows: int) -> int:
    """oneDNN keeps code and scratch memory for every number of rows that it meets, some 0.6 MB each: it is to
    meet few.
    """
    if rows <= 16:
        return rows
    step = 8 if rows <= 32 else 32
    return -(-rows // step) * step


class _OneDnnProduct:
    """In oneDNN, on a weight in the blocks that its inner loops read."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias
        self._least_rows = _LEAST_ROWS if weight.dtype == torch.float32 else 1

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        missing = max(self._least_rows, _padded(rows)) - rows
        if missing > 0:
            x = F.pad(x, (0, 0, 0, missing))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out[:rows] if missing > 0 else out
