"""Linear layers whose weight is packed once, so that a few rows stream it at memory speed.

oneDNN lays the weight out in the blocks its inner loops read.  Whether the bits of a row depend on how many
rows it comes with was measured (torch 2.13, one thread, shapes of 160M to 0.5B models, 1 to 300 rows):

    float32             independent from 2 rows on, so fewer than 4 are padded
    bfloat16            independent on CPUs with AVX-512 BF16 dots
    bfloat16 with AMX   dependent: the tile kernels split the sum by the number of rows
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.native.build import cpu_flags

_LEAST_ROWS = 4  # of a float32 product
_CAN_PACK = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def rows_are_independent(dtype: torch.dtype) -> bool:
    """Whether PackedLinear gives a row the same bits alone as among others, on this machine."""
    return _CAN_PACK and (dtype == torch.float32 or "amx_bf16" not in cpu_flags())


class PackedLinear:
    """x @ weight.T + bias.

    weight: [N, K], bias: [N] or None, same dtype.  float32 and bfloat16 are copied into the packed form and
    the weight is not kept: when the caller drops it, its memory is free.  Other dtypes, and platforms without
    oneDNN, keep the weight as it is.
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
        self._bias = bias
        self._is_packed = _CAN_PACK and weight.dtype in (torch.float32, torch.bfloat16)
        self._weight = weight.detach()
        if self._is_packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N], both in the weight's dtype."""
        if not self._is_packed:
            return F.linear(x, self._weight, self._bias)
        if x.dtype != self.dtype or x.shape[1:] != (self.in_features,):
            raise ValueError(f"x must be {self.dtype} [T, {self.in_features}], got {x.dtype} {list(x.shape)}")
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty(0, self.out_features)
        missing = _LEAST_ROWS - rows if self.dtype == torch.float32 else 0
        if missing > 0:
            x = F.pad(x, (0, 0, 0, missing))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out[:rows] if missing > 0 else out
