"""Linear layers whose weight is packed once, so that a few rows stream it at memory speed."""

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedLinear:
    """x @ weight.T + bias.

    weight: [N, K], bias: [N] or None, float32 or bfloat16.  The packed copy replaces the weight: drop yours and its
    memory is freed.  Rows of the result do not depend on how many rows x has.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N] in the weight's dtype."""
        rows = x.shape[0]
        if self.dtype == torch.float32 and rows < 4:
            return F.linear(F.pad(x, (0, 0, 0, 4 - rows)), self._weight, self._bias)[:rows]
        return F.linear(x, self._weight, self._bias)
