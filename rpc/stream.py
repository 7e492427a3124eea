"""One `Converse` call: the client's events go into an attachment, the conversation's events come out.

Facts of grpcio that shape this file.  When a client disappears, a handler that waits is cancelled, but the
iterator of requests simply ends, exactly as on a polite half-close, and `context.cancelled()` is still
False.  So the end of the requests proves nothing: it begins a retaining close, and a stream that ends before
that close is complete counts as gone.
"""

import asyncio
from collections.abc import AsyncIterator

from engine.errors import Draining, EngineError, InvalidRequest
from rpc import codec
from rpc._generated import continuo_pb2 as pb
from rpc.backend import Attachment
from rpc.status import Context, error_message

Requests = AsyncIterator[pb.ClientEvent]


class ConversationStream:
    """Has no queue of its own: with a slow reader `events` are not taken, and the attachment merges them."""

    def __init__(self, attachment: Attachment, requests: Requests, context: Context) -> None:
        self._attachment = attachment
        self._requests = requests
        self._context = context
        self._writing = asyncio.Lock()  # one at a time; reader and writer both have something to say
        self._closed: pb.Closed | None = None

    async def run(self, greeting: pb.ServerEvent) -> None:
        """Until either side ends it.  Raises what the attachment's events raise."""
        try:
            await self._write(greeting)
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read())
                async for event in self._attachment.events():
                    await self._write(codec.server_event(event))
                await reader
            await self._write(pb.ServerEvent(closed=self._closed))
        except ExceptionGroup as group:
            error = group.exceptions[0]
            if isinstance(error, Draining):
                await self._write(self._draining(error))
            raise error from None
        finally:
            if self._closed is None:
                self._attachment.detach()

    async def _read(self) -> None:
        """Obeys the client until it closes or half-closes; what is refused is answered in band."""
        async for message in self._requests:
            try:
                if await self._obey(message):
                    return
            except EngineError as error:
                turn_id = message.turn.turn_id or message.cancel.turn_id or None
                told = error_message(error, turn_id=turn_id, client_seq=message.client_seq)
                await self._write(pb.ServerEvent(error=told))
        await self._close(delete=False)

    async def _obey(self, message: pb.ClientEvent) -> bool:
        """Whether this was the last event of the stream."""
        match message.WhichOneof("event"):
            case "turn":
                await self._attachment.turn(codec.turn_request(message.turn))
            case "cancel":
                await self._attachment.cancel(
                    codec.cancelled_turn(message.cancel), keep=not message.cancel.discard
                )
            case "close":
                await self._close(message.close.delete)
                return True
            case None:
                raise InvalidRequest("the event is empty or not known here; send turn, cancel or close")
            case first:
                raise InvalidRequest(
                    f"{first} must be the first event of a stream; this one is attached to "
                    f"{self._attachment.conversation_id} already, use another stream"
                )
        return False

    async def _close(self, delete: bool) -> None:
        await self._attachment.close(delete)
        self._closed = pb.Closed(deleted=delete)

    async def _write(self, event: pb.ServerEvent) -> None:
        async with self._writing:
            await self._context.write(event)

    def _draining(self, error: Draining) -> pb.ServerEvent:
        token, retry_after_s = self._attachment.resume_token, error.retry_after_s
        return pb.ServerEvent(draining=pb.Draining(resume_token=token, retry_after_s=retry_after_s))


def attached(attachment: Attachment) -> pb.Attached:
    return pb.Attached(
        conversation_id=attachment.conversation_id,
        resume_token=attachment.resume_token,
        committed_tokens=attachment.committed_tokens,
        committed_turns=attachment.committed_turns,
        context_left=attachment.context_left,
        last_seq=attachment.last_seq,
    )
