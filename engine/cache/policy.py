"""Which idle conversation loses blocks first: one ranking function, lowest out first.

The manager decides what *may* go (nothing a running turn or a launched step needs); a policy only orders.
"""

from collections.abc import Callable

from engine.cache.block import BlockTable

Rank = Callable[[BlockTable, float], float]
"""(table of an idle conversation, now in seconds) -> keep value."""


def lru(table: BlockTable, now: float) -> float:
    """Longest idle first.  Within a conversation the leading blocks go first: they are the cheapest to
    compute again.
    """
    return table.last_active - now
