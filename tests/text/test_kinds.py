"""Stretches of a reply are told apart by the marks that the template writes."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken

from engine.text.kinds import KindTracker, Marks
from engine.text.tokenizer import Tokenizer
from engine.text_service import TextService
from engine.types import ReplyKind, SamplingParams

TEXT, REASONING, TOOL_CALL = ReplyKind.TEXT, ReplyKind.REASONING, ReplyKind.TOOL_CALL


def test_marks_belong_to_their_stretch_and_the_prompt_may_open_it(speak):
    tokenizer, _ = speak("reasoning")
    ids = tokenizer.encode("<think>a</think>b", allow_special=True)
    tracker = KindTracker(Marks(tokenizer), ())
    assert [tracker.push(id) for id in ids] == [REASONING] * 3 + [TEXT]
    opened = KindTracker(Marks(tokenizer), tokenizer.encode("<|im_start|><think>", allow_special=True))
    assert [opened.push(id) for id in ids[1:]] == [REASONING] * 2 + [TEXT]


def test_a_mark_that_the_template_does_not_write_is_text(speak):
    tokenizer, _ = speak("ordinary")
    tracker = KindTracker(Marks(tokenizer), ())
    assert {tracker.push(id) for id in tokenizer.encode("<think>a", allow_special=True)} == {TEXT}


def test_a_stretch_of_an_earlier_message_does_not_reach_into_the_reply(speak):
    tokenizer, _ = speak("reasoning")
    prompt = tokenizer.encode("<think>cut<|im_end|>\n<|im_start|>assistant", allow_special=True)
    assert KindTracker(Marks(tokenizer), prompt).push(prompt[-1]) is TEXT


def marked(folder: Path, *marks: str) -> Tokenizer:
    """A tokenizer with these added tokens, and a template that writes them."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return Tokenizer(backend.to_str(), {}, "".join(marks))


@pytest.mark.parametrize("mark", ["[TOOL_CALLS]", "<|python_tag|>"])
def test_a_call_without_an_end_mark_goes_on_to_the_end_of_the_reply(byte_level_dir, mark):
    tokenizer = marked(byte_level_dir, mark)
    tracker = KindTracker(Marks(tokenizer), tokenizer.encode(f"{mark}old<|im_end|>", allow_special=True))
    text = tokenizer.encode("So: ", allow_special=False)
    call = tokenizer.encode(f'{mark}[{{"name": "find"}}]', allow_special=True)
    end = tokenizer.encode("<|im_end|>", allow_special=True)
    kinds = [tracker.push(id) for id in (*text, *call, *end)]
    assert kinds == [TEXT] * len(text) + [TOOL_CALL] * (len(call) + len(end))
    assert tracker.push(text[0]) is TEXT


def test_what_divides_the_inside_of_a_call_does_not_end_it(byte_level_dir):
    tokenizer = marked(byte_level_dir, "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    tracker = KindTracker(Marks(tokenizer), ())
    ids = tokenizer.encode("[TOOL_CALLS]find[CALL_ID]1[ARGS]{}[TOOL_CALLS]find[ARGS]{}", allow_special=True)
    assert {tracker.push(id) for id in ids} == {TOOL_CALL}


def test_calls_and_reasoning_alternate_in_one_reply(byte_level_dir):
    tokenizer = marked(byte_level_dir, "<tool_call>", "</tool_call>", "<think>", "</think>")
    tracker, kinds = KindTracker(Marks(tokenizer), ()), []
    for text, kind in (
        ("<think>a</think>", REASONING),
        ("b", TEXT),
        ("<tool_call>c</tool_call>", TOOL_CALL),
        ("<tool_call>d</tool_call>", TOOL_CALL),
        ("</think>", REASONING),
        ("e", TEXT),
    ):
        kinds += [(tracker.push(id), kind) for id in tokenizer.encode(text, allow_special=True)]
    assert all(found is expected for found, expected in kinds)


@pytest.mark.parametrize(("include_stop", "text"), [(True, "a small cat"), (False, "a small ")])
def test_the_stop_string_stays_in_the_text_if_that_is_asked_for(tokenizer, include_stop, text):
    service = TextService(tokenizer)
    detokenizer = service.detokenizer(SamplingParams(stop=("cat",), include_stop=include_stop), 1)
    ids = tokenizer.encode("a small cat called", allow_special=False, after=1)
    assert "".join(detokenizer.push([id]) for id in ids) + detokenizer.finish() == text
    service.close()


async def test_bad_words_are_spelled_with_and_without_a_space(tokenizer):
    service = TextService(tokenizer)
    runs = await service.bad_word_ids(("cat", " cat", "sea"))
    service.close()
    assert len(runs) == len(set(runs)) == 4
    inside = tokenizer.encode("a", allow_special=False)[-1]
    spelled = [tokenizer.decode(run, skip_special=False, after=inside) for run in runs]
    assert spelled == ["cat", " cat", "sea", " sea"]
