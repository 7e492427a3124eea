"""One stream's hold on one conversation."""

from collections.abc import AsyncIterator, Awaitable, Callable

from engine.errors import AttachmentTaken
from engine.in_flight import TurnsInFlight
from engine.live import LiveConversation, Outbox
from engine.operations import Operations
from engine.turns import Turns
from engine.types import (
    ConversationEvent,
    ConversationId,
    Point,
    RegenerateRequest,
    Standing,
    TurnId,
    TurnRequest,
    UpdateRequest,
)


class Attachment:
    """Made by `AsyncEngine.open` and `resume`.  Another stream may take it over; every call then raises
    AttachmentTaken.
    """

    def __init__(
        self,
        live: LiveConversation,
        outbox: Outbox,
        turns: Turns,
        in_flight: TurnsInFlight,
        operations: Operations,
        erase: Callable[[LiveConversation], Awaitable[None]],
        *,
        grace_s: float,
        context_tokens: int,
    ) -> None:
        self._live, self._outbox = live, outbox
        self._turns, self._in_flight, self._operations = turns, in_flight, operations
        self._erase, self._grace_s = erase, grace_s
        self.conversation_id: ConversationId = live.record.id
        self.resume_token = live.record.resume_token
        self.committed_tokens = live.committed_tokens
        self.committed_turns = len(live.turns)
        self.last_seq = live.seq
        self.context_left = context_tokens - live.committed_tokens

    def events(self) -> AsyncIterator[ConversationEvent]:
        """In order of seq, first what was missed.  Ends after `close`; raises AttachmentTaken, Draining,
        EngineStopped, or NotFound once somebody has deleted the conversation."""
        return self._outbox.events()

    async def turn(self, request: TurnRequest) -> None:
        """Returns once the turn is accepted; raises if it is refused.  A turn id that is known with the
        same content replays its outcome."""
        await self._accept(request)

    async def regenerate(self, request: RegenerateRequest) -> None:
        """Another reply to an earlier turn, which gives way once this one is committed.  As `turn`; NotFound
        or InvalidRequest if there is no such reply."""
        await self._accept(request)

    async def rewind(self, point: Point) -> Standing:
        """Forget the history behind `point`.  Conflict while a turn is in flight; InvalidRequest for a point
        that is not in the history or inside a message.  One that meets another, perhaps itself sent over a
        stream that broke, comes after it."""
        self._check_held()
        await self._live.rewound()
        self._check_held()
        return await self._operations.rewind(self._live, point)

    async def update(self, request: UpdateRequest) -> None:
        """Change defaults of the turns to come, or the labels.  InvalidRequest."""
        self._check_held()
        await self._operations.update(self._live, request)

    async def cancel(self, turn_id: TurnId, keep: bool) -> None:
        """End the turn in flight; with `keep` what was said is committed, otherwise the turn leaves no
        trace.
        """
        self._check_held()
        await self._turns.cancel(self._live, turn_id, keep)

    async def close(self, delete: bool) -> None:
        """Retaining waits for the turn in flight to end; deleting discards it and erases the conversation."""
        self._check_held()
        if delete:
            self._outbox.end()
            await self._erase(self._live)
        else:
            await self._live.idle.wait()
        self._release()

    def detach(self) -> None:
        """The stream is gone.  The turn in flight is cancelled after the grace period, unless somebody
        resumes.
        """
        if self._live.outbox is self._outbox:
            self._release()
            self._in_flight.cancel_after(self._live, self._grace_s)

    async def _accept(self, request: TurnRequest | RegenerateRequest) -> None:
        self._check_held()
        while self._live.preparing == request.turn_id:  # it was sent before, over another stream
            await self._live.prepared.wait()
            self._check_held()
        await self._turns.accept(self._live, request)
        if self._live.outbox is None:  # the stream went away while the text was tokenised
            self._in_flight.cancel_after(self._live, self._grace_s)

    def _release(self) -> None:
        self._outbox.end()
        if self._live.outbox is self._outbox:
            self._live.outbox = None
            self._in_flight.resume_reading(self._live)

    def _check_held(self) -> None:
        if self._live.outbox is not self._outbox:
            raise AttachmentTaken(
                f"another stream has attached to {self.conversation_id}; resume it to take it back"
            )
