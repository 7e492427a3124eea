"""A committed turn told again, from what the token log holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from engine.text_service import TextService
from engine.types import (
    ConversationEvent,
    Delta,
    FinishReason,
    ReplyKind,
    SamplingParams,
    TurnAccepted,
    TurnDone,
    TurnRecord,
)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive tokens of a reply that are of one kind."""

    token_ids: tuple[int, ...]
    text: str
    kind: ReplyKind


def replayed(
    record: TurnRecord, stretches: Sequence[Stretch], context_tokens: int
) -> list[ConversationEvent]:
    """A committed turn as events: accepted, the whole reply at once, done.

    Its events had more numbers when it was computed: one for every token at least.
    """
    first_seq = record.done_seq - len(stretches)
    offsets = accumulate((len(stretch.token_ids) for stretch in stretches), initial=0)
    return [
        TurnAccepted(first_seq - 1, record.turn_id, queue_position=0),
        *(
            Delta(first_seq + i, record.turn_id, offset, stretch.token_ids, stretch.text, stretch.kind)
            for i, (stretch, offset) in enumerate(zip(stretches, offsets, strict=False))
        ),
        done_event(record, context_tokens),
    ]


def done_event(record: TurnRecord, context_tokens: int) -> TurnDone:
    """What is said once the turn is in the log."""
    committed = record.first_token + len(record.prompt_ids) + len(record.reply_ids)
    return TurnDone(
        record.done_seq,
        record.turn_id,
        record.finish_reason,
        record.matched_stop,
        record.usage,
        record.timing,
        context_left=context_tokens - committed,
        committed_tokens=committed,
        history_rewritten=record.history_rewritten,
    )


def stretches(record: TurnRecord, text: TextService) -> list[Stretch]:
    """The reply by kinds of text, at least one unless there was no reply to give."""
    if record.finish_reason is FinishReason.APPENDED:
        return []
    kinds = text.kinds(record.prompt_ids)
    by_kind = [(kind, tuple(ids)) for kind, ids in groupby(record.reply_ids, kinds.push)]
    if len(by_kind) < 2:
        kind = by_kind[0][0] if by_kind else ReplyKind.TEXT
        return [Stretch(record.reply_ids, record.reply_text, kind)]
    detokenizer, rest = text.detokenizer(SamplingParams(), record.prompt_ids[-1]), record.reply_text
    parts = []
    for kind, ids in by_kind[:-1]:
        length = len(detokenizer.push(ids))
        parts.append(Stretch(ids, rest[:length], kind))
        rest = rest[length:]
    kind, ids = by_kind[-1]
    return [*parts, Stretch(ids, rest, kind)]
