"""One `Converse` call of the client: sends, reads, and knows why it ended."""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import grpc

from rpc._generated import continuo_pb2 as pb
from rpc.failure import Cancelled, ContinuoError, ResourceExhausted, Unavailable, error_of_call

Value = TypeVar("Value")
Call = grpc.aio.StreamStreamCall[pb.ClientEvent, pb.ServerEvent]

MAX_MESSAGE_BYTES = 64 * 2**20
_HIDDEN = "Internal error from Core"


class ConverseCall:
    """Raises `ContinuoError`; afterwards the call is `ended`.

    A write to a call that is just ending makes grpcio put INTERNAL in the place of its status, before or
    after the real one arrives.  So every status is noted as it comes, and the real one is told.
    """

    def __init__(self, call: Call) -> None:
        self.ended = False
        self._call = call
        self._client_seq = 0
        self._status: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note_status)

    async def send(self, event: pb.ClientEvent) -> int:
        """Returns the number by which an `error` would refer to `event`."""
        self._client_seq += 1
        event.client_seq = self._client_seq
        if (size := event.ByteSize()) > MAX_MESSAGE_BYTES:
            raise ResourceExhausted(f"the event has {size} bytes; at most {MAX_MESSAGE_BYTES} can be sent")
        try:
            await self._call.write(event)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            error = await self._why_ended()
            self.hang_up()
            raise error from None
        return event.client_seq

    async def read(self) -> pb.ServerEvent:
        try:
            event = await self._call.read()
        except grpc.aio.AioRpcError as error:
            self.hang_up()
            raise error_of_call(self._status or error) from None
        except asyncio.CancelledError:
            self.hang_up()
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Cancelled("the client was closed while this was going on") from None
        if not isinstance(event, pb.ServerEvent):
            self.hang_up()
            raise Unavailable("the server ended the stream")
        return event

    def hang_up(self) -> None:
        self.ended = True
        self._call.cancel()

    async def _why_ended(self) -> ContinuoError:
        for _ in range(20):
            if self._status is not None:
                return error_of_call(self._status)
            await asyncio.sleep(0.01)
        # While messages are still unread no status comes; whatever it would be, this connection is over.
        return Unavailable("the connection was lost while sending")

    def _note_status(self, call: Any) -> None:
        code, details, trailers = _now(call.code()), _now(call.details()), _now(call.trailing_metadata())
        if self._status is None and code is not grpc.StatusCode.OK and details != _HIDDEN:
            self._status = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details)


async def wait(pauses: Iterator[float], error: Unavailable) -> None:
    """Before the next attempt; raises `error` if no pause is left."""
    pause = next(pauses, None)
    if pause is None:
        raise error
    await asyncio.sleep(max(pause, error.retry_after_s or 0.0))


def _now(coroutine: Coroutine[Any, Any, Value]) -> Value:
    """The result of a coroutine that need not wait: those that ask a call which is done."""
    try:
        coroutine.send(None)
    except StopIteration as finished:
        value: Value = finished.value
        return value
    raise AssertionError("the call is not done")
