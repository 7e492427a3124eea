"""Cosines and sines of rotary position embedding: on the CPU for as many positions as have been needed so
far, on another device for all of them.
"""

import math

import torch
from torch import Tensor

from engine.errors import InvariantError
from engine.models.layer_attention import Rope
from engine.models.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling

_CPU = torch.device("cpu")

_FIRST_POSITIONS = 4096  # 1 MiB at D = 64; doubled on demand, so that unused context costs nothing


class RopeTable:
    """`upto(n)` gives [M, D] fp32 with M >= n: for each position D/2 cosines, then D/2 sines.

    Another device than the CPU has the whole table from the start: nothing there may grow or move between
    steps, whose kernels know its address; and n, which there may be a mere bound, does not matter.  The CPU
    computes it, so that all devices turn by the same angles.
    """

    def __init__(self, head_dim: int, rope: Rope, max_positions: int, device: torch.device = _CPU) -> None:
        self._frequencies, self._max_positions = inverse_frequencies(head_dim, rope), max_positions
        self._factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
        self._is_whole = device.type != "cpu"
        first = max_positions if self._is_whole else min(_FIRST_POSITIONS, max_positions)
        self._table = self._compute(0, first).to(device)

    def upto(self, num_positions: int) -> Tensor:
        """Raises InvariantError beyond the model's positions: such turns are refused before."""
        known = len(self._table)
        if self._is_whole:
            return self._table
        if num_positions > self._max_positions:
            raise InvariantError(f"position {num_positions - 1} asked of a model of {self._max_positions}")
        if num_positions > known:
            end = min(max(num_positions, 2 * known), self._max_positions)
            self._table = torch.cat((self._table, self._compute(known, end)))
        return self._table

    def _compute(self, begin: int, end: int) -> Tensor:
        angles = torch.arange(begin, end, dtype=torch.float32)[:, None] * self._frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * self._factor


def inverse_frequencies(head_dim: int, rope: Rope) -> Tensor:
    """[D/2] fp32, radians per position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            # How often a pair turns within the original context decides: rarely = slowed, often = kept.
            turns = scaling.original_max_positions * plain / (2 * math.pi)
            kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        case YarnScaling() as scaling:
            first, last = (
                _pair_turning(turns, scaling, head_dim, rope.theta)
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            width = last - first or 0.001  # of no width, the blend is a step
            kept = 1 - (torch.arange(head_dim // 2, dtype=torch.float32) - first) / width
    return torch.lerp(plain / scaling.factor, plain, kept.clamp(0.0, 1.0))


def _pair_turning(turns: float, scaling: YarnScaling, head_dim: int, theta: float) -> float:
    """The index, not a whole number, of the pair that turns so often within the original context."""
    return head_dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
