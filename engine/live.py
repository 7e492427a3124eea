"""A conversation in memory with everything around its tokens: messages, events, the stream attached to it,
the turn's text.

`LiveConversation` is passive: `AsyncEngine` decides what happens.  Events get their `seq` here.  Those of
the turn in flight are kept until it is committed, so that a client that comes back in the middle misses
nothing; committed turns are replayed from the token log.
"""

import asyncio
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby

from engine.conversation import Conversation, Turn
from engine.errors import Conflict
from engine.reply_text import ReplyText
from engine.text_service import Past, PastTurn
from engine.types import (
    ConversationEvent,
    ConversationRecord,
    Delta,
    Message,
    SamplingParams,
    TurnId,
)

MAX_UNREAD_TOKENS = 256
"""A turn whose reader is this far behind pauses until it has caught up."""


class Flag:
    """As asyncio.Event, in a tenth of its memory while nobody waits: every conversation has two."""

    __slots__ = ("_is_set", "_waiting")

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: asyncio.Event | None = None

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        if self._waiting is not None:
            self._waiting.set()
            self._waiting = None

    def clear(self) -> None:
        self._is_set = False

    async def wait(self) -> None:
        if not self._is_set:
            self._waiting = self._waiting or asyncio.Event()
            await self._waiting.wait()


class Outbox:
    """Events on their way to one reader.  Never blocks the writer: deltas that wait are merged into one."""

    def __init__(self, on_read: Callable[[], None]) -> None:
        self._events: deque[ConversationEvent] = deque()
        self._changed = asyncio.Event()
        self._end: Exception | None = None
        self._ended = False
        self._on_read = on_read

    def put(self, event: ConversationEvent) -> None:
        last = self._events[-1] if self._events else None
        if (
            isinstance(last, Delta)
            and isinstance(event, Delta)
            and event.offset == last.offset + len(last.token_ids)
            and event.kind is last.kind
        ):
            self._events[-1] = _joined([last, event])
        else:
            self._events.append(event)
        self._changed.set()

    def end(self, error: Exception | None = None) -> None:
        """No more events; the reader gets what is left, then `error` if there is one."""
        if not self._ended:
            self._end, self._ended = error, True
            self._changed.set()

    @property
    def num_unread_tokens(self) -> int:
        return sum(len(event.token_ids) for event in self._events if isinstance(event, Delta))

    async def events(self) -> AsyncIterator[ConversationEvent]:
        while True:
            while self._events:
                event = self._events.popleft()
                self._on_read()
                yield event
            if self._ended:
                if self._end is not None:
                    raise self._end
                return
            self._changed.clear()
            await self._changed.wait()


@dataclass(frozen=True, slots=True)
class TurnInput:
    """What a turn will append to a conversation, and where."""

    turn_id: TurnId
    digest: bytes  # of the request
    number: int  # of the turn; those from there on are replaced
    first_token: int  # position in the history
    prompt_ids: tuple[int, ...]
    messages: tuple[Message, ...]
    sampling: SamplingParams  # fully resolved
    timeout_s: float | None = None
    wants_reply: bool = True
    history_rewritten: bool = False
    rewritten_from: int | None = None  # token from which the template renders the past differently
    rewritten_to: int = 0  # so far `prompt_ids` tell the past in other words
    before: "array[int] | None" = None  # the history up to `first_token`; None: as it stands
    bad_word_ids: tuple[tuple[int, ...], ...] = ()


@dataclass(eq=False, slots=True)
class TurnInFlight:
    """A turn between its acceptance and its place in the log."""

    turn: Turn
    input: TurnInput
    reply: ReplyText
    created_at: float  # Unix seconds
    num_committed: int  # tokens that the log holds meanwhile
    deadline: asyncio.TimerHandle | None = None
    grace: asyncio.TimerHandle | None = None  # runs while nobody is attached

    @property
    def turn_id(self) -> TurnId:
        return self.input.turn_id

    def stop_timers(self) -> None:
        for timer in (self.deadline, self.grace):
            if timer is not None:
                timer.cancel()


