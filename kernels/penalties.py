"""What is done to single logits before a token is chosen: biases, penalties, bans.

Each works on chosen tokens of chosen rows in one go, in place, and costs what these tokens cost, however
large the vocabulary is.  Logits are [S, V] fp32, contiguous, on the CPU or on a GPU, for which nobody waits;
tokens and amounts are always in the host's memory.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import dispatch
from kernels.pinned import sent


@dataclass(frozen=True, slots=True)
class TokenLists:
    """Tokens of each of R rows of logits.  A row names a token once."""

    rows: Tensor  # [R] int64
    lengths: Tensor  # [R] int64
    ids: Tensor  # [N] int64, row by row

    def for_each(self, values: Tensor) -> Tensor:
        """What holds of a row, for each of its tokens.  [R] -> [N]"""
        return values.repeat_interleave(self.lengths, output_size=len(self.ids))

    def positions(self, logits: Tensor) -> Tensor:
        """Where the tokens are in flattened logits.  [N] int64, beside the logits"""
        return sent(self.for_each(self.rows * logits.shape[1]) + self.ids, logits.device)


def add_(logits: Tensor, tokens: TokenLists, amounts: Tensor) -> None:
    """Adds amounts [N] fp32."""
    logits.view(-1).index_add_(0, tokens.positions(logits), sent(amounts, logits.device))


def ban_(logits: Tensor, tokens: TokenLists) -> None:
    """Sets -inf.  A row may name a token twice here."""
    logits.view(-1).index_fill_(0, tokens.positions(logits), -torch.inf)


def penalize_repetition_(logits: Tensor, tokens: TokenLists, penalty: Tensor) -> None:
    """Makes tokens less likely by a factor, penalty [R] fp32: divides logits above 0, multiplies those below.

    CTRL (1909.05858) divides them all, which would favour the tokens below 0.

    Whole histories are penalized, so this is the one edit that takes time: on the CPU row by row, in the
    cache, and by NumPy on this thread alone.
    """
    if dispatch.is_triton(logits):
        _penalize_in_one_go_(logits, tokens, penalty)
        return
    of_rows = np.split(tokens.ids.numpy(), tokens.lengths.cumsum(0)[:-1].numpy())
    with np.errstate(over="ignore"):  # in the one that is not taken, or to the infinity that is meant
        for row, ids, factor in zip(tokens.rows.tolist(), of_rows, penalty.numpy(), strict=True):
            of_row = logits[row].numpy()
            values = of_row[ids]
            of_both = np.minimum if factor > 1 else np.maximum  # the quotient above 0, the product below
            of_row[ids] = of_both(values / factor, values * factor)


def _penalize_in_one_go_(logits: Tensor, tokens: TokenLists, penalty: Tensor) -> None:
    at, factors = tokens.positions(logits), sent(tokens.for_each(penalty), logits.device)
    values = logits.view(-1).index_select(0, at)
    quotients, products = values / factors, values * factors
    lower, higher = torch.minimum(quotients, products), torch.maximum(quotients, products)
    logits.view(-1).index_copy_(0, at, torch.where(factors > 1, lower, higher))


def penalize_counts_(
    logits: Tensor, tokens: TokenLists, counts: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Subtracts presence + frequency * count.  counts: [N] fp32; presence, frequency: [R] fp32."""
    amounts = tokens.for_each(presence) + tokens.for_each(frequency) * counts
    add_(logits, tokens, -amounts)
