"""What a step's time goes to, told where it passes: the code that computes calls `mark(part)` behind each
piece of work, and everything since the mark before belongs to that part.
"""

from typing import Literal, Protocol, get_args

Part = Literal["linears", "attention", "rest", "sampling", "copies", "host", "idle"]
"""rest: norms, rotation, activation, embedding; copies: KV between the tiers; host: plans, input tensors and
what the event loop does between steps; idle: there was nothing to compute.
"""
PARTS: tuple[Part, ...] = get_args(Part)


class Mark(Protocol):
    def __call__(self, part: Part, seconds: float | None = None) -> None:
        """The time since the last mark went to `part`, or `seconds` of it: then the rest is yet to tell."""


def unmarked(part: Part, seconds: float | None = None) -> None:
    """The mark of a step that is not profiled: 16 ns, a few to a hundred times a step."""