@dataclass(eq=False, slots=True)
class LiveConversation:
    record: ConversationRecord  # `num_turns`, `num_tokens` and `updated_at` are those of the load, not of now
    core: Conversation
    turns: dict[TurnId, bytes]  # digest of each committed turn's request
    seq: int  # of the last event
    past: Past = field(default_factory=Past)  # what the next prompt follows
    not_in_past: list[PastTurn] = field(default_factory=list)  # joins it when a template is next rendered
    knows_past: bool = True  # False: the turns of the log are not in either
    is_logged: bool = True
    preparing: TurnId | None = None  # accepted by nobody yet: its text is being tokenised
    is_rewinding: bool = False
    flight: TurnInFlight | None = None
    journal: list[ConversationEvent] = field(default_factory=list)  # of the turn in flight
    outbox: Outbox | None = None  # of the attached stream
    history_rewritten: bool = False  # the template would by now render the past differently
    retries: bool = False  # an earlier attempt at the next turn may have been shown
    is_deleted: bool = False
    idle: Flag = field(default_factory=Flag)  # nothing is being prepared, computed, committed or rewound
    prepared: Flag = field(default_factory=Flag)

    @property
    def committed_tokens(self) -> int:
        """The length of the history in the log."""
        return self.core.num_committed if self.flight is None else self.flight.num_committed

    @property
    def conflict(self) -> Conflict | None:
        """What to answer to whoever wants to change the history now."""
        if self.is_rewinding:
            return Conflict(f"{self.record.id} is being rewound; try again when that is answered")
        busy = self.preparing or (self.flight and self.flight.turn_id)
        if busy is not None:
            return Conflict(
                f"turn {busy} is in flight in {self.record.id}; wait for its turn_done or cancel it"
            )
        return None

    async def rewound(self) -> None:
        """Returns once no rewind is on its way to the log."""
        while self.is_rewinding:
            await self.idle.wait()

    @property
    def journal_start(self) -> int:
        """The last seq before the turn in flight."""
        return self.journal[0].seq - 1 if self.journal else self.seq

    def keep_turns(self, num_turns: int) -> None:
        """Turns from number `num_turns` on are not in the history any more."""
        for turn_id in list(self.turns)[num_turns:]:
            del self.turns[turn_id]
        self.forget_past()

    def forget_past(self) -> None:
        """Until a template is next rendered, it is in the log alone."""
        self.past, self.knows_past = Past(), not self.is_logged
        self.not_in_past.clear()

    def next_seq(self) -> int:
        self.seq += 1
        return self.seq

    def emit(self, event: ConversationEvent) -> None:
        """`event.seq` must come from `next_seq`."""
        self.journal.append(event)
        if self.outbox is not None:
            self.outbox.put(event)

    def attach(self, outbox: Outbox, missed: Iterable[ConversationEvent], after_seq: int) -> None:
        self.outbox = outbox
        for event in (*missed, *_merged(self.journal, after_seq)):
            if event.seq > after_seq:
                outbox.put(event)

    def check_pace(self) -> bool:
        """Pause the turn if its reader is far behind; returns True if it may go on again."""
        if self.flight is None:
            return False
        turn, was_paused = self.flight.turn, self.flight.turn.paused
        turn.paused = self.outbox is not None and self.outbox.num_unread_tokens > MAX_UNREAD_TOKENS
        return was_paused and not turn.paused


def _merged(journal: Sequence[ConversationEvent], after_seq: int) -> list[ConversationEvent]:
    """Events of one turn after `after_seq`, consecutive deltas of one kind as one: a long reply has
    thousands.
    """
    merged: list[ConversationEvent] = []
    later = (event for event in journal if event.seq > after_seq)
    for kind, events in groupby(later, lambda event: event.kind if isinstance(event, Delta) else None):
        if kind is None:
            merged += events
        else:
            merged.append(_joined([event for event in events if isinstance(event, Delta)]))
    return merged


def _joined(deltas: Sequence[Delta]) -> Delta:
    """Consecutive deltas of one kind as one."""
    return replace(
        deltas[-1],
        offset=deltas[0].offset,
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
    )
