"""How a turn begins: accepted, or refused, or found to be known.  What a request appends, and where, is
`turn_input`'s business; how a turn goes on is `in_flight`'s.
"""

import asyncio
import secrets

from engine.conversation import Turn, common_length
from engine.core import EngineCore
from engine.errors import AlreadyExists, DataDirError, EngineError, NotFound, QueueFull
from engine.in_flight import TurnsInFlight
from engine.live import LiveConversation, TurnInFlight, TurnInput
from engine.replay import replayed, stretches
from engine.reply_text import ReplyText
from engine.statistics import Statistics
from engine.text_service import TextService
from engine.token_log import TokenLog
from engine.turn_input import TurnInputs, digest_of
from engine.types import (
    Clock,
    ConversationEvent,
    FinishReason,
    RegenerateRequest,
    TurnId,
    TurnRecord,
    TurnRequest,
)


class Turns:
    """Used on the event loop only."""

    def __init__(
        self,
        core: EngineCore,
        log: TokenLog,
        text: TextService,
        clock: Clock,
        inputs: TurnInputs,
        in_flight: TurnsInFlight,
        statistics: Statistics,
        *,
        max_queue: int,
    ) -> None:
        self.stopped: EngineError | None = None  # why no turn is accepted any more
        self._core, self._log, self._text, self._clock = core, log, text, clock
        self._inputs, self._in_flight, self._statistics = inputs, in_flight, statistics
        self._max_queue = max_queue

    async def accept(self, live: LiveConversation, request: TurnRequest | RegenerateRequest) -> None:
        """Queue the turn, or replay it if it was committed before.  Raises EngineError if it is refused."""
        with self._statistics.refusals():
            await self._accept(live, request)

    async def _accept(self, live: LiveConversation, request: TurnRequest | RegenerateRequest) -> None:
        if isinstance(request, TurnRequest):
            self._inputs.check(request)
        digest = digest_of(request)
        known = live.turns.get(request.turn_id)
        if live.flight is not None and live.flight.turn_id == request.turn_id:
            known = live.flight.input.digest
        if known is not None:
            if known != digest:
                raise AlreadyExists(
                    f"turn id {request.turn_id} was used in {live.record.id} with other content; "
                    "choose a new id"
                )
            if request.turn_id in live.turns:
                await self._replay(live, request.turn_id)
            return
        if (conflict := live.conflict) is not None:
            raise conflict
        self._check_room(request)
        live.preparing = request.turn_id
        live.idle.clear()
        live.prepared.clear()
        try:
            await self._begin(live, request)
        finally:
            live.preparing = None
            if live.flight is None:
                live.idle.set()
            live.prepared.set()

    def _check_room(self, request: TurnRequest | RegenerateRequest) -> None:
        if self.stopped is not None:
            raise self.stopped
        waiting = self._core.scheduler.num_waiting
        wants_reply = isinstance(request, RegenerateRequest) or request.wants_reply
        if wants_reply and waiting >= self._max_queue:
            raise QueueFull(
                f"{waiting} turns are waiting already, of at most {self._max_queue}; try again in a second"
            )

    async def _begin(self, live: LiveConversation, request: TurnRequest | RegenerateRequest) -> None:
        created_at = self._clock.wall()
        input = await self._inputs.of(live, request)
        if live.is_deleted:
            raise NotFound(f"conversation {live.record.id} was deleted")
        self._check_room(request)
        position = self._core.scheduler.num_waiting if input.wants_reply else 0
        num_committed = len(live.core.tokens)
        turn = self._enter(live, input)
        detokenizer = self._text.detokenizer(input.sampling, input.prompt_ids[-1])
        reply = ReplyText(detokenizer, self._text.kinds(input.prompt_ids))
        flight = TurnInFlight(turn, input, reply, created_at, num_committed)
        self._in_flight.begin(live, flight, position)

    def _enter(self, live: LiveConversation, input: TurnInput) -> Turn:
        """The turn in the core.  It begins where its history departs from the one that stands."""
        first, ids, rewritten_to = input.first_token, input.prompt_ids, input.rewritten_to
        if input.before is not None:
            first = common_length(input.before, live.core.tokens)
            ids = (*input.before[first:], *ids)
            rewritten_to = input.first_token if first < input.first_token else 0
        if not input.wants_reply:
            return self._core.append(
                live.core, input.turn_id, ids, first_token=first, rewritten_to=rewritten_to
            )
        given = input.sampling.seed
        return self._core.begin(
            live.core,
            input.turn_id,
            ids,
            input.sampling,
            secrets.randbits(63) if given is None else given,
            first_token=first,
            rewritten_to=rewritten_to,
            bad_word_ids=input.bad_word_ids,
        )

    async def _replay(self, live: LiveConversation, turn_id: TurnId) -> None:
        outbox = live.outbox
        for record in await self._inputs.committed_turns(live):
            if record.turn_id == turn_id and outbox is not None:
                for event in self.replay(record):
                    outbox.put(event)

    def replay(self, record: TurnRecord) -> list[ConversationEvent]:
        return replayed(record, stretches(record, self._text), self._core.context_tokens)

    async def cancel(self, live: LiveConversation, turn_id: TurnId, keep: bool) -> None:
        if live.preparing == turn_id:
            await live.prepared.wait()
        if turn_id in live.turns:
            return  # it was over before the cancel came: its outcome is on the way
        if live.flight is None or live.flight.turn_id != turn_id:
            raise NotFound(f"turn {turn_id} is not in flight in {live.record.id}; nothing was cancelled")
        self._in_flight.end(live, FinishReason.CANCELLED, keep)

    async def erase(self, live: LiveConversation) -> None:
        """Delete the conversation: its turn, its KV, its place in the log.  Readers hear NotFound.  If the
        log cannot delete it (DataDirError), it stands without that turn.
        """
        live.is_deleted = True
        self._in_flight.end(live, FinishReason.CANCELLED, keep=False)
        if live.outbox is not None:
            live.outbox.end(NotFound(f"conversation {live.record.id} was deleted"))
        await live.idle.wait()
        if live.is_logged:
            try:
                await asyncio.wrap_future(self._log.delete(live.record.id))
            except DataDirError:
                live.is_deleted = await asyncio.wrap_future(self._log.load(live.record.id)) is None
                raise
