"""What it costs to have a block's KV on the device again: by computing it, or by copying it from the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np


class CostTable:
    """`compute_s` holds seconds to compute one block of several that end at so many tokens, measured at a few
    positions (powers of two); `load_s` are the seconds to copy one block of several from the host.

    Between measurements costs are interpolated, beyond the last one they go on as between the last two.  A
    later block never costs less than an earlier one: it attends to more.
    """

    def __init__(self, compute_s: Mapping[int, float], load_s: float) -> None:
        self.load_s = load_s
        self._ends = np.array(sorted(compute_s), np.float64)
        self._seconds = np.array(list(accumulate((compute_s[end] for end in sorted(compute_s)), max)))
        if not len(self._ends) or self._seconds[0] <= 0 or load_s < 0:
            raise ValueError(f"costs must be measured and positive, not {compute_s} and {load_s}")
        slope = 0.0
        if len(self._ends) > 1:
            slope = float((self._seconds[-1] - self._seconds[-2]) / (self._ends[-1] - self._ends[-2]))
        self._beyond = slope  # seconds per token
        self._asked: dict[int, float] = {}  # before, one at a time

    def compute_s(self, end: Any) -> Any:
        """A number, or an array of them as `end` is."""
        if not isinstance(end, int):
            return self._interpolated(end)
        if end not in self._asked:
            self._asked[end] = float(self._interpolated(end))
        return self._asked[end]

    def _interpolated(self, end: Any) -> Any:
        known = np.interp(end, self._ends, self._seconds)
        return known + self._beyond * np.maximum(end - self._ends[-1], 0.0)


@dataclass(frozen=True, slots=True)
class MeasuredCosts:
    """Seconds per block as they were measured.  The copies are empty where there is no host tier."""

    compute_s: Mapping[int, float]  # by the position at which a few blocks, computed together, end
    load_s: Mapping[int, float]  # host to device, by the number of blocks copied at once
    store_s: Mapping[int, float]  # device to host
    spread: float  # how far the median of the repeats lies above the least, at worst, as a share of it

    def table(self) -> CostTable:
        return CostTable(self.compute_s, self.load_s[max(self.load_s)] if self.load_s else 0.0)


def reload_is_cheaper(costs: CostTable, end: Any, share: Any) -> Any:
    """Whether to copy a block that ends at token `end`, of which `share` is on the host, rather than to
    compute that part again; numbers or arrays alike.  Both costs are of a block among others, which what they
    share has been divided among, so each block decides for itself.
    """
    return costs.load_s <= costs.compute_s(end) * share
