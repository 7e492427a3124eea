"""Where histories can be cut, for turns that begin anywhere in what was before them."""

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import AlreadyExists, InvalidRequest, NotFound
from engine.history import Span, cut_at, shortened, tokens_of
from engine.token_log import TokenLog
from engine.types import (
    ConversationId,
    FinishReason,
    Message,
    Point,
    SamplingParams,
    Tenant,
    TurnId,
    TurnRecord,
)
from tests.engine.log_records import conversation, stored, turn
from tests.fakes import FakeClock

NAME = ConversationId("c-1")


def text_of(ids: Sequence[int], after: int) -> str:
    return f"{len(ids)} after {after}"


@st.composite
def histories(draw: st.DrawFn) -> list[TurnRecord]:
    turns: list[TurnRecord] = []
    end = 0
    for number in range(draw(st.integers(0, 5))):
        first = draw(st.integers(max(0, end - 8), end)) if draw(st.booleans()) else end
        prompt, reply = draw(st.integers(1, 4)), draw(st.integers(0, 4))
        messages = (Message("user", "x"),) if draw(st.booleans()) else ()
        turns.append(turn(number, first, prompt, reply, messages=messages))
        end = first + prompt + reply
    return turns


def spans(turns: Sequence[TurnRecord]) -> list[Span]:
    ends = [(t.first_token, t.first_token + len(t.prompt_ids), len(t.reply_ids)) for t in turns]
    return [
        Span(first, reply, reply + n, bool(t.messages))
        for (first, reply, n), t in zip(ends, turns, strict=True)
    ]


def kept(turns: Sequence[TurnRecord], point: Point) -> list[TurnRecord]:
    cut = cut_at(NAME, spans(turns), point)
    rest = list(turns[: cut.num_turns])
    if cut.shortens:
        rest[-1] = shortened(rest[-1], cut.num_tokens, text_of)
    assert len(tokens_of(rest)) == cut.num_tokens
    assert cut.is_prefix is (tokens_of(turns)[: cut.num_tokens] == tokens_of(rest))
    return rest


@given(histories())
def test_a_history_cut_at_a_token_is_what_stood_before_it_or_the_nearest_places_are_named(
    turns: list[TurnRecord],
) -> None:
    tokens = tokens_of(turns)
    refused: dict[int, tuple[int, int]] = {}
    legal = []
    for place in range(len(tokens) + 1):
        try:
            rest = kept(turns, Point(num_tokens=place))
        except InvalidRequest as error:
            named = re.search(r"the nearest points are tokens (\d+) and (\d+)$", str(error))
            assert named is not None
            refused[place] = int(named[1]), int(named[2])
        else:
            legal.append(place)
            assert tokens_of(rest) == tokens[:place]
            assert all(was == is_now for was, is_now in zip(turns, rest[:-1], strict=False))
            for was, is_now in zip(turns, rest, strict=False):
                if was.messages:
                    assert is_now.prompt_ids == was.prompt_ids, "a prompt made of messages was cut"
    for place, (before, behind) in refused.items():
        assert before == max(other for other in legal if other < place)
        assert behind == min(other for other in legal if other > place)


@given(histories())
def test_a_history_cut_behind_a_turn_is_what_stood_when_it_was_committed(turns: list[TurnRecord]) -> None:
    for number in range(len(turns) + 1):
        assert kept(turns, Point(num_turns=number)) == turns[:number]


def test_a_turn_that_is_cut_says_how_it_ended() -> None:
    whole = turn(0, 10, prompt=3, reply=4)
    reply = shortened(whole, 15, text_of)
    assert reply == replace(
        whole,
        reply_ids=whole.reply_ids[:2],
        reply_text=f"2 after {whole.prompt_ids[2]}",
        finish_reason=FinishReason.CANCELLED,
        matched_stop=None,
    )
    none_of_it = shortened(whole, 13, text_of)
    assert (none_of_it.reply_ids, none_of_it.reply_text) == ((), "")
    assert none_of_it.finish_reason is FinishReason.CANCELLED
    prompt = shortened(whole, 12, text_of)
    assert (prompt.prompt_ids, prompt.reply_ids) == (whole.prompt_ids[:2], ())
    assert prompt.finish_reason is FinishReason.APPENDED


# -- in the token log


@pytest.fixture
def log() -> TokenLog:
    with closing(TokenLog.open(None, clock=FakeClock())) as log:
        yield log  # type: ignore[misc]


