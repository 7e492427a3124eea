"""Zones of a history against the same kept token by token, and what a log knows of them."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.computed import Computed, Miss
from engine.history import num_computed, tokens_of
from engine.types import FinishReason, TurnRecord, Usage
from tests.engine.log_records import turn

LENGTHS = st.integers(0, 30)
CHANGES = st.one_of(
    st.tuples(st.just("add"), LENGTHS, st.sampled_from([Miss.RESTART, Miss.REWRITTEN, Miss.NEW])),
    st.tuples(st.sampled_from(["compute", "cut", "lose"]), LENGTHS),
)


class ByToken:
    """Why each token would be missing."""

    def __init__(self) -> None:
        self.reasons: list[Miss] = []

    @property
    def num_here(self) -> int:
        others = (i for i, why in enumerate(self.reasons) if why is not Miss.EVICTED)
        return next(others, len(self.reasons))

    @property
    def num_tokens(self) -> int:
        return max((i + 1 for i, why in enumerate(self.reasons) if why is not Miss.NEW), default=0)

    def add(self, end: int, why: Miss) -> None:
        self.reasons += [why] * (end - len(self.reasons))

    def compute(self, num_tokens: int) -> None:
        self.reasons[:num_tokens] = [Miss.EVICTED] * num_tokens

    def cut(self, num_tokens: int) -> None:
        del self.reasons[num_tokens:]

    def lose(self, first_token: int) -> None:
        for i in range(first_token, self.num_here):
            self.reasons[i] = Miss.CUT

    def misses(self, num_tokens: int, num_history: int, kept: set[int]) -> Counter[Miss]:
        behind = [Miss.NEVER_COMPUTED if i < num_history else Miss.NEW for i in range(num_tokens)]
        reasons = self.reasons[:num_tokens] + behind[len(self.reasons) :]
        if num_tokens - 1 in kept:
            reasons[-1] = Miss.CUT if self.num_tokens >= num_tokens else Miss.NEW
        return Counter(why for i, why in enumerate(reasons) if i not in kept or i == num_tokens - 1)


@given(
    st.lists(CHANGES, max_size=12), st.integers(1, 30), LENGTHS, st.sets(st.integers(0, 29)), st.booleans()
)
@settings(deadline=None, max_examples=300)
def test_zones_count_as_tokens_one_by_one_would(
    changes: list[tuple], num_tokens: int, num_history: int, kept: set[int], of_a_copy: bool
) -> None:
    computed, plain = Computed(), ByToken()
    for name, *arguments in changes:
        getattr(computed, name)(*arguments)
        getattr(plain, name)(*arguments)
        assert (computed.num_here, computed.num_tokens) == (plain.num_here, plain.num_tokens)
    if of_a_copy:
        original, computed = computed, computed.copy()
        original.compute(30)
    found = computed.misses(num_tokens, num_history, lambda n: sum(i < n for i in kept))
    assert +found == +plain.misses(num_tokens, num_history, kept)


def said(number: int, first_token: int, prompt: int, reply: int, **changes: object) -> TurnRecord:
    record = turn(number, first_token, prompt, reply, usage=Usage(completion_tokens=reply))
    return replace(record, **changes)  # type: ignore[arg-type]


APPENDED = {"finish_reason": FinishReason.APPENDED}


@pytest.mark.parametrize(
    ("turns", "num_tokens"),
    [
        ([], 0),
        ([said(0, 0, 5, 3)], 7),  # the last token of a reply is not attended to
        ([said(0, 0, 5, 0, **APPENDED)], 0),
        ([said(0, 0, 5, 0, **APPENDED), said(1, 5, 2, 2)], 8),
        ([said(0, 0, 5, 3), said(1, 8, 4, 0, **APPENDED)], 7),
        ([said(0, 0, 5, 3), said(1, 3, 4, 0, **APPENDED)], 3),  # it replaced what was computed
        ([said(0, 0, 5, 3), said(1, 3, 4, 2)], 8),
        ([said(0, 0, 5, 1, usage=Usage(completion_tokens=3))], 6),  # its reply was cut short later
        ([said(0, 0, 2, 0, usage=Usage(completion_tokens=3), **APPENDED)], 2),  # and its prompt
        ([said(0, 0, 5, 0, finish_reason=FinishReason.CANCELLED)], 0),  # nobody knows how far it came
    ],
)
def test_the_log_knows_what_replies_attended_to(turns: list[TurnRecord], num_tokens: int) -> None:
    assert num_computed(turns) == num_tokens <= len(tokens_of(turns))
