"""What a reply is made of: deltas while it comes, and the turn at its end."""

from dataclasses import dataclass, replace
from enum import Enum

from rpc._generated import continuo_pb2 as pb
from rpc.failure import Internal


class FinishReason(Enum):
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CONTEXT_FULL = "context_full"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    APPENDED = "appended"  # nothing was to be generated
    UNKNOWN = "unknown"  # a newer server has more reasons


class ReplyKind(Enum):
    """What a stretch of a reply is, where the model marks it.  The marks are part of it."""

    TEXT = "text"
    REASONING = "reasoning"
    TOOL_CALL = "tool_call"


class RunState(Enum):
    """What becomes of a turn between its acceptance and its end."""

    RUNNING = "running"  # it is computed, or goes on being computed
    SUSPENDED = "suspended"  # turns that began before it need its memory; it goes on by itself
    PAUSED = "paused"  # it is not read fast enough, and other turns run meanwhile
    UNKNOWN = "unknown"  # a newer server has more states


@dataclass(frozen=True, slots=True)
class TurnState:
    """Of a turn, from now on."""

    state: RunState
    found: pb.Usage  # with RUNNING: where the KV of all that the turn holds by now was found; else empty


@dataclass(frozen=True, slots=True)
class Delta:
    """More of the reply, all of one kind.  With `restarted`, discard what was shown: it begins anew."""

    text: str
    token_ids: tuple[int, ...]
    restarted: bool = False
    kind: ReplyKind = ReplyKind.TEXT
    logprobs: tuple[pb.TokenLogprobs, ...] = ()  # one per token, if they were asked for


@dataclass(frozen=True, slots=True)
class Turn:
    """A complete reply."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: str | None
    usage: pb.Usage
    timing: pb.Timing
    context_left: int
    committed_tokens: int
    history_rewritten: bool
    rewritten_from: int | None = (
        None  # first token of the past that the chat template now renders differently
    )
    logprobs: tuple[
        pb.TokenLogprobs, ...
    ] = ()  # as in `Delta`; none if the reply came from the server's disk


class ReplyBuffer:
    """Puts a reply together although parts of it may come twice, and says what of it is new to the reader."""

    def __init__(self) -> None:
        self.rewritten_from: int | None = None
        self._deltas: list[pb.Delta] = []
        self._num_tokens = 0
        # What the reader has, while a reply is being repeated.
        self._shown: tuple[str, tuple[int, ...]] | None = None

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self._deltas)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for delta in self._deltas for token_id in delta.token_ids)

    @property
    def logprobs(self) -> tuple[pb.TokenLogprobs, ...]:
        return tuple(logprobs for delta in self._deltas for logprobs in delta.logprobs)

    def restart(self) -> None:
        """The reply comes again from its beginning."""
        self._replace_from(0)

    def add(self, delta: pb.Delta) -> list[Delta]:
        """What of `delta` the reader has not seen.  From its offset on, it replaces what came before."""
        self._replace_from(delta.offset)
        self._deltas.append(delta)
        self._num_tokens += len(delta.token_ids)
        if self._shown is not None:
            return self._catch_up()
        return [_shown_as(delta)] if delta.text or delta.token_ids else []

    def finish(self) -> list[Delta]:
        """What the reader must still see when nothing follows: a repeated reply may have come out shorter."""
        return self._catch_up(complete=True) if self._shown is not None else []

    def _replace_from(self, offset: int) -> None:
        if offset < self._num_tokens and self._shown is None:
            self._shown = self.text, self.token_ids
        while offset < self._num_tokens:
            self._num_tokens -= len(self._deltas.pop().token_ids)
        if offset != self._num_tokens:
            raise Internal(f"the server's delta begins at token {offset}; no delta before it ends there")

    def _catch_up(self, complete: bool = False) -> list[Delta]:
        """A repetition that goes beyond what was shown is news; one that differs replaces it."""
        assert self._shown is not None
        (shown_text, shown_ids), text, token_ids = self._shown, self.text, self.token_ids
        if text.startswith(shown_text) and token_ids[: len(shown_ids)] == shown_ids:
            self._shown = None
            new_text, num_new = text[len(shown_text) :], len(token_ids) - len(shown_ids)
            return [_end_of(self._deltas[-1], new_text, num_new)] if new_text or num_new else []
        only_repeats = shown_text.startswith(text) and shown_ids[: len(token_ids)] == token_ids
        if only_repeats and not complete:
            return []
        self._shown = None
        first, *rest = [_shown_as(delta) for delta in self._deltas] or [Delta("", ())]
        return [replace(first, restarted=True), *rest]

    def turn(self, done: pb.TurnDone) -> Turn:
        return Turn(
            id=done.turn_id,
            text=self.text,
            token_ids=self.token_ids,
            finish_reason=_finish_reason(done.finish_reason),
            matched_stop=done.matched_stop if done.HasField("matched_stop") else None,
            usage=done.usage,
            timing=done.timing,
            context_left=done.context_left,
            committed_tokens=done.committed_tokens,
            history_rewritten=done.history_rewritten,
            rewritten_from=self.rewritten_from,
            logprobs=self.logprobs,
        )


def state_of(event: pb.StateChanged) -> TurnState:
    known = {value: name.removeprefix("RUN_STATE_") for name, value in pb.RunState.items()}
    state = RunState.__members__.get(known.get(event.state, ""), RunState.UNKNOWN)
    return TurnState(state, event.found)


def _shown_as(delta: pb.Delta) -> Delta:
    kind = _KINDS.get(delta.kind, ReplyKind.TEXT)  # a newer server may know more kinds
    return Delta(delta.text, tuple(delta.token_ids), kind=kind, logprobs=tuple(delta.logprobs))


def _end_of(delta: pb.Delta, text: str, num_tokens: int) -> Delta:
    """Its last `num_tokens` tokens and the end of its text.  What is new never begins in an earlier delta."""
    begin = len(delta.token_ids) - num_tokens
    ids, logprobs = tuple(delta.token_ids[begin:]), tuple(delta.logprobs[begin:])
    return replace(_shown_as(delta), text=text, token_ids=ids, logprobs=logprobs)


def _finish_reason(number: int) -> FinishReason:
    known = {value: name.removeprefix("FINISH_REASON_") for name, value in pb.FinishReason.items()}
    return FinishReason.__members__.get(known.get(number, ""), FinishReason.UNKNOWN)


_KINDS: dict[int, ReplyKind] = {
    pb.REPLY_KIND_TEXT: ReplyKind.TEXT,
    pb.REPLY_KIND_REASONING: ReplyKind.REASONING,
    pb.REPLY_KIND_TOOL_CALL: ReplyKind.TOOL_CALL,
}
