"""A GPU without a GPU: streams are queues, whose work is done when somebody may rely on it and no sooner.

What CUDA leaves open is decided against the program: a stream that is not `early` does its work only when the
host or another stream waits for it, reads its sources only then, and what it will write is poisoned from the
moment on when it might have been written.  An order that only luck kept shows as NaN, -1, or old data.
"""

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.memory import Room

STREAMS = ("compute", "loads", "stores", "results")
POISON = 0xFF  # a byte: NaN in every float, -1 in every integer


class Span(NamedTuple):
    """Memory, by address."""

    begin: int
    num_bytes: int

    def overlaps(self, other: "Span") -> bool:
        return self.begin < other.begin + other.num_bytes and other.begin < self.begin + self.num_bytes


def span(tensor: Tensor) -> Span:
    """The memory of a contiguous tensor."""
    assert tensor.is_contiguous(), "a piece that is copied must be contiguous"
    return Span(tensor.data_ptr(), tensor.nbytes)


class Entry(NamedTuple):
    """One line of the trace.  `stream` is "host" where the host waits."""

    stream: str
    what: str  # "copy", "work", "record", "wait"
    subject: object  # bytes, a name, an event


class Point(NamedTuple):
    """All that a stream was given until it had been given so much."""

    stream: "VirtualStream"
    num_given: int

    @property
    def is_reached(self) -> bool:
        return self.stream.num_done >= self.num_given


@dataclass(eq=False)
class VirtualEvent:
    point: Point | None = None  # None: never recorded

    @property
    def is_done(self) -> bool:
        return self.point is None or self.point.is_reached


@dataclass(eq=False)
class _Task:
    run: Callable[[], None] = lambda: None
    reads: tuple[Span, ...] = ()
    writes: tuple[Span, ...] = ()
    after: Point | None = None  # a task that waits
    is_poisoned: bool = False

    @property
    def is_held(self) -> bool:
        return self.after is not None and not self.after.is_reached

    @property
    def is_free(self) -> bool:
        """Takes no time."""
        return not (self.reads or self.writes)


@dataclass(eq=False)
class VirtualStream:
    name: str
    cuda_stream: int  # as a real one has; it means nothing
    is_early: bool
    queue: deque[_Task] = field(default_factory=deque)
    num_done: int = 0
    ends: list[float] = field(default_factory=list)  # when each task ended, seconds

    @property
    def num_given(self) -> int:
        return self.num_done + len(self.queue)


