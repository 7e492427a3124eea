"""`Reply`: iterate over it for the deltas, await it for the turn; both in turn is fine."""

import asyncio
from collections.abc import AsyncGenerator, Generator

from rpc._generated import continuo_pb2 as pb
from rpc.failure import Cancelled, Unavailable
from rpc.outcome import Delta, ReplyBuffer, Turn

ReplyEvent = pb.TurnAccepted | pb.Delta | pb.TurnDone


class Reply:
    """The answer to one turn.  Nothing is sent before the first `async for` or `await`.

    Leaving the loop early keeps the rest for a later loop or `await`; cancelling the task that reads gives it
    up.
    """

    events: AsyncGenerator[ReplyEvent, None]  # set once, by whoever makes the reply

    def __init__(self) -> None:
        self._buffer = ReplyBuffer()
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
                while self._turn is None:
                    if (delta := self._take(await anext(self.events))) is not None:
                        return delta
            except asyncio.CancelledError:
                self._failure = Cancelled("reading this reply was cancelled, which ends its turn")
                raise
            except StopAsyncIteration:
                self._failure = Unavailable("the server ended the reply without a last word")
                raise self._failure from None
            except Exception as error:
                self._failure = error
                raise
            return None

    def _take(self, event: ReplyEvent) -> Delta | None:
        match event:
            case pb.TurnAccepted():
                if event.restarted:
                    self._buffer.restart()
                return None
            case pb.Delta():
                return self._buffer.add(event)
            case pb.TurnDone():
                last = self._buffer.finish()
                self._turn = self._buffer.turn(event)
                return last
