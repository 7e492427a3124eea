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
        self._num_written = 0
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
                told = error_message(error, turn_id=_turn_of(message), client_seq=message.client_seq)
                await self._write(pb.ServerEvent(error=told))
        await self._close(delete=False)

    async def _obey(self, message: pb.ClientEvent) -> bool:
        """Whether this was the last event of the stream."""
        match message.WhichOneof("event"):
            case "turn":
                await self._attachment.turn(codec.turn_request(message.turn))
            case "append":
                await self._attachment.turn(codec.append_request(message.append))
            case "regenerate":
                await self._attachment.regenerate(codec.regenerate_request(message.regenerate))
            case "rewind":
                standing = await self._attachment.rewind(codec.rewind_point(message.rewind))
                await self._write_behind_events(codec.rewound(message.client_seq, standing))
            case "update":
                await self._attachment.update(codec.update_request(message.update))
                updated = pb.Updated(client_seq=message.client_seq)
                await self._write(pb.ServerEvent(updated=updated))
            case "cancel":
                await self._attachment.cancel(
                    codec.cancelled_turn(message.cancel), keep=not message.cancel.discard
                )
            case "close":
                await self._close(message.close.delete)
                return True
            case None:
                raise InvalidRequest(
                    "the event is empty or not known here; "
                    "send turn, append, regenerate, rewind, update, cancel or close"
                )
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
            self._num_written += 1
            await self._context.write(event)

    async def _write_behind_events(self, answer: pb.ServerEvent) -> None:
        """Behind all that has happened: it tells where the conversation stands after that."""
        num_written = 0
        while num_written != self._num_written:
            num_written = self._num_written
            async with self._writing:
                pass  # what is being written is on its way
            await asyncio.sleep(0)  # and if another event waits, its writing has begun
        await self._write(answer)

    def _draining(self, error: Draining) -> pb.ServerEvent:
        token, retry_after_s = self._attachment.resume_token, error.retry_after_s
        return pb.ServerEvent(draining=pb.Draining(resume_token=token, retry_after_s=retry_after_s))


def _turn_of(message: pb.ClientEvent) -> str | None:
    """The turn that an event of the client is about."""
    kind = message.WhichOneof("event")
    return getattr(getattr(message, kind), "turn_id", None) or None if kind else None


def attached(attachment: Attachment) -> pb.Attached:
    return pb.Attached(
        conversation_id=attachment.conversation_id,
        resume_token=attachment.resume_token,
        committed_tokens=attachment.committed_tokens,
        committed_turns=attachment.committed_turns,
        context_left=attachment.context_left,
        last_seq=attachment.last_seq,
    )
