"""Chooses tokens on the GPU, as engine.sampler does on the CPU, without waiting for it.

What depends on the host's knowledge alone, such as which logits are edited, is settled there and sent along.
Logprobs come back to the host on the compute stream, right behind the choice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import RowParams
from engine.cuda.device import Device
from engine.edits import Edits, is_edited
from engine.sampler import Reporting, SamplerRules, num_reported, rows_reporting, token_logprobs
from engine.types import TokenLogprobs
from kernels.logprobs import logprobs
from kernels.pinned import sent
from kernels.sampling import SamplingRows, greedy, sample


def is_plain(params: RowParams) -> bool:
    """Whether a row takes logits and `SamplingRows` alone: no edits, and no logprobs.  Steps of such rows do
    the same work whatever they hold.
    """
    return params.sampling.logprobs is None and not is_edited(params)


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokens of one step, which the device may still have to choose."""

    ids: Tensor  # [R] int64 on the device
    logprobs: Callable[[], dict[int, TokenLogprobs]] = dict
    """By the row's name, of rows that report them; to be called once the step's work is done."""


class DeviceSampler(SamplerRules):
    """Chooses tokens for one model.  A row's token depends on its logits and its `RowParams` alone, and is
    the one that `engine.sampler.Sampler` chooses, unless it takes rounding to decide.
    """

    def __init__(self, device: Device, vocab_size: int, eos_ids: frozenset[int]) -> None:
        super().__init__(vocab_size, eos_ids)
        self._device = device
        self._edits = Edits(eos_ids)

    def choose(self, logits: Tensor, params: Mapping[int, RowParams], rows: SamplingRows) -> Choice:
        """A token for each row of logits [R, V] fp32, which are edited in place.  Does not wait for the
        device, whose compute stream must be the current one.

        rows: of all R, on the device.  `params` by name, in the order of logits: of all of them, or, where
        logits are the results of idle segments, of the first.
        """
        with torch.inference_mode():
            self._edits.apply(logits, params)
            is_known = len(params) == len(logits)
            all_greedy = is_known and not any(p.sampling.temperature for p in params.values())
            ids = greedy(logits) if all_greedy else sample(logits, rows)
            reporting = rows_reporting(params)
            return self._with_logprobs(logits, ids, reporting) if reporting else Choice(ids)

    def _with_logprobs(self, logits: Tensor, ids: Tensor, reporting: Reporting) -> Choice:
        at = sent(torch.tensor([at for at, _, _ in reporting]), logits.device)
        chosen = ids.index_select(0, at)
        found = logprobs(logits.index_select(0, at), chosen, num_reported(reporting))
        on_host = [self._to_host(tensor) for tensor in (chosen, *found)]
        return Choice(ids, lambda: token_logprobs(reporting, *on_host))

    def _to_host(self, x: Tensor) -> Tensor:
        """There once the compute stream has done what it was given so far."""
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._device.copy(host, x.contiguous(), self._device.compute)
        return host
