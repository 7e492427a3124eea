"""Text held back for a stop string keeps the kind that it had when it came."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.reply_text import Piece, ReplyText
from engine.text.detokenizer import IncrementalDetokenizer
from engine.types import ReplyKind
from tests.fakes import byte_tokenizer

TEXT, REASONING, TOOL_CALL = ReplyKind
TOKENIZER = byte_tokenizer()
KINDS = {"r": REASONING, "t": TOOL_CALL}


class LetterKinds:
    """r is reasoning and t a tool call, the rest is text."""

    def push(self, token_id: int) -> ReplyKind:
        return KINDS.get(TOKENIZER.decode([token_id], skip_special=True), TEXT)


def reply(*stop: str) -> ReplyText:
    return ReplyText(IncrementalDetokenizer(TOKENIZER, stop), LetterKinds())


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, allow_special=False)


def by_kind(pieces: list[Piece]) -> list[tuple[str, ReplyKind]]:
    stretches = groupby((piece for piece in pieces if piece.text), lambda piece: piece.kind)
    return [("".join(piece.text for piece in stretch), kind) for kind, stretch in stretches]


def test_held_text_is_delivered_as_the_kind_it_came_as() -> None:
    text = reply("rrt.")
    assert [text.push(id) for id in ids("arrtb")] == [
        [Piece("a", TEXT)],
        [Piece("", REASONING)],
        [Piece("", REASONING)],
        [Piece("", TOOL_CALL)],
        [Piece("rr", REASONING), Piece("t", TOOL_CALL), Piece("b", TEXT)],
    ]
    assert text.finish() == [] and text.settled == "arrtb"


def test_a_stop_string_may_begin_in_one_kind_and_end_in_another() -> None:
    text = reply("r.")
    pieces = [piece for id in ids("ar.") for piece in text.push(id)]
    assert by_kind(pieces) == [("a", TEXT)]
    assert (text.matched_stop, text.settled, text.finish()) == ("r.", "a", [])


@given(st.text("rt.a", max_size=20), st.lists(st.text("rt.a", min_size=1, max_size=4), max_size=3))
def test_every_character_has_the_kind_of_its_token_and_a_token_ends_its_pieces(
    said: str, stop: list[str]
) -> None:
    text = reply(*stop)
    pieces = []
    for char in said:
        settled = text.push(*ids(char))
        assert settled[-1].kind is KINDS.get(char, TEXT)
        pieces += settled
        if text.matched_stop is not None:
            break
    pieces += text.finish()
    assert said.startswith(text.settled)
    assert text.matched_stop is not None or text.settled == said
    assert by_kind(pieces) == by_kind([Piece(char, KINDS.get(char, TEXT)) for char in text.settled])


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_what_is_incomplete_at_the_end_is_delivered(stop: tuple[str, ...]) -> None:
    text = reply(*stop)
    pieces = [piece for id in ids("zé")[:2] for piece in text.push(id)]
    assert by_kind(pieces + text.finish()) == [("z\ufffd", TEXT)]
