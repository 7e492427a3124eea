"""Committed histories: which tokens a list of turns makes, and where it can be cut.

Each turn goes on from its `first_token`, which may lie before the end of the turn before it; what stood
behind is gone from the history and still in that turn's record.  A history is cut behind so many turns, as it
stood when the last of them was committed, or behind so many of its tokens.  A prompt that was rendered from
messages is not cut: its text would no longer be what they say.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from engine.errors import InvalidRequest
from engine.types import ConversationId, FinishReason, Point, TurnRecord

Decode = Callable[[Sequence[int], int], str]  # (ids, id before them) -> text without special tokens


@dataclass(frozen=True, slots=True)
class Span:
    """Where a turn's tokens lie."""

    first_token: int
    first_reply_token: int
    end: int
    is_text: bool  # the prompt was rendered from messages


@dataclass(frozen=True, slots=True)
class Cut:
    """What stays: `num_turns` turns, which end at token `num_tokens`."""

    num_turns: int
    num_tokens: int
    shortens: bool  # the last of the turns
    is_prefix: bool  # of the tokens as they stand now


@dataclass(frozen=True, slots=True)
class Rewound:
    """Where a history ends after it was cut."""

    num_turns: int
    num_tokens: int
    tokens: "array[int] | None"  # None: the first of those that it had
    history_rewritten: bool  # as its last turn says


def tokens_of(turns: Iterable[TurnRecord]) -> "array[int]":
    """The history that `turns`, from the first on, make."""
    tokens = array("i")
    for turn in turns:
        del tokens[turn.first_token :]
        tokens.extend(array("i", turn.prompt_ids + turn.reply_ids))
    return tokens


def num_computed(turns: Iterable[TurnRecord]) -> int:
    """How many of the first tokens of the history that `turns` make some turn has computed: all that a reply
    attended to.  What was appended, or cancelled before its reply began, counts with the next that has one.
    """
    computed = 0
    for turn in turns:
        computed = min(computed, turn.first_token)
        end = turn.first_token + len(turn.prompt_ids) + len(turn.reply_ids)
        num_said = turn.usage.completion_tokens  # when it was committed; the reply may have been cut since
        if num_said:
            computed = min(end, turn.first_token + len(turn.prompt_ids) + num_said - 1)
    return computed


def cut_at(name: ConversationId, spans: Sequence[Span], point: Point | None) -> Cut:
    """The cut that `point` means in the history of `name`; None is its end.  InvalidRequest says which points
    there are.
    """
    num_tokens = spans[-1].end if spans else 0
    if point is None:
        return Cut(len(spans), num_tokens, shortens=False, is_prefix=True)
    if point.num_tokens is not None and point.num_turns is None:
        if not 0 <= point.num_tokens <= num_tokens:
            raise InvalidRequest(
                f"{name} has {num_tokens} tokens; give a number from 0 to that, not {point.num_tokens}"
            )
        return _cut_at_token(name, spans, point.num_tokens)
    if point.num_turns is None or point.num_tokens is not None:
        given = "neither" if point.num_turns is None else "both"
        raise InvalidRequest(f"a point is a number of turns or of tokens; {given} was given for {name}")
    if not 0 <= point.num_turns <= len(spans):
        raise InvalidRequest(
            f"{name} has {len(spans)} turns; give a number from 0 to that, not {point.num_turns}"
        )
    end = spans[point.num_turns - 1].end if point.num_turns else 0
    is_prefix = all(span.first_token >= end for span in spans[point.num_turns :])
    return Cut(point.num_turns, end, shortens=False, is_prefix=is_prefix)


def shortened(turn: TurnRecord, num_tokens: int, decode: Decode) -> TurnRecord:
    """The turn with the history cut at `num_tokens`.  Cut inside its prompt it has no reply any more."""
    num_prompt = num_tokens - turn.first_token
    num_reply = max(0, num_prompt - len(turn.prompt_ids))
    prompt_ids, reply_ids = turn.prompt_ids[:num_prompt], turn.reply_ids[:num_reply]
    return replace(
        turn,
        prompt_ids=prompt_ids,
        reply_ids=reply_ids,
        reply_text=decode(reply_ids, prompt_ids[-1]) if reply_ids else "",
        finish_reason=FinishReason.CANCELLED if num_prompt >= len(turn.prompt_ids) else FinishReason.APPENDED,
        matched_stop=None,
    )


def _cut_at_token(name: ConversationId, spans: Sequence[Span], num_tokens: int) -> Cut:
    owner = _owner(spans, num_tokens)
    if owner is None:
        return Cut(0, 0, shortens=False, is_prefix=True)
    if not _may_cut(spans, num_tokens):
        edges = {edge for s in spans for edge in (s.first_token, s.first_token + 1, s.first_reply_token)}
        legal = [place for place in edges if place <= spans[-1].end and _may_cut(spans, place)]
        before = max(place for place in legal if place < num_tokens)
        behind = min(place for place in legal if place > num_tokens)
        raise InvalidRequest(
            f"token {num_tokens} of {name} lies inside the messages of turn number {owner}; "
            f"the nearest points are tokens {before} and {behind}"
        )
    return Cut(owner + 1, num_tokens, shortens=num_tokens < spans[owner].end, is_prefix=True)


def _owner(spans: Sequence[Span], num_tokens: int) -> int | None:
    """The number of the turn whose token is the last of `num_tokens`."""
    owners = (i for i in reversed(range(len(spans))) if spans[i].first_token < num_tokens)
    return next(owners, None)


def _may_cut(spans: Sequence[Span], num_tokens: int) -> bool:
    owner = _owner(spans, num_tokens)
    return owner is None or not spans[owner].is_text or num_tokens >= spans[owner].first_reply_token
