"""Time that passes only from one event to the next."""

import heapq
from collections.abc import Callable


class Agenda:
    """What is going to happen, and the clock, which stands at the event that happens now.  Events of the same
    time happen in the order in which they were put down.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self._num_events = 0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay_s, action)

    def happen(self) -> bool:
        """Let the next event happen; False if there is none."""
        if not self._events:
            return False
        self.now, _, action = heapq.heappop(self._events)
        action()
        return True

    def run_until(self, end_s: float) -> None:
        """Everything up to that time."""
        events = self._events
        while events and events[0][0] <= end_s:
            self.now, _, action = heapq.heappop(events)
            action()
        self.now = end_s
