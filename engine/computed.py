"""What of a history has been computed, and why what is missing of it is missing.

A history is a row of zones from its first token on.  Each says why a token of it whose KV is nowhere has to
be computed; a token whose KV is found is no miss, whatever its zone.
"""

from collections import Counter
from collections.abc import Callable
from enum import Enum
from itertools import chain


class Miss(Enum):
    """Why a token's KV is in no tier."""

    EVICTED = "evicted"  # computed since the conversation came into memory, and given up since
    CUT = "cut"  # the same, but its block went with what stood behind it: blocks are shared whole
    RESTART = "restart"  # computed before the conversation came into memory
    REWRITTEN = "rewritten"  # computed in other words
    NEVER_COMPUTED = "never computed"  # history that no turn has attended to
    NEW = "new"  # of this turn, or the last token of a reply: chosen, and not attended to yet


class Computed:
    """Of one conversation.  Behind the last zone nothing was ever computed."""

    __slots__ = ("_zones",)

    def __init__(self) -> None:
        self._zones: list[tuple[int, Miss]] = []  # (end, why), ends ascending; only the first is EVICTED

    @property
    def num_tokens(self) -> int:
        """So many tokens from the first on were computed, ever."""
        return next((end for end, why in reversed(self._zones) if why is not Miss.NEW), 0)

    @property
    def num_here(self) -> int:
        """Those of them that were computed since the conversation came into memory."""
        end, why = self._zones[0] if self._zones else (0, Miss.EVICTED)
        return end if why is Miss.EVICTED else 0

    def copy(self) -> "Computed":
        copy = Computed()
        copy._zones = self._zones[:]
        return copy

    def add(self, end: int, why: Miss) -> None:
        """Tokens behind the last zone, up to `end`."""
        if end > (self._zones[-1][0] if self._zones else 0):
            self._zones.append((end, why))

    def compute(self, num_tokens: int) -> None:
        """The first `num_tokens` have been computed now."""
        if num_tokens > self.num_here:
            behind = [zone for zone in self._zones if zone[0] > num_tokens]
            self._zones = [(num_tokens, Miss.EVICTED), *behind]

    def cut(self, num_tokens: int) -> None:
        """Forget everything from token `num_tokens` on."""
        starts = [0, *(end for end, _ in self._zones)]
        self._zones = [
            (min(end, num_tokens), why)
            for start, (end, why) in zip(starts, self._zones, strict=False)
            if start < num_tokens
        ]

    def lose(self, first_token: int) -> None:
        """The KV of what is computed here from `first_token` on was in a block that was cut."""
        end = self.num_here
        if end > first_token:
            self._zones[:1] = [(first_token, Miss.EVICTED)] * (first_token > 0) + [(end, Miss.CUT)]

    def misses(self, num_tokens: int, num_history: int, kept: Callable[[int], int]) -> "Counter[Miss]":
        """Why those of the first `num_tokens` are computed that have to be, for a turn that begins behind
        `num_history` tokens.

        `kept(n)` is how many of the first n tokens have KV.  The last token is computed in any case: its
        logits choose the next one.
        """
        counts: Counter[Miss] = Counter()
        start = num_kept = 0
        behind = ((num_history, Miss.NEVER_COMPUTED), (num_tokens, Miss.NEW))
        for end, why in chain(self._zones, behind):
            end = min(end, num_tokens)
            if end > start:
                before, num_kept = num_kept, kept(end)
                counts[why] += end - start - (num_kept - before)
                start = end
        if num_kept > kept(num_tokens - 1):
            counts[Miss.CUT if self.num_tokens >= num_tokens else Miss.NEW] += 1
        return counts
