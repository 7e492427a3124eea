"""From logits to token ids: parameters as tensors, and tokens that may not come yet."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import RowParams
from engine.errors import InvalidRequest
from engine.stopping import stop_ids
from engine.types import SamplingParams
from kernels.sampling import SamplingRows, greedy, sample


class Sampler:
    """Chooses tokens for one model.  A row's token depends on its logits and its `RowParams` alone."""

    def __init__(self, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids

    def check(self, params: SamplingParams) -> None:
        """InvalidRequest if these parameters cannot work with this model's vocabulary."""
        wrong = [token for token in params.stop_token_ids or () if not 0 <= token < self._vocab_size]
        if wrong:
            raise InvalidRequest(
                f"stop_token_ids holds {wrong[0]}; this model's tokens are 0 to {self._vocab_size - 1}"
            )
        if params.min_tokens and params.max_tokens and params.min_tokens > params.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {params.min_tokens} and max_tokens {params.max_tokens}; lower min_tokens"
            )
        if params.min_tokens and len(stop_ids(params, self._eos_ids)) == self._vocab_size:
            raise InvalidRequest(
                f"every token stops the reply, so min_tokens {params.min_tokens} cannot be met"
            )

    def sample(self, logits: Tensor, params: Sequence[RowParams]) -> list[int]:
        """One token id per row.  logits: [R, V] fp32; rows that may not stop yet are masked in place."""
        with torch.inference_mode():  # as the model that made these logits: elsewhere they may not be written
            for row, p in enumerate(params):
                if p.num_generated < (p.sampling.min_tokens or 0):
                    logits[row, list(stop_ids(p.sampling, self._eos_ids))] = -torch.inf
            all_greedy = not any(p.sampling.temperature for p in params)
            ids: list[int] = (greedy(logits) if all_greedy else sample(logits, _rows(params))).tolist()
        return ids


def _rows(params: Sequence[RowParams]) -> SamplingRows:
    return SamplingRows(
        temperature=torch.tensor([p.sampling.temperature or 0.0 for p in params], dtype=torch.float32),
        top_k=torch.tensor([p.sampling.top_k or 0 for p in params]),
        top_p=torch.tensor([p.sampling.top_p or 1.0 for p in params], dtype=torch.float32),
        min_p=torch.tensor([p.sampling.min_p or 0.0 for p in params], dtype=torch.float32),
        seed=torch.tensor([p.seed for p in params]),
        position=torch.tensor([p.position for p in params]),
    )
