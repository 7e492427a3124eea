"""Who talks when: the conversations that are there at the beginning, and those that come later.

Open (a rate is given): conversations arrive as a Poisson process of rate / (mean turns of the pool) per
second.  The first turn is said on arrival, each later one a think time after the end of the reply before it.
In the steady state the turns said per second are then `rate` on average, as long as the server keeps up.  By
Little's law rate x (mean life / mean turns) conversations are thought about at any time: so many stand in
the middle of their life when the clock starts.

Closed (a number of conversations is given): so many are there always, and one that has ended is followed by a
new one at once.  A rate is met by stretching all think times: the same law, read the other way.

Those that are there at the beginning are as an observer finds them, who comes at any moment of any life.
They are taken at even distances along all pauses of the pool, laid end to end by the length of the history:
so their histories together are as long as expected, and not only on average.  The others are drawn from the
seed, one after the other: the same conversations come whatever the server does.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tools.bench.workload import Script, mean_life_s, mean_turns


@dataclass(frozen=True, slots=True)
class Member:
    """A conversation that takes part.  Its turns before `turn` are history when it begins."""

    number: int
    script: Script
    turn: int = 0
    due_s: float = 0.0  # of `turn`, since the clock's start or the member's own beginning
    idle_s: float = 0.0  # how long it has been thought about already

    @property
    def history_tokens(self) -> int:
        return self.script.tokens_before(self.turn)


class Population:
    """`initial` first, then `arrivals` as an iterator, or `successor` whenever one has ended."""

    def __init__(self, pool: Sequence[Script], seed: int, rate: float, size: int | None = None) -> None:
        """`rate`: turns per second.  `size`: of a closed population, whose think times are to fit already."""
        self._pool = pool
        self._is_closed = size is not None
        self._conversations_per_s = rate / mean_turns(pool)
        self.size = round(self._conversations_per_s * mean_life_s(pool)) if size is None else size
        self._seed = seed
        self._draw = random.Random(f"later {seed}")
        self._num_drawn = 0

    def initial(self) -> list[Member]:
        """Longest idle first."""
        draw = random.Random(f"initial {self._seed}")
        pauses = _pauses(self._pool)
        if not pauses:
            scripts = draw.choices(self._pool, k=self.size if self._is_closed else 0)
            return [Member(self._next_number(), script) for script in scripts]
        ends_s = list(accumulate(pause.think_s for pause in pauses))
        step_s = ends_s[-1] / self.size if self.size else 0.0
        members = []
        for at_s in ((number + 0.5) * step_s for number in range(self.size)):
            pause = pauses[min(bisect_right(ends_s, at_s), len(pauses) - 1)]
            idle_s = draw.random() * pause.think_s
            due_s = pause.think_s - idle_s
            members.append(Member(self._next_number(), pause.script, pause.turn, due_s, idle_s))
        return sorted(members, key=lambda member: -member.idle_s)

    def arrivals(self) -> Iterator[tuple[float, Member]]:
        """When, in seconds since the clock's start, and who; without end.  A closed population has none."""
        at_s = 0.0
        while not self._is_closed:
            at_s += self._draw.expovariate(self._conversations_per_s)
            yield at_s, self._newcomer()

    def successor(self) -> Member | None:
        return self._newcomer() if self._is_closed else None

    def _newcomer(self) -> Member:
        return Member(self._next_number(), self._draw.choice(self._pool))

    def _next_number(self) -> int:
        self._num_drawn += 1
        return self._num_drawn


class Recorded:
    """The conversations of a trace that says itself when each begins: nobody is there at the beginning."""

    def __init__(self, starts: Sequence[tuple[float, Script]]) -> None:
        self._starts = starts

    def initial(self) -> list[Member]:
        return []

    def arrivals(self) -> Iterator[tuple[float, Member]]:
        for number, (at_s, script) in enumerate(self._starts, start=1):
            yield at_s, Member(number, script)

    def successor(self) -> None:
        return None


def think_factor(pool: Sequence[Script], rate: float, size: int) -> float:
    """What think times must be multiplied by so that `size` conversations say `rate` turns per second, if
    replies take no time.  The pool has conversations of more than one turn.
    """
    return size * mean_turns(pool) / (rate * mean_life_s(pool))


def resident_tokens(pool: Sequence[Script], size: int) -> float:
    """Mean length of the histories of `size` conversations together, as an observer finds them."""
    pauses = _pauses(pool)
    weighed = sum(pause.think_s * pause.history_tokens for pause in pauses)
    return size * weighed / sum(pause.think_s for pause in pauses) if pauses else 0.0


@dataclass(frozen=True, slots=True)
class _Pause:
    """Before `turn` of a script."""

    history_tokens: int
    think_s: float
    script: Script
    turn: int


def _pauses(pool: Sequence[Script]) -> list[_Pause]:
    """Shortest history first."""
    found = [
        _Pause(script.tokens_before(turn), exchange.think_s, script, turn)
        for script in pool
        for turn, exchange in enumerate(script.exchanges)
        if exchange.think_s
    ]
    return sorted(found, key=lambda pause: pause.history_tokens)
