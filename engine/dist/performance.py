"""How fast a rank decodes, given its batch and what it attends to (Infinite-LLM's performance model)."""

from collections.abc import Mapping
from typing import Any

import numpy as np


class Performance:
    """Of one layer: T(b, S) = W(b) / f(b) + sum over requests of S_r / g(S_r).

    The first part, all that is not attention, depends on the batch b; the second one on the lengths S alone,
    wherever the queries come from.  f and g are measured at a few points; between them they are
    interpolated, beyond them the last one holds.
    """

    def __init__(
        self,
        num_layers: int,
        work: float,
        work_rate: Mapping[int, float],
        attention_rate: Mapping[int, float],
        near_s: float,
        far_s: float,
    ) -> None:
        """`work`: of one token (W(b) = b * work), `work_rate`: f, by batch, in the same unit per second;
        `attention_rate`: g, tokens attended to per second, by length.  `near_s`, `far_s`: from sending a
        layer's queries to another rank, of the same node or not, to having the answer, beside attention.
        """
        self.num_layers, self.work = num_layers, work
        self._near_s, self._far_s = near_s, far_s
        self._batches, self._work_rates = _table(work_rate)
        self._lengths, self._attention_rates = _table(attention_rate)

    def linear_s(self, batch: Any) -> Any:
        """Seconds of a layer but for attention; numbers or arrays alike, as below."""
        return batch * self.work / np.interp(batch, self._batches, self._work_rates)

    def attention_s(self, length: Any) -> Any:
        """Seconds of a layer's attention to so many tokens of one request."""
        return length / np.interp(length, self._lengths, self._attention_rates)

    def exchange_s(self, *, is_near: bool) -> float:
        """Seconds per layer from sending queries to having the answer, but for attention."""
        return self._near_s if is_near else self._far_s

    def tokens_per_s(self, batch: Any, here_s: Any, elsewhere_s: Any = 0.0) -> Any:
        """Of a rank that attends for `here_s` in each layer and waits for others for `elsewhere_s`."""
        layer_s = self.linear_s(batch) + np.maximum(here_s, elsewhere_s)
        return np.where(layer_s > 0, batch / np.maximum(self.num_layers * layer_s, 1e-30), 0.0)


def _table(measured: Mapping[int, float]) -> tuple[Any, Any]:
    if not measured or min(measured.values()) <= 0:
        raise ValueError(f"rates must be measured and positive, not {measured}")
    points = sorted(measured)
    return np.array(points, np.float64), np.array([measured[point] for point in points])
