"""Which idle conversation loses blocks first: one ranking function, lowest out first.

The manager decides what *may* go (nothing a running turn or a launched step needs); a policy only orders.
The same order empties the device tier into the host tier, and the host tier into nothing.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from engine.cache.costs import CostTable


class Value(Protocol):
    """Numbers or arrays of them alike: the worth of keeping the block that ends at token `end` of a
    conversation that has been idle for `idle_s` seconds.
    """

    def __call__(self, end: Any, idle_s: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """Within a conversation blocks go in order, from the first or from the last on; their values never fall
    in that order.
    """

    value: Value
    from_tail: bool = False


lru = Policy(lambda end, idle_s: end * 0.0 - idle_s)
"""Longest idle first, leading blocks first: those are the cheapest to compute again."""

lru_tail = Policy(lambda end, idle_s: end * 0.0 - idle_s, from_tail=True)
"""Longest idle first, last blocks first, as caches of prefixes do."""


def retention(costs: CostTable) -> Policy:
    """Cost of computing the block again over idle time (Pensieve, section 4.3.1)."""
    return Policy(lambda end, idle_s: costs.compute_s(end) / (idle_s + 1e-9))


def policy_named(name: str, costs: CostTable | None) -> Policy:
    """retention, which needs costs, lru or lru-tail."""
    if name == "retention" and costs is not None:
        return retention(costs)
    return {"lru": lru, "lru-tail": lru_tail}[name]
