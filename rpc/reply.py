"""`Reply`: iterate over it for the deltas, await it for the turn; both in turn is fine."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator

from rpc._generated import continuo_pb2 as pb
from rpc.failure import Cancelled, Unavailable, error_of_message
from rpc.outcome import Delta, ReplyBuffer, Turn, TurnState, state_of

ReplyEvent = pb.TurnAccepted | pb.HistoryRewritten | pb.StateChanged | pb.Delta | pb.TurnDone


class Reply:
    """The answer to one turn.  Nothing is sent before the first `async for` or `await`.

    Leaving the loop early keeps the rest for a later loop or `await`; cancelling the task that reads gives it
    up.
    """

    events: AsyncGenerator[ReplyEvent, None]  # set once, by whoever makes the reply

    def __init__(self, on_state: Callable[[TurnState], None] | None = None) -> None:
        self._on_state = on_state
        self._buffer = ReplyBuffer()
        self._unread: deque[Delta] = deque()
        self._turn: Turn | None = None
        self._failure: Exception | None = None
        self._reading = asyncio.Lock()  # several tasks may wait for the same reply

    def __aiter__(self) -> "Reply":
        return self

    async def __anext__(self) -> Delta:
        delta = await self._next()
        if delta is None:
            raise StopAsyncIteration
        return delta

    def __await__(self) -> Generator[None, None, Turn]:
        return self._finish().__await__()

    async def _finish(self) -> Turn:
        while await self._next() is not None:
            pass
        assert self._turn is not None
        return self._turn

    async def _next(self) -> Delta | None:
        """The next delta, or None once the turn is complete.  Raises `ContinuoError`, the same one every
        time.
        """
        async with self._reading:
            if self._failure is not None:
                raise self._failure
            try:
                while not self._unread and self._turn is None:
                    self._take(await anext(self.events))
            except asyncio.CancelledError:
                self._failure = Cancelled("reading this reply was cancelled, which ends its turn")
                raise
            except StopAsyncIteration:
                self._failure = Unavailable("the server ended the reply without a last word")
                raise self._failure from None
            except Exception as error:
                self._failure = error
                await self.events.aclose()  # it goes on if `on_state` raised; that gives the turn up
                raise
            return self._unread.popleft() if self._unread else None

    def _take(self, event: ReplyEvent) -> None:
        match event:
            case pb.TurnAccepted():
                if event.restarted:
                    self._buffer.restart()
            case pb.HistoryRewritten():
                self._buffer.rewritten_from = event.first_token
            case pb.StateChanged():
                if self._on_state is not None:
                    self._on_state(state_of(event))
            case pb.Delta():
                self._unread.extend(self._buffer.add(event))
            case pb.TurnDone():
                self._unread.extend(self._buffer.finish())
                self._turn = self._buffer.turn(event)


def event_of(turn_id: str, client_seq: int, event: pb.ServerEvent) -> ReplyEvent | None:
    """What `event` says about the turn, or None if it is about something else.  Raises the turn's failure."""
    match event.WhichOneof("event"):
        case "turn_accepted" if event.turn_accepted.turn_id == turn_id:
            return event.turn_accepted
        case "history_rewritten" if event.history_rewritten.turn_id == turn_id:
            return event.history_rewritten
        case "state_changed" if event.state_changed.turn_id == turn_id:
            return event.state_changed
        case "delta" if event.delta.turn_id == turn_id:
            return event.delta
        case "turn_done" if event.turn_done.turn_id == turn_id:
            return event.turn_done
        case "turn_failed" if event.turn_failed.turn_id == turn_id:
            raise error_of_message(event.turn_failed.error)
        case "error" if event.error.client_seq == client_seq:
            raise error_of_message(event.error)
    return None
