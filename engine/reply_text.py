"""The text of one reply while its tokens come: what is settled of it, and of which kind each piece is.

Characters that could still grow into a stop string are held back, sometimes until the reply has gone on to
another kind.  They are then delivered as what they were when their token came.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from engine.text.detokenizer import IncrementalDetokenizer
from engine.types import ReplyKind


class ReplyKinds(Protocol):
    """Tells stretches of one reply apart."""

    def push(self, token_id: int) -> ReplyKind: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive characters of one kind; none if a token settled none."""

    text: str
    kind: ReplyKind


class ReplyText:
    def __init__(self, detokenizer: IncrementalDetokenizer, kinds: ReplyKinds) -> None:
        self._detokenizer, self._kinds = detokenizer, kinds
        self._kind = ReplyKind.TEXT  # of the last token
        self._held: list[ReplyKind] = []  # of each character held back
        self._settled: list[str] = []

    @property
    def settled(self) -> str:
        """All text so far that cannot change any more."""
        return "".join(self._settled)

    @property
    def matched_stop(self) -> str | None:
        return self._detokenizer.matched_stop

    def push(self, token_id: int) -> list[Piece]:
        """Take in a token; returns the pieces that it settles, the last of them of its own kind."""
        self._kind = self._kinds.push(token_id)
        pieces = self._pieces(self._detokenizer.push((token_id,)))
        return pieces if pieces and pieces[-1].kind is self._kind else [*pieces, Piece("", self._kind)]

    def finish(self) -> list[Piece]:
        """The reply is over; returns the pieces that were held back."""
        return self._pieces(self._detokenizer.finish())

    def _pieces(self, text: str) -> list[Piece]:
        self._settled.append(text)
        num_held = self._detokenizer.num_held
        if not self._held:
            self._held = [self._kind] * num_held
            return [Piece(text, self._kind)] if text else []
        kinds = self._held + [self._kind] * (len(text) + num_held)  # at least as many as there are characters
        self._held = kinds[len(text) : len(text) + num_held]
        by_kind = groupby(zip(text, kinds, strict=False), lambda char: char[1])
        return [Piece("".join(char for char, _ in chars), kind) for kind, chars in by_kind]
