"""Streaming text: no split of the ids may show in it, and nothing behind a stop string ever does."""

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer

PROPERTY = settings(max_examples=200)


def split(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def stream(detokenizer: IncrementalDetokenizer, parts: list[list[int]]) -> str:
    return "".join([detokenizer.push(part) for part in parts]) + detokenizer.finish()


@given(data=st.data())
@PROPERTY
def test_any_split_of_any_ids_adds_up_to_the_decoded_whole(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=20))
    after = data.draw(st.none() | st.integers(0, tokenizer.vocab_size - 1))
    detokenizer = IncrementalDetokenizer(tokenizer, after=after)
    assert stream(detokenizer, split(data, ids)) == tokenizer.decode(ids, skip_special=True, after=after)
    assert detokenizer.num_tokens == len(ids)


@pytest.mark.parametrize("text", ["🙂👩‍👩‍👧‍👦🇫🇷", "你好，世界。日本語のテキスト", "Ω≈ç√∫", "हिन्दी"])
def test_characters_split_over_tokens_arrive_whole(tokenizer, text):
    ids = tokenizer.encode(text, allow_special=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([id]) for id in ids]
    assert "".join(pieces) == text and detokenizer.finish() == ""
    assert all("\ufffd" not in piece for piece in pieces)
    assert "" in pieces  # else no character was split


def test_text_is_delivered_as_soon_as_it_is_settled(tokenizer):
    ids = tokenizer.encode("the cat said hello", allow_special=False)
    detokenizer = IncrementalDetokenizer(tokenizer, ("STOP",))
    for count, id in enumerate(ids, start=1):
        detokenizer.push([id])
        shown = tokenizer.decode(ids[:count], skip_special=True)
        assert not detokenizer._held, f"{shown!r} cannot become a stop string, yet some of it is held"


def test_an_unfinished_character_is_flushed_as_a_replacement(tokenizer):
    ids = tokenizer.encode("🙂", allow_special=False)[:-1]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(ids) == ""
    assert detokenizer.finish() == "\ufffd"


def test_invalid_bytes_delay_nothing_and_hide_no_neighbour(byte_fallback_dir):
    tokenizer = Tokenizer.from_dir(byte_fallback_dir)
    spelled = spell(tokenizer, "你好")
    assert len(spelled) == 6
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(spelled[:2] + spelled[3:]) == "\ufffd好"


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """One id or more for each character, so that every border between characters is a border of tokens."""
    after = tokenizer.encode("x", allow_special=False)[-1]
    return [id for char in text for id in tokenizer.encode(char, allow_special=False, after=after)]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(
    ("text", "stops", "shown", "matched"),
    [
        ("hello the end", ("the",), "hello ", "the"),
        ("hello th", ("the",), "hello th", None),
        ("ababac!", ("abac",), "ab", "abac"),  # the first attempt at the stop fails half way
        ("xabcd", ("abcd", "bc"), "xa", "bc"),  # complete first, although it begins later
        ("xabc", ("bc", "abc"), "x", "abc"),  # both complete at once: the longest
        ("the house", ("house", "ous"), "the h", "ous"),  # also when one token holds both
        ("xab!", ("abc", "b!"), "xa", "b!"),
        ("你好世界", ("好世",), "你", "好世"),
        ("a\n\nUser: b", ("\n\nUser:",), "a", "\n\nUser:"),
        ("stop", ("stop",), "", "stop"),
    ],
)
def test_the_text_ends_before_the_stop_string_wherever_tokens_end(
    tokenizer, text, stops, shown, matched, joined
):
    after = tokenizer.encode("x", allow_special=False)[-1]
    ids = tokenizer.encode(text, allow_special=False, after=after) if joined else spell(tokenizer, text)
    for size in range(1, len(ids) + 1):
        detokenizer = IncrementalDetokenizer(tokenizer, stops, after=after)
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        assert stream(detokenizer, parts) == shown
        assert detokenizer.matched_stop == matched


@given(data=st.data())
@PROPERTY
def test_stop_strings_act_as_on_the_text_read_character_by_character(tokenizer, data):
    pieces = data.draw(st.lists(st.sampled_from(["a", "b", "ab", "ba", "é", " ", "你"]), max_size=12))
    after = tokenizer.encode("x", allow_special=False)[-1]
    ids = [id for piece in pieces for id in tokenizer.encode(piece, allow_special=False, after=after)]
    stops = tuple(data.draw(st.lists(st.text("abé 你", min_size=1, max_size=4), max_size=3)))
    min_tokens = data.draw(st.integers(0, 4))
    settled = [settled_text(tokenizer, ids[:count]) for count in range(len(ids) + 1)]

    expected, matched, num_tokens = "".join(pieces), None, len(ids)
    for count in range(1, len(ids) + 1):
        if count > min_tokens and (hit := first_complete(settled[count], stops, len(settled[count - 1]))):
            (expected, matched), num_tokens = hit, count
            break
    detokenizer = IncrementalDetokenizer(tokenizer, stops, after=after, min_tokens=min_tokens)
    assert stream(detokenizer, split(data, ids)) == expected
    assert (detokenizer.matched_stop, detokenizer.num_tokens) == (matched, num_tokens)


def settled_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    data = b"".join(tokenizer.token_bytes(id, skip_special=True) for id in ids)
    return codecs.getincrementaldecoder("utf-8")().decode(data)


def first_complete(text: str, stops: tuple[str, ...], start: int) -> tuple[str, str] | None:
    """(text before the stop, the stop) at the first end behind `start` where one is complete."""
    for end in range(start + 1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return None


def test_what_follows_a_stop_string_is_ignored(tokenizer):
    ids = spell(tokenizer, "ab!cd")
    detokenizer = IncrementalDetokenizer(tokenizer, ("!",))
    assert detokenizer.push(ids).strip() == "ab"
    before = detokenizer.num_tokens
    assert before == len(spell(tokenizer, "ab!"))
    assert detokenizer.push(ids) == "" and detokenizer.finish() == "" and detokenizer.num_tokens == before


def test_a_stop_string_within_the_minimum_is_shown_and_a_later_one_counts(tokenizer):
    ids = spell(tokenizer, "a!b!c")
    after = spell(tokenizer, "x")[-1]
    first = len(spell(tokenizer, "a!"))
    detokenizer = IncrementalDetokenizer(tokenizer, ("!",), after=after, min_tokens=first)
    assert stream(detokenizer, [ids]) == "a!b"


def test_special_tokens_have_no_text_and_break_no_character(tokenizer):
    smile = tokenizer.encode("🙂", allow_special=False)
    end = tokenizer.control_tokens["<|im_end|>"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([*smile[:2], end, *smile[2:], end]) == "🙂"
