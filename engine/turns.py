"""The life of a turn around the core: accepted, delivered token by token, committed to the log, reported
done.
"""

import asyncio
import logging
import secrets
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future as ThreadFuture
from dataclasses import replace
from hashlib import blake2b

from engine.core import EngineCore, TokenEvent
from engine.errors import (
    AlreadyExists,
    Conflict,
    EngineError,
    EngineStopped,
    InvalidRequest,
    NotFound,
    QueueFull,
    TurnCancelled,
)
from engine.live import LiveConversation, TurnInFlight, replayed
from engine.sampler import Sampler
from engine.text_service import PastTurn, TextService
from engine.token_log import TokenLog
from engine.types import (
    Clock,
    ConversationEvent,
    Delta,
    FinishReason,
    SamplingParams,
    Timing,
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
        defaults: SamplingParams,
        *,
        vocab_size: int,
        max_queue: int,
        stateless: bool,
    ) -> None:
        self.core = core
        self.stopped: EngineError | None = None  # why no turn is accepted any more
        self._log, self._text, self._sampler, self._clock = log, text, sampler, clock
        self._defaults = defaults
        self._vocab_size = vocab_size
        self._max_queue = max_queue
        self._stateless = stateless
        self._in_flight: dict[int, LiveConversation] = {}  # by Turn.row
        self.wake: Callable[[], None] = lambda: None

    # -- begin

    async def accept(self, live: LiveConversation, request: TurnRequest) -> None:
        """Queue the turn, or replay it if it was committed before.  Raises EngineError if it is refused."""
        self._check(request)
        digest = _digest(request)
        while live.preparing == request.turn_id:  # it is sent again, over another stream
            await live.prepared.wait()
        known = live.turns.get(request.turn_id)
        if live.flight is not None and live.flight.request.turn_id == request.turn_id:
            known = live.flight.digest
        if known is not None:
            if known != digest:
                raise AlreadyExists(
                    f"turn id {request.turn_id} was used in {live.record.id} with other content; "
                    "choose a new id"
                )
            if request.turn_id in live.turns:
                await self._replay(live, request.turn_id)
            return
        if live.preparing is not None or not live.idle.is_set():
            busy = live.preparing or (live.flight and live.flight.request.turn_id)
            raise Conflict(
                f"turn {busy} is in flight in {live.record.id}; wait for its turn_done or cancel it"
            )
        self._check_room()
        live.preparing = request.turn_id
        live.idle.clear()
        live.prepared.clear()
        try:
            await self._begin(live, request, digest)
        finally:
            live.preparing = None
            if live.flight is None:
                live.idle.set()
            live.prepared.set()

    def _check_room(self) -> None:
        if self.stopped is not None:
            raise self.stopped
        waiting = self.core.scheduler.num_waiting
        if waiting >= self._max_queue:
            raise QueueFull(
                f"{waiting} turns are waiting already, of at most {self._max_queue}; try again in a second"
            )

    def _check(self, request: TurnRequest) -> None:
        if bool(request.messages) == bool(request.token_ids):
            what = "both messages and token ids" if request.messages else "neither text nor token ids"
            raise InvalidRequest(f"turn {request.turn_id} has {what}; send one of them")
        for token_id in (min(request.token_ids, default=0), max(request.token_ids, default=0)):
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(f"token id {token_id} is outside the vocabulary of {self._vocab_size}")

    async def _begin(self, live: LiveConversation, request: TurnRequest, digest: bytes) -> None:
        accepted_at = self._clock.wall()
        sampling = request.sampling.over(live.record.sampling).over(self._defaults)
        self._sampler.check(sampling)
        ids, rewritten = await self._prompt_ids(live, request)
        if live.is_deleted:
            raise NotFound(f"conversation {live.record.id} was deleted")
        self._check_room()
        position, first_token = self.core.scheduler.num_waiting, len(live.core.tokens)
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        turn = self.core.begin(live.core, request.turn_id, ids, sampling, seed)
        detokenizer = self._text.detokenizer(sampling.stop or (), ids[-1], sampling.min_tokens or 0)
        live.flight = TurnInFlight(turn, request, digest, detokenizer, rewritten, accepted_at, first_token)
        self._in_flight[turn.row] = live
        live.journal.clear()
        live.emit(TurnAccepted(live.next_seq(), request.turn_id, position, live.retries))
        if request.timeout_s is not None:
            live.flight.deadline = asyncio.get_running_loop().call_later(
                request.timeout_s, self.end, live, FinishReason.DEADLINE, True
            )
        self.wake()

    async def _prompt_ids(self, live: LiveConversation, request: TurnRequest) -> tuple[Sequence[int], bool]:
        if request.token_ids:
            return request.token_ids, live.history_rewritten
        system = live.record.system
        if live.not_in_past:
            live.past += await self._text.past(system, tuple(live.not_in_past), live.core.tokens[:])
            live.not_in_past.clear()
        last_id = live.core.tokens[-1] if live.core.tokens else None
        new = self._text.sent_messages(None if live.turns else system, request.messages, ())
        prompt = await self._text.prompt(live.past, last_id, new, live.record.created_at)
        if not prompt.ids:
            raise InvalidRequest(f"turn {request.turn_id} adds no token to the conversation; send some text")
        return prompt.ids, live.history_rewritten or not prompt.matches_full_render

    async def _replay(self, live: LiveConversation, turn_id: TurnId) -> None:
        outbox = live.outbox
        for record in await self.committed_turns(live):
            if record.turn_id == turn_id and outbox is not None:
                for event in self.replay(record):
                    outbox.put(event)

    async def committed_turns(self, live: LiveConversation) -> list[TurnRecord]:
        loaded = await asyncio.wrap_future(self._log.load(live.record.id))
        return loaded[1] if loaded is not None else []

    def replay(self, record: TurnRecord) -> list[ConversationEvent]:
        committed = record.first_token + len(record.prompt_ids) + len(record.reply_ids)
        return replayed(record, committed, self.core.context_tokens - committed)

    # -- tokens

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """What a step produced: text to the readers, ends to the log."""
        for event in events:
            live = self._in_flight[event.turn.row]
            flight = live.flight
            assert flight is not None
            text = flight.detokenizer.push((event.token_id,))
            self._emit_text(live, flight, (event.token_id,), text)
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
        self, live: LiveConversation, flight: TurnInFlight, ids: tuple[int, ...], text: str
    ) -> None:
        flight.text.append(text)
        offset = flight.turn.num_generated - len(ids)
        live.emit(Delta(live.next_seq(), flight.request.turn_id, offset, ids, text))

    # -- end

    async def cancel(self, live: LiveConversation, turn_id: TurnId, keep: bool) -> None:
        if live.preparing == turn_id:
            await live.prepared.wait()
        if turn_id in live.turns:
            return  # it was over before the cancel came: its outcome is on the way
        if live.flight is None or live.flight.request.turn_id != turn_id:
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
            self._fail(live, TurnCancelled(f"turn {flight.request.turn_id} was cancelled and discarded"))

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
            self._emit_text(live, flight, (), rest)
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
        turn = flight.turn
        now = self._clock.monotonic()
        live.seq = max(
            live.seq, live.journal[0].seq + 1
        )  # a replay needs three numbers: accepted, delta, done
        return TurnRecord(
            turn_id=flight.request.turn_id,
            number=len(live.turns),
            first_token=flight.first_token,
            prompt_ids=turn.prompt_ids,
            reply_ids=tuple(turn.reply_ids),
            messages=flight.request.messages,
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
            digest=flight.digest,
            history_rewritten=flight.history_rewritten,
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
        live.not_in_past.append(PastTurn.of(record))
        live.turns[record.turn_id] = record.digest
        live.history_rewritten = record.history_rewritten
        live.retries = False
        live.emit(self.replay(record)[-1])
        self._close_flight(live)

    def _fail(self, live: LiveConversation, error: Exception) -> None:
        assert live.flight is not None
        live.retries = True
        live.emit(TurnFailed(live.next_seq(), live.flight.request.turn_id, error))
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


def _digest(request: TurnRequest) -> bytes:
    """Of the content of a turn, by which a repeated turn id is recognised."""
    digest = blake2b(repr((request.messages, request.sampling)).encode(), digest_size=16)
    digest.update(array("q", request.token_ids))  # anything a client may send; not checked yet
    return digest.digest()
