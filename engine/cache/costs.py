"""What it costs to have a block's KV on the device again: by computing it, or by copying it from the host."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate


class CostTable:
    """`compute_s` holds seconds to compute one block of several that end at so many tokens, measured at a few
    positions (powers of two); `load_s` are the seconds to copy one block of several from the host.

    Between measurements costs are interpolated, beyond the last one they go on as between the last two.  A
    later block never costs less than an earlier one: it attends to more.
    """

    def __init__(self, compute_s: Mapping[int, float], load_s: float) -> None:
        self.load_s = load_s
        self._ends = sorted(compute_s)
        self._seconds = list(accumulate((compute_s[end] for end in self._ends), max))
        if not self._ends or self._seconds[0] <= 0 or load_s < 0:
            raise ValueError(f"costs must be measured and positive, not {compute_s} and {load_s}")

    def compute_s(self, end: int) -> float:
        ends, seconds = self._ends, self._seconds
        if end <= ends[0] or len(ends) == 1:
            return seconds[0]
        i = min(bisect_left(ends, end), len(ends) - 1)
        share = (end - ends[i - 1]) / (ends[i] - ends[i - 1])
        return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])


@dataclass(frozen=True, slots=True)
class MeasuredCosts:
    """Seconds per block as they were measured.  The copies are empty where there is no host tier."""

    compute_s: Mapping[int, float]  # by the position at which a few blocks, computed together, end
    load_s: Mapping[int, float]  # host to device, by the number of blocks copied at once
    store_s: Mapping[int, float]  # device to host
    spread: float  # how far the median of the repeats lies above the least, at worst, as a share of it

    def table(self) -> CostTable:
        return CostTable(self.compute_s, self.load_s[max(self.load_s)] if self.load_s else 0.0)


def reload_is_cheaper(costs: CostTable, end: int, share: float) -> bool:
    """Whether to copy a block that ends at token `end`, of which `share` is on the host, rather than to
    compute that part again.  Both costs are of a block among others, which what they share has been divided
    among, so each block decides for itself.
    """
    return costs.load_s <= costs.compute_s(end) * share
