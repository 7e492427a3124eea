"""Logarithms of probabilities: of the chosen tokens and of the likeliest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.highest import Highest, highest, sort_keys

_NUM_CACHED = 2**20  # logits worked on at a time, so that what is made of them stays in the cache


def logprobs(
    logits: Tensor, chosen: Tensor, num: int, listed: Highest | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(chosen [S], top [S, num], top_ids [S, num]): natural logarithms, fp64, and int64 ids.

    logits: [S, V] fp32, with a finite one in each row, or what is said of the row means nothing; chosen: [S]
    int64; num: 0 to V.  Top tokens are sorted by descending logit, ties by ascending id; where a row has
    fewer above -inf, -inf fills up.  All lie on one device, for which nobody waits.  `listed`, if known
    already, and of use on the CPU only: at least the `num` highest of each row.
    """
    if dispatch.is_triton(logits):
        return _on_device(logits, chosen, num)
    if num == 0:
        nothing = torch.empty(len(logits), 0)
        total = _log_of_sums(logits, logits.amax(-1, keepdim=True))
        return _of(chosen, logits, total), nothing.double(), nothing.long()
    listed = listed or highest(logits, num)
    total = _log_of_sums(logits, listed.values[:, :1])
    missing = max(0, num - listed.values.shape[1])
    values = F.pad(listed.values[:, :num], (0, missing), value=-torch.inf)
    ids = F.pad(listed.ids[:, :num], (0, missing))
    return _of(chosen, logits, total), values.double() - total, ids


def _on_device(logits: Tensor, chosen: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    top = logits.amax(-1, keepdim=True)
    total = (logits - top).exp_().sum(-1, keepdim=True, dtype=torch.float64).log_() + top
    keys = sort_keys(logits, torch.arange(logits.shape[1], device=logits.device))
    ids = keys.topk(num, largest=False).values & 0xFFFFFFFF
    return _of(chosen, logits, total), logits.gather(1, ids).double() - total, ids


def _of(chosen: Tensor, logits: Tensor, total: Tensor) -> Tensor:
    return (logits.gather(1, chosen[:, None]).double() - total)[:, 0]


def _log_of_sums(logits: Tensor, top: Tensor) -> Tensor:
    """log(sum(exp(logits))), some rows at a time.  [S, V], top: each row's highest, [S, 1] -> [S, 1] fp64

    The sum is NumPy's: that of a row has the same bits in any batch, torch's has not.
    """
    size = max(1, _NUM_CACHED // logits.shape[1])
    parts = [slice(first, first + size) for first in range(0, len(logits), size)]
    weights = ((logits[some] - top[some]).exp_().numpy() for some in parts)
    total = torch.cat([torch.from_numpy(some.sum(-1, keepdims=True)) for some in weights])
    return total.double().log() + top
