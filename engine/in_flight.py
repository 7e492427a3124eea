"""Turns between their acceptance and their place in the log: delivered token by token, ended, committed,
reported done.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future as ThreadFuture
from dataclasses import replace

from engine.conversation import Turn
from engine.core import EngineCore, TokenEvent
from engine.errors import DeadlineExceeded, EngineError, EngineStopped, TurnCancelled
from engine.live import LiveConversation, TurnInFlight
from engine.replay import done_event
from engine.reply_text import Piece
from engine.statistics import Statistics
from engine.text_service import PastTurn
from engine.token_log import TokenLog
from engine.types import (
    Clock,
    Delta,
    FinishReason,
    HistoryRewritten,
    RunState,
    StateChanged,
    Timing,
    TokenLogprobs,
    TurnAccepted,
    TurnFailed,
    TurnRecord,
    Usage,
)

logger = logging.getLogger(__name__)


class TurnsInFlight:
    """Used on the event loop only.  `wake` tells the step loop that there may be something to compute."""

    def __init__(
        self, core: EngineCore, log: TokenLog, clock: Clock, statistics: Statistics, *, stateless: bool
    ) -> None:
        self._core, self._log, self._clock, self._statistics = core, log, clock, statistics
        self._stateless = stateless
        self._of_row: dict[int, LiveConversation] = {}  # by Turn.row
        self.wake: Callable[[], None] = lambda: None
        core.scheduler.on_state = self._state_changed

    def __iter__(self) -> Iterator[LiveConversation]:
        """The conversations that have one; they may lose it meanwhile."""
        return iter(list(self._of_row.values()))

    # -- begin

    def begin(self, live: LiveConversation, flight: TurnInFlight, queue_position: int) -> None:
        """The turn is accepted.  One that wants no reply is complete already."""
        turn, input = flight.turn, flight.input
        live.flight = flight
        self._of_row[turn.row] = live
        live.journal.clear()
        live.emit(TurnAccepted(live.next_seq(), input.turn_id, queue_position, live.retries))
        if (first := input.rewritten_from) is not None:
            policy, seq, num_behind = live.record.on_rewrite, live.next_seq(), flight.num_committed - first
            live.emit(HistoryRewritten(seq, input.turn_id, first, num_behind, policy))
        self._statistics.turn_accepted()
        if not input.wants_reply:
            self.compute_when_idle(live)
            self._conclude(live, FinishReason.APPENDED)
        elif input.timeout_s is not None:
            flight.deadline = asyncio.get_running_loop().call_later(
                input.timeout_s, self.end, live, FinishReason.DEADLINE, True
            )
        self.wake()

    def compute_when_idle(self, live: LiveConversation) -> None:
        """Compute what was appended before a turn asks for it."""
        if not self._stateless:
            self._core.compute_when_idle(live.core)
            self.wake()

    # -- what becomes of it

    def _state_changed(self, turn: Turn, state: RunState, found: Usage | None) -> None:
        """Called while a step is planned."""
        if state is RunState.SUSPENDED:
            self._statistics.turn_suspended()
        live = self._of_row[turn.row]
        if live.is_logged:  # else it has no history to be found, and nothing to go on with
            live.emit(StateChanged(live.next_seq(), turn.id, state, found))

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """What a step produced: text to the readers, ends to the log."""
        for event in events:
            live = self._of_row[event.turn.row]
            flight = live.flight
            assert flight is not None
            *earlier, piece = flight.reply.push(event.token_id)
            logprobs = () if event.logprobs is None else (event.logprobs,)
            offset = event.turn.num_generated - 1
            self._emit(live, flight, offset, earlier)
            self._emit(live, flight, offset, [piece], (event.token_id,), logprobs)
            if flight.reply.matched_stop is not None:
                if event.finish_reason is None:
                    self._core.finish(event.turn, FinishReason.STOP_STRING, event.turn.num_generated)
                self._conclude(live, FinishReason.STOP_STRING)
            elif event.finish_reason is not None:
                self._conclude(live, event.finish_reason)
            else:
                live.check_pace()

    def resume_reading(self, live: LiveConversation) -> None:
        """A reader took something, or went away: its turn may go on."""
        if live.check_pace():
            self.wake()

    def _emit(
        self,
        live: LiveConversation,
        flight: TurnInFlight,
        offset: int,
        pieces: Sequence[Piece],
        ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        for piece in pieces:
            seq = live.next_seq()
            live.emit(Delta(seq, flight.turn_id, offset, ids, piece.text, piece.kind, logprobs))

    # -- end

    def end(self, live: LiveConversation, reason: FinishReason, keep: bool) -> None:
        """Stop the turn in flight now.  Does nothing if it is over and only its commit is under way.

        Of a turn that would replace others and has said nothing there is nothing to keep: the others stay.
        """
        flight = live.flight
        if flight is None or flight.turn.finish_reason is not None:
            return
        num_said, id = flight.turn.num_generated, flight.turn_id
        is_empty = flight.input.number < len(live.turns) and not num_said
        keep = keep and not is_empty
        self._core.finish(flight.turn, reason, num_said if keep else None)
        if keep:
            self._conclude(live, reason)
        elif reason is FinishReason.DEADLINE:
            self._fail(live, DeadlineExceeded(f"turn {id} had no time to say anything; the old reply stays"))
        else:
            self._fail(live, TurnCancelled(f"turn {id} was cancelled and discarded"))

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
        self._emit(live, flight, flight.turn.num_generated, flight.reply.finish())
        record = self._record(live, flight, reason)
        self._give_up_kv(live)
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
            reply_text=flight.reply.settled,
            finish_reason=reason,
            matched_stop=flight.reply.matched_stop,
            usage=replace(turn.usage or Usage(), completion_tokens=turn.num_generated),
            timing=Timing(
                queue_s=(turn.started_s if turn.started_s is not None else now) - turn.arrived_s,
                ttft_s=(turn.first_token_s if turn.first_token_s is not None else now) - turn.arrived_s,
                total_s=now - turn.arrived_s,
                reload_s=turn.reload_s,
                recompute_s=turn.recompute_s,
                prefill_s=turn.prefill_s,
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
        self._core.take_back(flight.turn)
        self._fail(live, error if isinstance(error, Exception) else EngineStopped(str(error)))

    def _done(self, live: LiveConversation, flight: TurnInFlight, record: TurnRecord) -> None:
        self._core.confirm(flight.turn)
        if record.number < len(live.turns):
            live.keep_turns(record.number)
        if not record.messages:
            live.forget_past()  # whoever sends ids may never need a template
        elif live.knows_past:
            live.not_in_past.append(PastTurn.of(record))
        live.turns[record.turn_id] = record.digest
        live.history_rewritten = record.history_rewritten
        live.retries = False
        live.emit(done_event(record, self._core.context_tokens))
        self._statistics.turn_done(flight.turn, record)
        self._close_flight(live)

    def _fail(self, live: LiveConversation, error: Exception) -> None:
        assert live.flight is not None
        self._give_up_kv(live)
        live.retries = True
        live.emit(TurnFailed(live.next_seq(), live.flight.turn_id, error))
        self._statistics.turn_failed(live.flight.turn, error)
        self._close_flight(live)

    def _give_up_kv(self, live: LiveConversation) -> None:
        """Stateless: the next turn finds none.  What a launched step still writes goes to blocks that no
        history names any more.
        """
        if self._stateless:
            manager, conversation = self._core.manager, live.core
            manager.drop(conversation.table)
            manager.truncate(conversation.table, 0)
            manager.extend(conversation.table, conversation.tokens)

    def _close_flight(self, live: LiveConversation) -> None:
        flight = live.flight
        assert flight is not None
        flight.stop_timers()
        del self._of_row[flight.turn.row]
        live.flight = None
        live.journal.clear()
        live.idle.set()
        self.wake()

    # -- all of them

    def stop_all(self, error: EngineError) -> None:
        """The engine is over: everybody who waits is told."""
        for live in self:
            assert live.flight is not None
            live.flight.stop_timers()
            if live.outbox is not None:
                live.outbox.end(error)
            live.idle.set()
