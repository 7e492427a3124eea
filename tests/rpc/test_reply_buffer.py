"""Putting a reply together when parts of it come twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc._generated import continuo_pb2 as pb
from rpc.failure import Internal
from rpc.outcome import Delta, ReplyBuffer, ReplyKind


def delta(offset, text, num_tokens=None):
    n = len(text) if num_tokens is None else num_tokens
    return pb.Delta(offset=offset, text=text, token_ids=[ord(c) for c in text[:n].ljust(n, ".")])


def test_deltas_in_order_pass_through_unchanged():
    buffer = ReplyBuffer()
    assert buffer.add(delta(0, "Mi")) == [Delta("Mi", (77, 105))]
    assert buffer.add(delta(2, "so")) == [Delta("so", (115, 111))]
    assert (buffer.text, buffer.finish()) == ("Miso", [])


def test_a_delta_without_text_still_carries_its_tokens():
    assert ReplyBuffer().add(delta(0, "", num_tokens=1)) == [Delta("", (46,))]


def test_text_that_was_held_back_may_follow_without_tokens():
    buffer = ReplyBuffer()
    buffer.add(delta(0, "Mi"))
    assert buffer.add(delta(2, "so", num_tokens=0)) == [Delta("so", ())]
    assert buffer.text == "Miso"


def test_a_repetition_shows_only_what_is_new():
    buffer = ReplyBuffer()
    buffer.add(delta(0, "Mi"))
    assert buffer.add(delta(0, "M")) == []
    assert buffer.add(delta(1, "iso")) == [Delta("so", (115, 111))]
    assert (buffer.text, buffer.finish()) == ("Miso", [])


def test_a_repetition_that_differs_replaces_what_was_shown():
    buffer = ReplyBuffer()
    buffer.add(delta(0, "Miso"))
    assert buffer.add(delta(0, "Tom")) == [Delta("Tom", (84, 111, 109), restarted=True)]
    assert buffer.add(delta(3, "o")) == [Delta("o", (111,))]
    assert buffer.text == "Tomo"


def test_a_repetition_that_ends_sooner_replaces_what_was_shown():
    buffer = ReplyBuffer()
    buffer.add(delta(0, "Miso"))
    assert buffer.add(delta(0, "Mi")) == []
    assert buffer.finish() == [Delta("Mi", (77, 105), restarted=True)]


def test_a_restart_without_any_delta_empties_what_was_shown():
    buffer = ReplyBuffer()
    buffer.add(delta(0, "Miso"))
    buffer.restart()
    assert buffer.finish() == [Delta("", (), restarted=True)]


def test_a_delta_replaces_from_its_offset_on():
    buffer = ReplyBuffer()
    buffer.add(delta(0, "Mi"))
    buffer.add(delta(2, "so"))
    assert buffer.add(delta(2, "le")) == [
        Delta("Mi", (77, 105), restarted=True),
        Delta("le", (108, 101)),
    ]


def test_what_is_new_keeps_its_kind_and_its_logprobs():
    def thought(offset, *ids):
        logprobs = [pb.TokenLogprobs(token_id=id, logprob=-id) for id in ids]
        kind = pb.REPLY_KIND_REASONING
        return pb.Delta(offset=offset, token_ids=ids, text="x" * len(ids), kind=kind, logprobs=logprobs)

    buffer = ReplyBuffer()
    assert [new.kind for new in buffer.add(delta(0, "So"))] == [ReplyKind.TEXT]
    buffer.add(thought(2, 7, 8))
    (new,) = buffer.add(thought(2, 7, 8, 9))
    assert (new.text, new.token_ids, new.kind) == ("x", (9,), ReplyKind.REASONING)
    assert [each.token_id for each in new.logprobs] == [9]
    assert [each.logprob for each in buffer.logprobs] == [-7, -8, -9]


def test_a_reply_that_begins_anew_comes_in_stretches_of_one_kind():
    buffer = ReplyBuffer()
    buffer.add(delta(0, "Miso"))
    buffer.restart()
    assert buffer.add(pb.Delta(offset=0, text="M", token_ids=[77], kind=pb.REPLY_KIND_REASONING)) == []
    first, second = buffer.add(delta(1, "om"))
    assert (first.text, first.kind, first.restarted) == ("M", ReplyKind.REASONING, True)
    assert (second.text, second.kind, second.restarted) == ("om", ReplyKind.TEXT, False)


def test_a_kind_of_a_newer_server_is_shown_as_text():
    (new,) = ReplyBuffer().add(pb.Delta(offset=0, text="a", token_ids=[1], kind=9))
    assert new.kind is ReplyKind.TEXT


@pytest.mark.parametrize("offset", [1, 3])
def test_a_delta_that_begins_inside_another_or_behind_the_end_is_a_bug_of_the_server(offset):
    buffer = ReplyBuffer()
    buffer.add(delta(0, "Mi"))
    with pytest.raises(Internal, match=f"begins at token {offset}; no delta before it ends there"):
        buffer.add(delta(offset, "x"))


@given(
    st.lists(st.tuples(st.text("ab", max_size=6), st.lists(st.integers(0, 6)), st.integers(0, 6)), min_size=1)
)
def test_whoever_obeys_the_deltas_ends_with_the_reply(attempts):
    """Each attempt: a text, where it is cut into deltas, how many arrive before the connection breaks."""
    buffer, shown = ReplyBuffer(), ""
    for n, (text, cuts, num_arrive) in enumerate(attempts):
        borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
        pieces = [delta(a, text[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
        if n > 0:
            buffer.restart()
        last = n == len(attempts) - 1
        news = [new for piece in (pieces if last else pieces[:num_arrive]) for new in buffer.add(piece)]
        for new in (*news, *(buffer.finish() if last else ())):
            shown = new.text if new.restarted else shown + new.text
    assert shown == buffer.text == attempts[-1][0]
