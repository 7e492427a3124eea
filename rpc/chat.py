"""One conversation, seen from the client.

A chat reads its stream only while a reply is being read, so it needs no task of its own.  When the connection
is lost, it attaches again after the last event it saw and sends the turn again under the same id, which the
server answers with the same outcome.
"""

import asyncio
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Unpack

from rpc._generated import continuo_pb2 as pb
from rpc.converse_call import Call, ConverseCall
from rpc.failure import (
    ContinuoError,
    FailedPrecondition,
    Internal,
    NotFound,
    Unavailable,
    error_of_message,
)
from rpc.reply import Reply, ReplyEvent
from rpc.request import Sampling, set_input

# Seconds before each new attempt; when they run out, the error is raised.
Pauses = Callable[[], Iterator[float]]


class Chat:
    """A conversation, attached by `ContinuoClient.open` or `.resume`.  One reply at a time."""

    def __init__(self, connect: Callable[[], Call], pauses: Pauses) -> None:
        self.id = ""
        self.resume_token = ""
        self.committed_tokens = 0
        self.committed_turns = 0
        self.context_left = 0
        self._connect = connect
        self._pauses = pauses
        self._call: ConverseCall | None = None
        self._last_seq = 0
        self._turn_id = ""  # of the turn in flight
        self._reader: Callable[[], Reply | None] = lambda: None  # whoever holds the reply to it
        self._given_up = ""  # a turn that nobody reads any more; the server may still be answering it

    def say(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        turn_id: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> Reply:
        """Says `text`, or `messages` (role, content), or `token_ids` as they are; returns the reply to come.

        `timeout`: seconds after which the reply ends with DEADLINE and what it has.  A `turn_id` of your own
        makes it safe to say the same again, even from another process.
        """
        turn = pb.Turn(turn_id=turn_id or f"t-{uuid.uuid4().hex[:12]}", sampling=sampling, timeout_s=timeout)
        set_input(turn, text, messages, token_ids)
        reply = Reply()
        reply.events = self._answer(turn, weakref.ref(reply))
        return reply

    async def cancel(self, *, discard: bool = False) -> None:
        """Ends the turn in flight: its reply ends with CANCELLED.  What was said is kept unless `discard`."""
        if not self._turn_id:
            raise FailedPrecondition("no turn is in flight in this chat; there is nothing to cancel")
        if self._call is None or self._call.ended:
            raise Unavailable("the connection is lost and not back yet; cancel again in a moment")
        cancel = pb.Cancel(turn_id=self._turn_id, discard=discard)
        await self._call.send(pb.ClientEvent(cancel=cancel))

    async def close(self, *, delete: bool = False) -> None:
        """Leaves the conversation when its current turn has ended; with `delete`, erases it at once."""
        await self._come_to_rest(delete)
        pauses, lost = self._pauses(), False
        while True:
            try:
                call = await self._attached()
                await call.send(pb.ClientEvent(close=pb.Close(delete=delete)))
                while (await self._read(call)).WhichOneof("event") != "closed":
                    pass
                return self._hang_up()
            except Unavailable as error:
                self._hang_up()
                await _wait(pauses, error)
                lost = True
            except NotFound:
                if not (delete and lost):
                    raise
                return  # erased; only the answer was lost

    async def attach(self, first: pb.ClientEvent) -> None:
        """Connects with `first`, an open or a resume.  A resume is safe to repeat, an open is not."""
        pauses = self._pauses()
        while True:
            try:
                return await self._attach(first)
            except Unavailable as error:
                if first.HasField("open"):
                    raise
                await _wait(pauses, error)

    async def _answer(
        self, turn: pb.Turn, reader: Callable[[], Reply | None]
    ) -> AsyncGenerator[ReplyEvent, None]:
        """The events of one turn, over as many connections as it takes."""
        self._begin(turn.turn_id, reader)
        pauses = self._pauses()
        try:
            while True:
                try:
                    call = await self._attached()
                    client_seq = await call.send(pb.ClientEvent(turn=turn))
                    while True:
                        event = _event_of(turn.turn_id, client_seq, await self._read(call))
                        if isinstance(event, pb.TurnDone):
                            self._end(event)
                            yield event
                            return
                        if event is not None:
                            yield event
                except Unavailable as error:
                    self._hang_up()
                    await _wait(pauses, error)
        except (asyncio.CancelledError, GeneratorExit):
            if self._turn_id == turn.turn_id:
                self._give_up()
            raise
        finally:
            if self._turn_id == turn.turn_id:
                self._turn_id = ""

    async def _come_to_rest(self, hurry: bool) -> None:
        """Waits for the turn in flight, together with whoever reads its reply."""
        reply = self._reader()
        if not self._turn_id:
            return
        if reply is None:
            return self._give_up()
        if hurry:
            await self.cancel(discard=True)
        with suppress(ContinuoError):
            await reply

    def _begin(self, turn_id: str, reader: Callable[[], Reply | None]) -> None:
        if self._turn_id:
            if self._reader() is not None:
                raise FailedPrecondition(
                    f"turn {self._turn_id} is still being answered; read its reply to the end, after "
                    "`await chat.cancel()` if you want it short, and then say the next thing"
                )
            self._give_up()
        self._turn_id, self._reader = turn_id, reader

    def _end(self, done: pb.TurnDone) -> None:
        self._turn_id = ""
        self.committed_turns += done.committed_tokens > self.committed_tokens
        self.committed_tokens, self.context_left = done.committed_tokens, done.context_left

    def _give_up(self) -> None:
        """Nobody reads the turn in flight any more: the server should not go on with it."""
        self._given_up, self._turn_id = self._turn_id, ""
        self._hang_up()

    async def _attached(self) -> ConverseCall:
        if self._call is None or self._call.ended:
            await self._attach(
                pb.ClientEvent(resume=pb.Resume(conversation_id=self.id, after_seq=self._last_seq))
            )
        assert self._call is not None
        if self._given_up:
            await self._settle(self._call)
        return self._call

    async def _settle(self, call: ConverseCall) -> None:
        """Cancels the turn that was given up, keeping what was said, and waits for its end."""
        turn_id = self._given_up
        client_seq = await call.send(pb.ClientEvent(cancel=pb.Cancel(turn_id=turn_id)))
        try:
            while not isinstance(_event_of(turn_id, client_seq, await self._read(call)), pb.TurnDone):
                pass
        except Unavailable:
            raise
        except ContinuoError:  # it had ended already, or had never begun
            if call.ended:
                raise
        self._given_up = ""

    async def _attach(self, first: pb.ClientEvent) -> None:
        call = ConverseCall(self._connect())
        try:
            await call.send(first)
            answer = await self._read(call)
            attached = answer.opened if first.HasField("open") else answer.resumed
            if not attached.conversation_id:
                raise Internal(f"the server answered {answer.WhichOneof('event')} where it had to attach")
        except BaseException:
            call.hang_up()
            raise
        self._call = call
        if not first.resume.HasField("after_seq"):
            self._last_seq = attached.last_seq
        self.id, self.resume_token = attached.conversation_id, attached.resume_token
        self.committed_tokens, self.context_left = attached.committed_tokens, attached.context_left
        self.committed_turns = attached.committed_turns

    async def _read(self, call: ConverseCall) -> pb.ServerEvent:
        event = await call.read()
        self._last_seq = max(self._last_seq, event.seq)
        return event

    def _hang_up(self) -> None:
        if self._call is not None:
            self._call.hang_up()
            self._call = None


def _event_of(turn_id: str, client_seq: int, event: pb.ServerEvent) -> ReplyEvent | None:
    """What `event` says about the turn, or None if it is about something else.  Raises the turn's failure."""
    match event.WhichOneof("event"):
        case "turn_accepted" if event.turn_accepted.turn_id == turn_id:
            return event.turn_accepted
        case "delta" if event.delta.turn_id == turn_id:
            return event.delta
        case "turn_done" if event.turn_done.turn_id == turn_id:
            return event.turn_done
        case "turn_failed" if event.turn_failed.turn_id == turn_id:
            raise error_of_message(event.turn_failed.error)
        case "error" if event.error.client_seq == client_seq:
            raise error_of_message(event.error)
    return None


async def _wait(pauses: Iterator[float], error: Unavailable) -> None:
    """Before the next attempt; raises `error` if there is none left."""
    pause = next(pauses, None)
    if pause is None:
        raise error
    await asyncio.sleep(max(pause, error.retry_after_s or 0.0))
