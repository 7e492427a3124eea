"""How long a step takes, in seconds, from what it computes: a roofline per part of it."""

from dataclasses import dataclass

import numpy as np

from engine.batch import Segment, StepPlan
from engine.cache.costs import CostTable

BLOCKS_TOGETHER = 4
"""As in `engine.profile`."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds.  Linears take `weights_s` or, if that is more, `token_s` for each token; attention of a
    segment takes `kv_token_s` for each token that it attends to or, if that is more, `pair_s` for each pair
    of query and key.
    """

    fixed_s: float  # of every step
    weights_s: float  # to read all weights once
    token_s: float  # of one token in the linears, when there are many
    row_s: float  # of choosing one token, on top
    kv_token_s: float  # to read the KV of one token, in all layers
    pair_s: float  # of one query with one key, in all layers
    load_s: float  # of one block from host to device
    store_s: float  # of one block from device to host
    copy_latency_s: float  # of the copies of a step, either way, whatever their number
    num_layers: int
    overlaps: bool  # copies run beside computation, layer by layer; False: before it, one after the other

    def compute_s(self, plan: StepPlan) -> float:
        """Of a plan's segments, without its copies."""
        if not plan.segments:
            return 0.0
        num_tokens = num_rows = 0
        attention_s, kv_token_s, pair_s = 0.0, self.kv_token_s, self.pair_s
        for segment in plan.segments:
            ids = segment.token_ids
            length = 1 if ids is None else len(ids)
            end = segment.first + length
            num_tokens += length
            num_rows += segment.draw is not None
            reading, computing = end * kv_token_s, length * (end - (length - 1) / 2) * pair_s
            attention_s += reading if reading > computing else computing
        linear_s = max(self.weights_s, num_tokens * self.token_s)
        return self.fixed_s + linear_s + num_rows * self.row_s + attention_s

    def copies_s(self, num_stores: int, num_loads: int) -> tuple[float, float]:
        """Of a step's stores and of its loads, each alone on its way."""
        stores_s = self.copy_latency_s + num_stores * self.store_s if num_stores else 0.0
        loads_s = self.copy_latency_s + num_loads * self.load_s if num_loads else 0.0
        return stores_s, loads_s


def cost_table(costs: StepCosts, block_size: int, context_tokens: int) -> CostTable:
    """What a server that profiled this device would decide by: a block's share of a step that computes a few,
    at positions that are powers of two.
    """
    together = BLOCKS_TOGETHER * block_size
    compute_s, end = {}, together
    while end <= max(context_tokens, together):
        segment = Segment(0, end - together, (0,) * together, np.empty(0, np.int32), None)
        compute_s[end] = costs.compute_s(StepPlan(0, (segment,))) / BLOCKS_TOGETHER
        end *= 2
    return CostTable(compute_s, costs.load_s)
