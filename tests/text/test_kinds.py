"""Stretches of a reply are told apart by the marks that the template writes."""

import pytest

from engine.text.kinds import KindTracker, Marks
from engine.text_service import TextService
from engine.types import ReplyKind, SamplingParams

TEXT, REASONING = ReplyKind.TEXT, ReplyKind.REASONING


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
