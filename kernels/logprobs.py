"""Logarithms of probabilities: of the chosen tokens and of the likeliest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.highest import highest

_NUM_CACHED = 2**17  # logits worked on at a time, so that what is made of them stays in the cache


def logprobs(logits: Tensor, chosen: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """(chosen [S], top [S, num], top_ids [S, num]): natural logarithms, fp64, and int64 ids.

    logits: [S, V] fp32 on CPU, with a finite one in each row; chosen: [S] int64; num: 0 to V.  Top tokens are
    sorted by descending logit, ties by ascending id; where a row has fewer above -inf, -inf fills up.
    """
    size = max(1, _NUM_CACHED // logits.shape[1])
    total = torch.cat([_log_of_sum(logits[at : at + size]) for at in range(0, len(logits), size)])
    of_chosen = logits.gather(1, chosen[:, None]).double() - total
    if num == 0:
        nothing = torch.empty(len(logits), 0)
        return of_chosen[:, 0], nothing.double(), nothing.long()
    values, ids, _ = highest(logits, num)
    values = F.pad(values[:, :num], (0, max(0, num - values.shape[1])), value=-torch.inf)
    ids = F.pad(ids[:, :num], (0, max(0, num - ids.shape[1])))
    return of_chosen[:, 0], values.double() - total, ids


def _log_of_sum(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))).  [S, V] -> [S, 1] fp64.

    The sum is NumPy's: that of a row has the same bits in any batch, torch's has not.
    """
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    total = torch.from_numpy(weights.numpy().sum(-1, keepdims=True))
    return total.double().log() + top
