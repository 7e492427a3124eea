"""What a reply is made of: deltas while it comes, and the turn at its end."""

from dataclasses import dataclass
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
    UNKNOWN = "unknown"  # a newer server has more reasons


@dataclass(frozen=True, slots=True)
class Delta:
    """More of the reply.  With `restarted`, discard what was shown: this is the reply from its beginning."""

    text: str
    token_ids: tuple[int, ...]
    restarted: bool = False


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


class ReplyBuffer:
    """Puts a reply together although parts of it may come twice, and says what of it is new to the reader."""

    def __init__(self) -> None:
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

    def restart(self) -> None:
        """The reply comes again from its beginning."""
        self._replace_from(0)

    def add(self, delta: pb.Delta) -> Delta | None:
        """What of `delta` the reader has not seen.  From its offset on, it replaces what came before."""
        self._replace_from(delta.offset)
        self._deltas.append(delta)
        self._num_tokens += len(delta.token_ids)
        if self._shown is not None:
            return self._catch_up()
        return Delta(delta.text, tuple(delta.token_ids)) if delta.text or delta.token_ids else None

    def finish(self) -> Delta | None:
        """What the reader must still see when nothing follows: a repeated reply may have come out shorter."""
        return self._catch_up(complete=True) if self._shown is not None else None

    def _replace_from(self, offset: int) -> None:
        if offset < self._num_tokens and self._shown is None:
            self._shown = self.text, self.token_ids
        while offset < self._num_tokens:
            self._num_tokens -= len(self._deltas.pop().token_ids)
        if offset != self._num_tokens:
            raise Internal(f"the server's delta begins at token {offset}; no delta before it ends there")

    def _catch_up(self, complete: bool = False) -> Delta | None:
        """A repetition that goes beyond what was shown is news; one that differs replaces it."""
        assert self._shown is not None
        (shown_text, shown_ids), text, token_ids = self._shown, self.text, self.token_ids
        if text.startswith(shown_text) and token_ids[: len(shown_ids)] == shown_ids:
            self._shown = None
            new = Delta(text[len(shown_text) :], token_ids[len(shown_ids) :])
            return new if new.text or new.token_ids else None
        only_repeats = shown_text.startswith(text) and shown_ids[: len(token_ids)] == token_ids
        if only_repeats and not complete:
            return None
        self._shown = None
        return Delta(text, token_ids, restarted=True)

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
        )


def _finish_reason(number: int) -> FinishReason:
    known = {value: name.removeprefix("FINISH_REASON_") for name, value in pb.FinishReason.items()}
    return FinishReason.__members__.get(known.get(number, ""), FinishReason.UNKNOWN)
