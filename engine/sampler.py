"""From logits to token ids: edits first, then logprobs, then a choice by temperature and filters."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from engine.batch import RowParams
from engine.edits import Edits
from engine.errors import InvalidRequest
from engine.stopping import stop_ids
from engine.types import SamplingParams, TokenLogprobs
from kernels.highest import Highest, highest
from kernels.logprobs import logprobs
from kernels.sampling import NUM_LISTED, SamplingRows, greedy, sample

Reporting: TypeAlias = Sequence[tuple[int, int, int]]
"""The rows that report logprobs: place among the logits, name, and of how many likeliest tokens."""


class SamplerRules:
    """What samplers of one model have in common: what they refuse."""

    def __init__(self, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids

    def check(self, params: SamplingParams, bad_word_ids: Sequence[Sequence[int]] = ()) -> None:
        """InvalidRequest if these parameters cannot work with this model's vocabulary."""
        biased = [token for token, _ in params.logit_bias or ()]
        self._check_tokens("stop_token_ids holds", params.stop_token_ids or ())
        self._check_tokens("logit_bias names", biased)
        if len(set(biased)) < len(biased):
            twice = next(token for token in biased if biased.count(token) > 1)
            raise InvalidRequest(f"logit_bias names token {twice} more than once; give it one bias")
        if (params.logprobs or 0) > self._vocab_size:
            raise InvalidRequest(f"logprobs is {params.logprobs}; this model has {self._vocab_size} tokens")
        if params.min_tokens and params.max_tokens and params.min_tokens > params.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {params.min_tokens} and max_tokens {params.max_tokens}; lower min_tokens"
            )
        stops = stop_ids(params, self._eos_ids) if params.min_tokens else frozenset[int]()
        if len(stops) == self._vocab_size:
            raise InvalidRequest(
                f"every token stops the reply, so min_tokens {params.min_tokens} cannot be met"
            )
        if len(stops.union(word[-1] for word in bad_word_ids)) == self._vocab_size:
            also = f", or stops the reply before min_tokens {params.min_tokens}" if stops else ""
            raise InvalidRequest(f"every token ends one of the bad_words{also}; leave some of them out")

    def _check_tokens(self, where: str, tokens: Sequence[int]) -> None:
        wrong = [token for token in tokens if not 0 <= token < self._vocab_size]
        if wrong:
            raise InvalidRequest(f"{where} {wrong[0]}; this model's tokens are 0 to {self._vocab_size - 1}")


class Sampler(SamplerRules):
    """Chooses tokens for one model.  A row's token depends on its logits and its `RowParams` alone."""

    def __init__(self, vocab_size: int, eos_ids: frozenset[int]) -> None:
        super().__init__(vocab_size, eos_ids)
        self._edits = Edits(eos_ids)

    def sample(
        self, logits: Tensor, params: Mapping[int, RowParams]
    ) -> tuple[dict[int, int], dict[int, TokenLogprobs]]:
        """One token id per row, and the logprobs of those rows that report them.

        `params` by the row's name, in the order of logits [R, V] fp32, which are edited in place.
        """
        with torch.inference_mode():  # as the model that made these logits: elsewhere they may not be written
            self._edits.apply(logits, params)
            rows = list(params.values())
            listed = _listed(logits, [p.sampling for p in rows])
            all_greedy = not any(p.sampling.temperature for p in rows)
            chosen = greedy(logits) if all_greedy else sample(logits, sampling_rows(rows), listed)
            ids: dict[int, int] = dict(zip(params, chosen.tolist(), strict=True))
            return ids, _logprobs(logits, params, chosen, listed)


def _listed(logits: Tensor, params: Sequence[SamplingParams]) -> Highest | None:
    """As many of the highest tokens as both a top-k and the logprobs need; None if that is none."""
    nums = [p.logprobs or 0 for p in params]
    nums += [p.top_k for p in params if p.temperature and p.top_k and p.top_k <= NUM_LISTED]
    most = max(nums, default=0)
    return highest(logits, min(most, logits.shape[1])) if most else None


def sampling_rows(params: Sequence[RowParams]) -> SamplingRows:
    return SamplingRows(
        temperature=torch.tensor([p.sampling.temperature or 0.0 for p in params], dtype=torch.float32),
        top_k=torch.tensor([p.sampling.top_k or 0 for p in params]),
        top_p=torch.tensor([p.sampling.top_p or 1.0 for p in params], dtype=torch.float32),
        min_p=torch.tensor([p.sampling.min_p or 0.0 for p in params], dtype=torch.float32),
        seed=torch.tensor([p.seed for p in params]),
        position=torch.tensor([p.position for p in params]),
    )


def _logprobs(
    logits: Tensor, params: Mapping[int, RowParams], chosen: Tensor, listed: Highest | None
) -> dict[int, TokenLogprobs]:
    reporting = rows_reporting(params)
    if not reporting:
        return {}
    some = slice(None) if len(reporting) == len(params) else torch.tensor([at for at, _, _ in reporting])
    found = logprobs(logits[some], chosen[some], num_reported(reporting), listed and listed.select(some))
    return token_logprobs(reporting, chosen[some], *found)


def rows_reporting(params: Mapping[int, RowParams]) -> Reporting:
    asked = [(at, row, p.sampling.logprobs) for at, (row, p) in enumerate(params.items())]
    return [(at, row, num) for at, row, num in asked if num is not None]


def num_reported(reporting: Reporting) -> int:
    """Likeliest tokens of the row that reports most."""
    return max(num for _, _, num in reporting)


def token_logprobs(
    reporting: Reporting, chosen: Tensor, of_chosen: Tensor, top: Tensor, ids: Tensor
) -> dict[int, TokenLogprobs]:
    """By the row's name.  A token that cannot be chosen is not among the likeliest.

    The tensors are what `kernels.logprobs` takes and gives for these rows, in the host's memory.
    """
    values, top_ids = top.tolist(), ids.tolist()
    return {
        row: TokenLogprobs(
            token,
            logprob,
            tuple(
                (id, value)
                for id, value in zip(top_ids[i][:num], values[i], strict=False)
                if value > -torch.inf
            ),
        )
        for i, ((_, row, num), token, logprob) in enumerate(
            zip(reporting, chosen.tolist(), of_chosen.tolist(), strict=True)
        )
    }
