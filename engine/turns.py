"""The life of a turn around the core: accepted, delivered token by token, committed to the log, reported
done.  What a request appends, and where, is `turn_input`'s business.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future as ThreadFuture
from dataclasses import replace

from engine.conversation import Turn, common_length
from engine.core import EngineCore, TokenEvent
from engine.errors import AlreadyExists, EngineError, EngineStopped, NotFound, QueueFull, TurnCancelled
from engine.live import LiveConversation, TurnInFlight, TurnInput
from engine.replay import replayed, stretches
from engine.sampler import Sampler
from engine.statistics import Statistics
from engine.text_service import PastTurn, TextService
from engine.token_log import TokenLog
from engine.turn_input import TurnInputs, digest_of
from engine.types import (
    Clock,
    ConversationEvent,
    Delta,
    FinishReason,
    HistoryRewritten,
    RegenerateRequest,
    ReplyKind,
    SamplingParams,
    Timing,
    TokenLogprobs,
    TurnAccepted,
    TurnFailed,
    TurnId,
    TurnRecord,
    TurnRequest,
    Usage,
)

logger = logging.getLogger(__name__)


class Turns:
    """Called on the event loop only.  `wake` tells the step loop that there may be something to compute."""

    def __init__(
        self,
        core: EngineCore,
        log: TokenLog,
        text: TextService,
        sampler: Sampler,
        clock: Clock,
        statistics: Statistics,
        defaults: SamplingParams,
        *,
        vocab_size: int,
        max_queue: int,
        stateless: bool,
    ) -> None:
        self.core = core
        self.inputs = TurnInputs(
            log, text, sampler, defaults, vocab_size=vocab_size, context_tokens=core.context_tokens
        )
        self.stopped: EngineError | None = None  # why no turn is accepted any more
        self.statistics = statistics
        self._log, self._text, self._clock = log, text, clock
        self._max_queue = max_queue
        self._stateless = stateless
        self._in_flight: dict[int, LiveConversation] = {}  # by Turn.row
        self.wake: Callable[[], None] = lambda: None

    # -- begin

    async def accept(self, live: LiveConversation, request: TurnRequest | RegenerateRequest) -> None:
        """Queue the turn, or replay it if it was committed before.  Raises EngineError if it is refused."""
        if isinstance(request, TurnRequest):
            self.inputs.check(request)
        digest = digest_of(request)
        while live.preparing == request.turn_id:  # it is sent again, over another stream
            await live.prepared.wait()
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
        waiting = self.core.scheduler.num_waiting
        wants_reply = isinstance(request, RegenerateRequest) or request.wants_reply
        if wants_reply and waiting >= self._max_queue:
            raise QueueFull(
                f"{waiting} turns are waiting already, of at most {self._max_queue}; try again in a second"
            )

    async def _begin(self, live: LiveConversation, request: TurnRequest | RegenerateRequest) -> None:
        created_at = self._clock.wall()
        input = await self.inputs.of(live, request)
        words = input.sampling.bad_words
        bad_word_ids = await self._text.bad_word_ids(words) if words else ()
        if live.is_deleted:
            raise NotFound(f"conversation {live.record.id} was deleted")
        self._check_room(request)
        position = self.core.scheduler.num_waiting if input.wants_reply else 0
        num_committed = len(live.core.tokens)
        turn = self._enter(live, input, bad_word_ids)
        detokenizer = self._text.detokenizer(input.sampling, input.prompt_ids[-1])
        kinds = self._text.kinds(input.prompt_ids)
        live.flight = TurnInFlight(turn, input, detokenizer, kinds, created_at, num_committed)
        self._in_flight[turn.row] = live
        live.journal.clear()
        live.emit(TurnAccepted(live.next_seq(), input.turn_id, position, live.retries))
        if (first := input.rewritten_from) is not None:
            policy, seq = live.record.on_rewrite, live.next_seq()
            live.emit(HistoryRewritten(seq, input.turn_id, first, num_committed - first, policy))
        if not input.wants_reply:
            self.compute_when_idle(live)
            self._conclude(live, FinishReason.APPENDED)
        elif input.timeout_s is not None:
            live.flight.deadline = asyncio.get_running_loop().call_later(
                input.timeout_s, self.end, live, FinishReason.DEADLINE, True
            )
        self.statistics.turn_accepted()
        self.wake()

    def compute_when_idle(self, live: LiveConversation) -> None:
        """Compute what was appended before a turn asks for it."""
        if not self._stateless:
            self.core.compute_when_idle(live.core)
            self.wake()

    def _enter(
        self, live: LiveConversation, input: TurnInput, bad_word_ids: tuple[tuple[int, ...], ...]
    ) -> Turn:
        """The turn in the core.  It begins where its history departs from the one that stands."""
        first, ids = input.first_token, input.prompt_ids
        if input.before is not None:
            first = common_length(input.before, live.core.tokens)
            ids = (*input.before[first:], *ids)
        if not input.wants_reply:
            return self.core.append(live.core, input.turn_id, ids, first_token=first)
        given = input.sampling.seed
        return self.core.begin(
            live.core,
            input.turn_id,
            ids,
            input.sampling,
            secrets.randbits(63) if given is None else given,
            first_token=first,
            bad_word_ids=bad_word_ids,
        )

    async def _replay(self, live: LiveConversation, turn_id: TurnId) -> None:
        outbox = live.outbox
        for record in await self.inputs.committed_turns(live):
            if record.turn_id == turn_id and outbox is not None:
                for event in self.replay(record):
                    outbox.put(event)

    def replay(self, record: TurnRecord) -> list[ConversationEvent]:
        return replayed(record, stretches(record, self._text), self.core.context_tokens)

    # -- tokens

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """What a step produced: text to the readers, ends to the log."""
        for event in events:
            live = self._in_flight[event.turn.row]
            flight = live.flight
            assert flight is not None
            text = flight.detokenizer.push((event.token_id,))
            kind = flight.kinds.push(event.token_id)
            logprobs = () if event.logprobs is None else (event.logprobs,)
            self._emit_text(live, flight, (event.token_id,), text, kind, logprobs)
            if flight.detokenizer.matched_stop is not None:
                if event.finish_reason is None:
                    self.core.finish(event.turn, FinishReason.STOP_STRING, event.turn.num_generated)
                self._conclude(live, FinishReason.STOP_STRING)
            elif event.finish_reason is not None:
                self._conclude(live, event.finish_reason)
            else:
                live.check_pace()

    def resume_reading(self, live: LiveConversation) -> None:
        """A reader took something, or went away: its turn may go on."""
        if live.check_pace():
            self.wake()

    def _emit_text(
        self,
        live: LiveConversation,
        flight: TurnInFlight,
        ids: tuple[int, ...],
        text: str,
        kind: ReplyKind,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        flight.text.append(text)
        flight.last_kind = kind
        offset = flight.turn.num_generated - len(ids)
        live.emit(Delta(live.next_seq(), flight.turn_id, offset, ids, text, kind, logprobs))

    # -- end

    async def cancel(self, live: LiveConversation, turn_id: TurnId, keep: bool) -> None:
        if live.preparing == turn_id:
            await live.prepared.wait()
        if turn_id in live.turns:
            return  # it was over before the cancel came: its outcome is on the way
        if live.flight is None or live.flight.turn_id != turn_id:
            raise NotFound(f"turn {turn_id} is not in flight in {live.record.id}; nothing was cancelled")
        self.end(live, FinishReason.CANCELLED, keep)

    def end(self, live: LiveConversation, reason: FinishReason, keep: bool) -> None:
        """Stop the turn in flight now.  Does nothing if it is over and only its commit is under way."""
        flight = live.flight
        if flight is None or flight.turn.finish_reason is not None:
            return
        self.core.finish(flight.turn, reason, flight.turn.num_generated if keep else None)
        if keep:
            self._conclude(live, reason)
        else:
            self._fail(live, TurnCancelled(f"turn {flight.turn_id} was cancelled and discarded"))

    def cancel_after(self, live: LiveConversation, grace_s: float) -> None:
        """End the turn in flight in `grace_s` seconds if nobody has attached by then."""

        def if_still_alone() -> None:
            if live.outbox is None:
                self.end(live, FinishReason.CANCELLED, keep=True)

        if live.flight is not None:
            if live.flight.grace is not None:
                live.flight.grace.cancel()
            live.flight.grace = asyncio.get_running_loop().call_later(grace_s, if_still_alone)

    def _conclude(self, live: LiveConversation, reason: FinishReason) -> None:
        """The reply is complete: commit it."""
        flight = live.flight
        assert flight is not None
        if rest := flight.detokenizer.finish():
            self._emit_text(live, flight, (), rest, flight.last_kind)
        record = self._record(live, flight, reason)
        if self._stateless:
            self.core.manager.drop(live.core.table)
        if not live.is_logged:
            self._done(live, flight, record)
            return
        committing = self._log.commit_turn(live.record.id, record, record.done_seq)
        loop = asyncio.get_running_loop()
        committing.add_done_callback(
            lambda done: loop.call_soon_threadsafe(self._committed, live, flight, record, done)
        )

    def _record(self, live: LiveConversation, flight: TurnInFlight, reason: FinishReason) -> TurnRecord:
        turn, input = flight.turn, flight.input
        now = self._clock.monotonic()
        num_before_done = 1 if reason is FinishReason.APPENDED else 2  # a replay is accepted, a delta, done
        live.seq = max(live.seq, live.journal[0].seq + num_before_done - 1)
        return TurnRecord(
            turn_id=input.turn_id,
            number=input.number,
            first_token=input.first_token,
            prompt_ids=input.prompt_ids,
            reply_ids=tuple(turn.reply_ids),
            messages=input.messages,
            reply_text="".join(flight.text),
            finish_reason=reason,
            matched_stop=flight.detokenizer.matched_stop,
            usage=replace(turn.usage or Usage(), completion_tokens=turn.num_generated),
            timing=Timing(
                queue_s=(turn.started_s if turn.started_s is not None else now) - turn.arrived_s,
                ttft_s=(turn.first_token_s if turn.first_token_s is not None else now) - turn.arrived_s,
                total_s=now - turn.arrived_s,
            ),
            created_at=flight.created_at,
            done_seq=live.next_seq(),
            digest=input.digest,
            history_rewritten=input.history_rewritten,
        )

    def _committed(
        self, live: LiveConversation, flight: TurnInFlight, record: TurnRecord, done: "ThreadFuture[None]"
    ) -> None:
        error = done.exception()
        if error is None:
            self._done(live, flight, record)
            return
        if not live.is_deleted:
            logger.error("turn %s of %s was not committed: %s", record.turn_id, live.record.id, error)
        self.core.take_back(flight.turn)
        self._fail(live, error if isinstance(error, Exception) else EngineStopped(str(error)))

    def _done(self, live: LiveConversation, flight: TurnInFlight, record: TurnRecord) -> None:
        self.core.confirm(flight.turn)
        if record.number < len(live.turns):
            live.keep_turns(record.number)
        if live.knows_past:
            live.not_in_past.append(PastTurn.of(record))
        live.turns[record.turn_id] = record.digest
        live.history_rewritten = record.history_rewritten
        live.retries = False
        live.emit(self.replay(record)[-1])
        self.statistics.turn_done(flight.turn, record)
        self._close_flight(live)

    def _fail(self, live: LiveConversation, error: Exception) -> None:
        assert live.flight is not None
        live.retries = True
        live.emit(TurnFailed(live.next_seq(), live.flight.turn_id, error))
        self.statistics.turn_failed(live.flight.turn, error)
        self._close_flight(live)

    def _close_flight(self, live: LiveConversation) -> None:
        flight = live.flight
        assert flight is not None
        flight.stop_timers()
        del self._in_flight[flight.turn.row]
        live.flight = None
        live.journal.clear()
        live.idle.set()
        self.wake()

    # -- all of them

    @property
    def in_flight(self) -> list[LiveConversation]:
        return list(self._in_flight.values())

    def stop_all(self, error: EngineError) -> None:
        """The engine is over: everybody who waits is told."""
        self.stopped = error
        for live in self.in_flight:
            assert live.flight is not None
            live.flight.stop_timers()
            if live.outbox is not None:
                live.outbox.end(error)
            live.idle.set()

    async def erase(self, live: LiveConversation) -> None:
        """Delete the conversation: its turn, its KV, its place in the log.  Readers hear NotFound."""
        live.is_deleted = True
        self.end(live, FinishReason.CANCELLED, keep=False)
        if live.outbox is not None:
            live.outbox.end(NotFound(f"conversation {live.record.id} was deleted"))
        await live.idle.wait()
        if live.is_logged:
            await asyncio.wrap_future(self._log.delete(live.record.id))
