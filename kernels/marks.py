"""What a step's time goes to, told where it passes: the code that computes calls `mark(part)` behind each
piece of work, and everything since the mark before belongs to that part.
"""

from collections.abc import Callable
from typing import Literal, get_args

Part = Literal["linears", "attention", "rest", "sampling", "copies", "host", "idle"]
"""rest: norms, rotation, activation, embedding; copies: KV between the tiers; host: plans, input tensors and
what the event loop does between steps; idle: there was nothing to compute.
"""
PARTS: tuple[Part, ...] = get_args(Part)
Mark = Callable[[Part], None]


def unmarked(part: Part) -> None:
    """The mark of a step that is not profiled: 16 ns, some hundred times a step."""
