"""One conversation, seen from the client.

A chat reads its stream while it waits for something, so it needs no task of its own.  When the connection
is lost, it attaches again after the last event it saw and asks again: for a turn under the same id, which the
server answers with the same outcome; what has no id changes nothing the second time.
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Unpack

from rpc._generated import continuo_pb2 as pb
from rpc.converse_call import Call, ConverseCall, wait
from rpc.failure import (
    AlreadyExists,
    ContinuoError,
    FailedPrecondition,
    Internal,
    NotFound,
    Unavailable,
    error_of_message,
)
from rpc.outcome import Turn, TurnState
from rpc.reply import Reply, ReplyEvent, event_of
from rpc.request import Sampling, fork_request, labels_of, new_id, sampling_of, set_input, set_point

Pauses = Callable[[], Iterator[float]]


class Chat:
    """A conversation, attached by `ContinuoClient.open` or `.resume`, or by `fork`.  One thing at a time."""

    def __init__(
        self,
        connect: Callable[[], Call],
        pauses: Pauses,
        fork: Callable[[pb.ForkRequest], Awaitable["Chat"]],
    ) -> None:
        self.id = ""
        self.resume_token = ""
        self.committed_tokens = 0
        self.committed_turns = 0
        self.context_left = 0
        self._connect = connect
        self._pauses = pauses
        self._fork = fork
        self._call: ConverseCall | None = None
        self._last_seq = 0
        self._standing_seq = 0  # what came up to here is in the numbers above
        self._turn_id = ""  # of the turn in flight
        self._reader: Callable[[], Reply | None] = lambda: None  # whoever holds the reply to it
        self._asking = ""  # what else is in flight
        self._given_up = ""  # a turn that nobody reads any more; the server may still be answering it

    def say(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        turn_id: str | None = None,
        on_state: Callable[[TurnState], None] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Reply:
        """Says `text`, or `messages`, or `token_ids` as they are; returns the reply to come.

        A message has role and content, and may have name, tool_call_id and tool_calls (dicts).  `timeout`:
        seconds after which the reply ends with DEADLINE and what it has.  A `turn_id` of your own makes it
        safe to say the same again, even from another process.  `on_state` is called, while the reply is read,
        when the turn begins to run, is suspended, and goes on; what it raises, the reader gets, and the turn
        ends.
        """
        turn = pb.Turn(turn_id=turn_id or new_id("t"), sampling=sampling_of(sampling), timeout_s=timeout)
        set_input(turn, text, messages, token_ids)
        return self._reply(turn.turn_id, pb.ClientEvent(turn=turn), on_state)

    async def append(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        token_ids: Sequence[int] | None = None,
        turn_id: str | None = None,
    ) -> Turn:
        """Adds to the history without asking for a reply.  Arguments as in `say`."""
        append = pb.Append(turn_id=turn_id or new_id("t"))
        set_input(append, text, messages, token_ids)
        return await self._reply(append.turn_id, pb.ClientEvent(append=append))

    def regenerate(
        self,
        *,
        replaces: str | None = None,
        timeout: float | None = None,
        turn_id: str | None = None,
        on_state: Callable[[TurnState], None] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Reply:
        """Another reply to what turn `replaces` said, or the last one.  `on_state` as in `say`.

        That turn and all behind it give way once the new reply is complete; if it fails they stand.
        """
        again = pb.Regenerate(
            turn_id=turn_id or new_id("t"),
            replaces=replaces,
            sampling=sampling_of(sampling),
            timeout_s=timeout,
        )
        return self._reply(again.turn_id, pb.ClientEvent(regenerate=again), on_state)

    async def rewind(self, *, turns: int | None = None, tokens: int | None = None) -> None:
        """Forgets the history behind its first `turns`, or its first `tokens`."""
        rewind = pb.Rewind()
        set_point(rewind, turns, tokens)
        self._stand((await self._ask(pb.ClientEvent(rewind=rewind))).rewound)

    async def update(self, *, labels: Mapping[str, str] | None = None, **sampling: Unpack[Sampling]) -> None:
        """Sets defaults of the turns to come, and leaves the others; `labels` replace all labels."""
        defaults = sampling_of(sampling) if sampling else None
        await self._ask(pb.ClientEvent(update=pb.Update(sampling=defaults, labels=labels_of(labels))))

    async def fork(
        self,
        *,
        turns: int | None = None,
        tokens: int | None = None,
        id: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> "Chat":
        """A new conversation with this one's history, or its first `turns` or `tokens`; both go on apart."""
        return await self._fork(fork_request(self.id, turns, tokens, id, labels))

    async def cancel(self, *, discard: bool = False) -> None:
        """Ends the turn in flight: its reply ends with CANCELLED.  What was said is kept unless `discard`.

        A reply that leaves no trace raises `Cancelled` where it is read; so does one of `regenerate` that has
        said nothing yet.
        """
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
                await wait(pauses, error)
                lost = True
            except NotFound:
                if not (delete and lost):
                    raise
                return  # erased; only the answer was lost

    async def attach(self, first: pb.ClientEvent, *, id_is_new: bool = False) -> None:
        """Connects with `first`, a resume or an open.

        A resume is safe to repeat.  An open is, if its id was made for it alone (`id_is_new`): should the id
        exist the second time, it is that of an attempt whose answer was lost.  Another id might have existed
        before, so such an open is tried once.
        """
        pauses, lost = self._pauses(), False
        while True:
            try:
                return await self._attach(first)
            except Unavailable as error:
                if first.HasField("open") and not id_is_new:
                    raise
                await wait(pauses, error)
                lost = True
            except AlreadyExists:
                if not lost:
                    raise
                first = pb.ClientEvent(resume=pb.Resume(conversation_id=first.open.conversation_id))

    def _reply(
        self,
        turn_id: str,
        request: pb.ClientEvent,
        on_state: Callable[[TurnState], None] | None = None,
    ) -> Reply:
        reply = Reply(on_state)
        reply.events = self._answer(turn_id, request, weakref.ref(reply))
        return reply

    async def _answer(
        self, turn_id: str, request: pb.ClientEvent, reader: Callable[[], Reply | None]
    ) -> AsyncGenerator[ReplyEvent, None]:
        """The events of one turn, over as many connections as it takes."""
        self._begin(turn_id, reader)
        pauses = self._pauses()
        try:
            while True:
                try:
                    call = await self._attached()
                    client_seq = await call.send(request)
                    while True:
                        event = await self._read(call)
                        about_turn = event_of(turn_id, client_seq, event)
                        if isinstance(about_turn, pb.TurnDone):
                            await self._end(call, event.seq, request, about_turn)
                            self._turn_id = ""
                            yield about_turn
                            return
                        if about_turn is not None:
                            yield about_turn
                except Unavailable as error:
                    self._hang_up()
                    await wait(pauses, error)
        except (asyncio.CancelledError, GeneratorExit):
            if self._turn_id and self._reader is reader:
                self._give_up()
            raise
        finally:
            if self._reader is reader:
                self._turn_id = ""

    async def _end(self, call: ConverseCall, seq: int, request: pb.ClientEvent, done: pb.TurnDone) -> None:
        """Where the conversation stands after a turn."""
        if seq <= self._standing_seq and done.committed_tokens <= self.committed_tokens:
            return  # an outcome that came again
        if request.regenerate.HasField("replaces"):
            # How many turns gave way, only the server knows; rewinding to where it stands changes nothing.
            here = pb.ClientEvent(rewind=pb.Rewind(tokens=done.committed_tokens))
            self._stand((await self._answer_to(call, await call.send(here))).rewound)
        else:
            self.committed_turns += not request.HasField("regenerate")
            self.committed_tokens, self.context_left = done.committed_tokens, done.context_left
        self._standing_seq = seq

    async def _ask(self, request: pb.ClientEvent) -> pb.ServerEvent:
        """The answer to what has no turn id: repeating it changes nothing."""
        self._check_free()
        self._asking = request.WhichOneof("event") or ""
        pauses = self._pauses()
        try:
            while True:
                try:
                    call = await self._attached()
                    return await self._answer_to(call, await call.send(request))
                except Unavailable as error:
                    self._hang_up()
                    await wait(pauses, error)
        finally:
            self._asking = ""

    async def _answer_to(self, call: ConverseCall, client_seq: int) -> pb.ServerEvent:
        while True:
            event = await self._read(call)
            kind = event.WhichOneof("event")
            if kind in ("rewound", "updated") and getattr(event, kind).client_seq == client_seq:
                return event
            if kind == "error" and event.error.client_seq == client_seq:
                raise error_of_message(event.error)

    async def _come_to_rest(self, hurry: bool) -> None:
        """Waits for the turn in flight, together with whoever reads its reply."""
        self._check_asking()
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
        self._check_free()
        self._turn_id, self._reader = turn_id, reader

    def _check_free(self) -> None:
        """One operation at a time: they all read the same stream."""
        self._check_asking()
        if self._turn_id:
            if self._reader() is not None:
                raise FailedPrecondition(
                    f"turn {self._turn_id} is still being answered; read its reply to the end, after "
                    "`await chat.cancel()` if you want it short, and then say the next thing"
                )
            self._give_up()

    def _check_asking(self) -> None:
        if self._asking:
            raise FailedPrecondition(f"`{self._asking}` is not answered yet; await it first")

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
            while not isinstance(event_of(turn_id, client_seq, await self._read(call)), pb.TurnDone):
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
        self._stand(attached)
        self._standing_seq = attached.last_seq

    def _stand(self, here: pb.Attached | pb.Rewound) -> None:
        self.committed_tokens, self.committed_turns = here.committed_tokens, here.committed_turns
        self.context_left = here.context_left

    async def _read(self, call: ConverseCall) -> pb.ServerEvent:
        event = await call.read()
        self._last_seq = max(self._last_seq, event.seq)
        return event

    def _hang_up(self) -> None:
        if self._call is not None:
            self._call.hang_up()
            self._call = None
