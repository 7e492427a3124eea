"""What parameters and past tokens do to a row's logits before a token is chosen.

In this order: biases, repetition penalty, presence and frequency penalties, and last what is banned.  All
of it follows from a row's `RowParams`.  What it takes to know of a long history is kept from step to step,
and only new tokens are added to it; where a history does not continue the one that was counted, counting
starts anew.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batch import RowParams, needs_history
from engine.errors import InvariantError
from engine.stopping import stop_ids
from kernels.penalties import TokenLists, add_, ban_, penalize_counts_, penalize_repetition_

_KEPT_CALLS = 8  # a row that was absent for so many calls is forgotten; a paused one may be back sooner


class Edits:
    """Edits logits for one model."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids
        self._rows: dict[int, _Row] = {}
        self._num_calls = 0

    def apply(self, logits: Tensor, params: Mapping[int, RowParams]) -> None:
        """Edits logits [R, V] fp32 in place, those of rows that ask for nothing excepted.  If they are on a
        GPU, nobody waits for it.

        `params` by the row's name, in the order of logits.  InvariantError if a history is not all there.
        """
        self._num_calls += 1
        edited = [(at, self._row(name, p)) for at, (name, p) in enumerate(params.items()) if _edits(p)]
        if edited:
            _add_biases(logits, edited)
            _penalize_repetition(logits, edited)
            _penalize_counts(logits, edited)
        bans = [(at, array("q", row.banned_now())) for at, row in edited]
        bans += [
            (at, array("q", stop_ids(p.sampling, self._eos_ids)))
            for at, p in enumerate(params.values())
            if _holds_back_stops(p)
        ]
        if tokens := _lists(bans):
            ban_(logits, tokens)
        self._forget()

    def _row(self, name: int, params: RowParams) -> "_Row":
        history = _history(params)
        tokens = history.tobytes()
        row = self._rows.get(name)
        if row is None or not row.continues_to(params, tokens):
            row = self._rows[name] = _Row(params)
        row.last_call = self._num_calls
        row.count(history, tokens)
        return row

    def _forget(self) -> None:
        gone = [name for name, row in self._rows.items() if row.last_call < self._num_calls - _KEPT_CALLS]
        for name in gone:
            del self._rows[name]


class _Row:
    """One row's parameters in the form that is needed, and its tokens, counted."""

    def __init__(self, params: RowParams) -> None:
        sampling = self.sampling = params.sampling
        self.bad_word_ids = params.bad_word_ids
        self.num_prompt = params.num_prompt
        self.last_call = 0
        self.bias_ids = array("q", (token for token, _ in sampling.logit_bias or ()))
        self.biases = array("f", (bias for _, bias in sampling.logit_bias or ()))
        self.repetition = sampling.repetition_penalty or 1.0
        self.presence = sampling.presence_penalty or 0.0
        self.frequency = sampling.frequency_penalty or 0.0
        self.seen = array("q")  # distinct tokens of the history, if there is a repetition penalty
        self.replied = array("q")  # distinct tokens of the reply, if there is a penalty on them,
        self.counts = array("f")  # and how often each occurs
        self._tokens = b""  # what was counted, as the history's bytes
        self._seen: set[int] = set()
        self._index: dict[int, int] = {}  # of a token in `replied`
        self._reply_end: array[int] = array("i")  # as much as the longest bad word, less its last token
        self._longest = max((len(word) - 1 for word in self.bad_word_ids), default=0)
        self._bad_ends: dict[int | None, list[tuple[int, ...]]] = {}  # by the last token but one
        for word in self.bad_word_ids:
            self._bad_ends.setdefault(word[-2] if len(word) > 1 else None, []).append(word)

    def continues_to(self, params: RowParams, tokens: bytes) -> bool:
        """Whether these are the same parameters, with what was counted or more behind it."""
        return (
            params.sampling is self.sampling
            and params.bad_word_ids is self.bad_word_ids
            and params.num_prompt == self.num_prompt
            and tokens.startswith(self._tokens)
        )

    def count(self, history: "array[int]", tokens: bytes) -> None:
        """Counts what is new in a history, given as bytes too."""
        first = len(self._tokens) // history.itemsize
        self._tokens = tokens
        if self.repetition != 1:
            new = [token for token in dict.fromkeys(history[first:]) if token not in self._seen]
            self._seen.update(new)
            self.seen.extend(new)
        if self.presence or self.frequency:
            for token in history[max(first, self.num_prompt) :]:
                at = self._index.setdefault(token, len(self.replied))
                if at == len(self.replied):
                    self.replied.append(token)
                    self.counts.append(0)
                self.counts[at] += 1
        self._reply_end = history[max(self.num_prompt, len(history) - self._longest) :]

    def banned_now(self) -> Iterable[int]:
        """The tokens that would complete a bad word in the reply."""
        for word in self._bad_ends.get(None, ()):
            yield word[0]
        reply = tuple(self._reply_end)
        for word in self._bad_ends.get(reply[-1], ()) if reply else ():
            if reply[-len(word) + 1 :] == word[:-1]:
                yield word[-1]


def is_edited(params: RowParams) -> bool:
    """Whether `Edits` may change this row's logits."""
    return _edits(params) or _holds_back_stops(params)


def _holds_back_stops(params: RowParams) -> bool:
    return params.num_generated < (params.sampling.min_tokens or 0)


def _edits(params: RowParams) -> bool:
    sampling = params.sampling
    return bool(sampling.logit_bias or params.bad_word_ids) or needs_history(sampling)


def _history(params: RowParams) -> "array[int]":
    """The tokens before the one to be chosen; none if they do not matter."""
    if not needs_history(params.sampling):
        return array("i")
    known = 0 if params.history is None else len(params.history)
    if params.history is None or known != params.position:
        raise InvariantError(f"{known} tokens are known where the one at {params.position} is to be chosen")
    return params.history


def _lists(pairs: Sequence[tuple[int, "array[int]"]]) -> TokenLists | None:
    """(row of logits, its tokens) in one; None if there are no tokens."""
    pairs = [pair for pair in pairs if pair[1]]
    if not pairs:
        return None
    return TokenLists(
        rows=torch.tensor([at for at, _ in pairs]),
        lengths=torch.tensor([len(ids) for _, ids in pairs]),
        ids=_joined(ids for _, ids in pairs),
    )


def _joined(arrays: Iterable["array[Any]"]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays)))


def _add_biases(logits: Tensor, edited: Sequence[tuple[int, _Row]]) -> None:
    if tokens := _lists([(at, row.bias_ids) for at, row in edited]):
        add_(logits, tokens, _joined(row.biases for _, row in edited))


def _penalize_repetition(logits: Tensor, edited: Sequence[tuple[int, _Row]]) -> None:
    if tokens := _lists([(at, row.seen) for at, row in edited]):
        penalize_repetition_(logits, tokens, torch.tensor([row.repetition for _, row in edited if row.seen]))


def _penalize_counts(logits: Tensor, edited: Sequence[tuple[int, _Row]]) -> None:
    if tokens := _lists([(at, row.replied) for at, row in edited]):
        rows = [row for _, row in edited if row.replied]
        penalize_counts_(
            logits,
            tokens,
            counts=_joined(row.counts for row in rows),
            presence=torch.tensor([row.presence for row in rows]),
            frequency=torch.tensor([row.frequency for row in rows]),
        )