@given(histories(), st.data())
def test_the_log_cuts_and_copies_histories_as_they_are_cut(
    turns: list[TurnRecord], data: st.DataObject
) -> None:
    length = len(tokens_of(turns))
    by_tokens = st.builds(Point, num_tokens=st.integers(0, length))
    point = data.draw(by_tokens | st.builds(Point, num_turns=st.integers(0, len(turns))))
    with closing(TokenLog.open(None, clock=FakeClock())) as log:
        log.create(conversation(NAME)).result()
        for record in turns:
            log.commit_turn(NAME, record, 50 + record.number).result()
        fork = log.fork(conversation("fork", parent=NAME), point, text_of)
        rewound = log.rewind(NAME, point, text_of)
        try:
            rest = kept(turns, point)
        except InvalidRequest as error:
            assert str(fork.exception()) == str(rewound.exception()) == str(error)
            assert stored(log, NAME)[1] == turns
            assert log.load(ConversationId("fork")).result() is None
            return
        tokens = tokens_of(rest)
        history = rewound.result()
        assert (history.num_turns, history.num_tokens) == (len(rest), len(tokens))
        assert history.history_rewritten is (bool(rest) and rest[-1].history_rewritten)
        whole = tokens_of(turns)
        assert tokens == (whole[: len(tokens)] if history.tokens is None else history.tokens)
        for name in (NAME, "fork"):
            record, found = stored(log, name)
            assert found == rest
            assert (record.num_turns, record.num_tokens) == (len(rest), len(tokens))
        made = stored(log, "fork")[0]
        assert made == fork.result()
        assert (made.parent, made.forked_at) == (NAME, len(tokens))
        assert made.seq_mark == (50 + len(turns) - 1 if turns else 0)


def test_a_turn_replaces_those_of_its_number_and_above(log: TokenLog) -> None:
    log.create(conversation(NAME)).result()
    for number in range(3):
        log.commit_turn(NAME, turn(number, 5 * number), 1).result()
    with pytest.raises(AlreadyExists, match="turn id t-0 was used for turn 0 of c-1"):
        log.commit_turn(NAME, turn(1, 5, turn_id=TurnId("t-0")), 2).result()
    assert len(stored(log, NAME)[1]) == 3, "what is refused replaces nothing"
    again = turn(1, 4, prompt=2, reply=7, turn_id=TurnId("t-2"))
    log.commit_turn(NAME, again, 9).result()
    record, turns = stored(log, NAME)
    assert turns == [turn(0, 0), again]
    assert (record.num_turns, record.num_tokens, record.seq_mark) == (2, 13, 9)


def test_a_conversation_begins_with_its_first_turn_or_not_at_all(log: TokenLog) -> None:
    log.create(conversation(NAME, seq_mark=2), turn(0, 0)).result()
    assert stored(log, NAME)[1] == [turn(0, 0)]
    assert stored(log, NAME)[0].num_tokens == 5
    with pytest.raises(AlreadyExists):
        log.create(conversation(NAME), turn(0, 0)).result()
    assert len(stored(log, NAME)[1]) == 1


def test_an_update_sets_defaults_one_by_one_and_labels_all_together(log: TokenLog) -> None:
    before = SamplingParams(top_k=3, stop=("a",))
    log.create(conversation(NAME, sampling=before, labels={"a": "1", "b": "2"})).result()
    updated = log.update(NAME, SamplingParams(top_k=4, seed=0), None).result()
    both = SamplingParams(top_k=4, seed=0, stop=("a",))
    assert (updated.sampling, updated.labels) == (both, {"a": "1", "b": "2"})
    log.update(NAME, None, {"b": "3"}).result()
    record = stored(log, NAME)[0]
    assert (record.sampling, record.labels) == (both, {"b": "3"})


def test_a_fork_is_found_again_by_its_tenant_parent_and_place(log: TokenLog) -> None:
    log.create(conversation(NAME)).result()
    log.commit_turn(NAME, turn(0, 0), 1).result()
    wanted = conversation("fork", parent=NAME, resume_token="new")
    made = log.fork(wanted, None, text_of).result()
    assert log.fork(replace(wanted, resume_token="newer"), None, text_of).result() == made
    others = [
        (replace(wanted, tenant=Tenant("other")), None),
        (wanted, Point(num_turns=0)),
        (replace(wanted, id=NAME), None),
    ]
    for record, point in others:
        with pytest.raises(AlreadyExists, match="is taken; choose another or none"):
            log.fork(record, point, text_of).result()


def test_what_is_not_there_is_neither_rewound_nor_forked_nor_updated(log: TokenLog) -> None:
    gone = ConversationId("c-9")
    for operation in (
        log.rewind(gone, Point(num_turns=0), text_of),
        log.fork(conversation("fork", parent=gone), None, text_of),
        log.update(gone, None, {}),
    ):
        with pytest.raises(NotFound, match="conversation c-9 is not in the token log"):
            operation.result()