class VirtualDevice:
    """`early` streams do their work as soon as they may, the others as late as they may; the compute stream,
    if early, has always done it all.

    `trace` tells what was asked for, in order.  `sites` are the places in the program that waited,
    and who did; `ignored_site` is one where waiting is left out, to see whether anybody notices.
    """

    def __init__(
        self, early: Collection[str] = ("compute",), *, free_bytes: int = 1 << 30, ignored_site: str = ""
    ) -> None:
        self.torch_device = torch.device("cpu")
        self._streams = [
            VirtualStream(name, number, name in early) for number, name in enumerate(STREAMS, start=1)
        ]
        self.compute, self.loads, self.stores, self.results = self._streams
        self.trace: list[Entry] = []
        self.sites: set[str] = set()
        self.num_events = 0  # ever made
        self._ignored_site = ignored_site
        self._events: list[VirtualEvent] = []
        self._pinned: list[Tensor] = []
        self._room = Room(free_bytes, "the memory of a virtual device")
        self._now = 0.0

    # -- events

    def event(self) -> VirtualEvent:
        if self._events:
            return self._events.pop()
        self.num_events += 1
        return VirtualEvent()

    def recycle(self, event: VirtualEvent) -> None:
        assert event not in self._events, "recycled twice"
        event.point = None
        self._events.append(event)

    @property
    def num_lent_events(self) -> int:
        """Taken and not recycled."""
        return self.num_events - len(self._events)

    def record(self, event: VirtualEvent, stream: VirtualStream) -> None:
        self.trace.append(Entry(stream.name, "record", event))
        self._give(stream, _Task())
        event.point = Point(stream, stream.num_given)

    def wait(self, stream: VirtualStream, event: VirtualEvent) -> None:
        if self._is_ignored(stream.name):
            return
        self.trace.append(Entry(stream.name, "wait", event))
        self._give(stream, _Task(after=event.point))
        if stream is self.compute and stream.is_early:  # what follows may be the body of `on`
            self.finish(stream)

    def synchronize(self, event: VirtualEvent) -> None:
        if self._is_ignored("host"):
            return
        self.trace.append(Entry("host", "wait", event))
        if event.point is not None:
            self._reach(event.point)
            self._advance()

    def is_done(self, event: VirtualEvent) -> bool:
        """Time goes on while one asks: what is late is done by the next time."""
        is_done = event.is_done
        if event.point is not None and not is_done:
            self._reach(event.point)
            self._advance()
        return is_done

    def seconds_between(self, first: VirtualEvent, second: VirtualEvent) -> float:
        """Microseconds of a clock that a task moves by one."""
        ends = []
        for event in (first, second):
            assert event.point is not None and event.is_done, "an event has no time before it is done"
            ends.append(event.point.stream.ends[event.point.num_given - 1])
        return ends[1] - ends[0]

    # -- work

    @contextmanager
    def on(self, stream: VirtualStream) -> Iterator[None]:
        """The body cannot be put off: what was given to the stream before is done first."""
        self.finish(stream)
        yield

    def copy(self, to: Tensor, source: Tensor, stream: VirtualStream) -> None:
        assert to.shape == source.shape and to.dtype == source.dtype, "a copy changes neither shape nor type"
        if stream is not self.compute:
            assert self.is_pinned(to) or self.is_pinned(source), "the host's side of a copy is not pinned"
        self.trace.append(Entry(stream.name, "copy", to.nbytes))
        self._give(stream, _Task(lambda: _move(span(to), span(source)), (span(source),), (span(to),)))

    def launch(
        self, stream: VirtualStream, name: str, run: Callable[[], None], reads: Collection[Tensor] = ()
    ) -> None:
        """A kernel, which unlike the body of `on` may be put off.  What it writes is not poisoned."""
        self.trace.append(Entry(stream.name, "work", name))
        self._give(stream, _Task(run, tuple(map(span, reads)) or (Span(0, 0),)))

    def finish(self, *streams: VirtualStream) -> None:
        """All that these streams were given is done; of all streams, if none is named."""
        for stream in streams or self._streams:
            self._reach(Point(stream, stream.num_given))
        self._advance()

    # -- memory

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        _poison(span(tensor))
        return tensor

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = self.empty(shape, dtype)
        self._pinned.append(tensor)
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        own = span(tensor)
        return not own.num_bytes or any(own.overlaps(span(known)) for known in self._pinned)

    def room(self) -> Room:
        return self._room

    # -- how the queues move

    def _give(self, stream: VirtualStream, task: _Task) -> None:
        stream.queue.append(task)
        self._advance()

    def _advance(self) -> None:
        """Does what takes no time, and what the early streams may, until nothing moves; then poisons."""
        moved = True
        while moved:
            moved = False
            for stream in self._streams:
                while stream.queue and not stream.queue[0].is_held:
                    if not (stream.is_early or stream.queue[0].is_free):
                        break
                    self._do_first(stream)
                    moved = True
        for stream in self._streams:
            _poison_what_may_run(stream)

    def _reach(self, point: Point) -> None:
        while not point.is_reached:
            if (after := point.stream.queue[0].after) is not None:
                self._reach(after)
            _poison_what_may_run(point.stream)
            self._do_first(point.stream)

    def _do_first(self, stream: VirtualStream) -> None:
        stream.queue.popleft().run()
        stream.num_done += 1
        self._now += 1e-6
        stream.ends.append(self._now)

    def _is_ignored(self, waiting: str) -> bool:
        caller = sys._getframe(2)
        site = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}:{waiting}"
        self.sites.add(site)
        return site == self._ignored_site


def _poison_what_may_run(stream: VirtualStream) -> None:
    """What the stream will write without waiting any more, but nothing that a task before still needs."""
    before: list[Span] = []
    for task in stream.queue:
        if task.is_held:
            return
        for written in task.writes:
            if not task.is_poisoned and not any(written.overlaps(other) for other in before):
                _poison(written)
        task.is_poisoned = True
        before += [*task.reads, *task.writes]


def _poison(memory: Span) -> None:
    if memory.num_bytes:
        ctypes.memset(memory.begin, POISON, memory.num_bytes)


def _move(to: Span, source: Span) -> None:
    assert to.num_bytes == source.num_bytes
    if to.num_bytes:
        ctypes.memmove(to.begin, source.begin, to.num_bytes)
