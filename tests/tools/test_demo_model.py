"""The demo model: its dialogues are reproducible and fair, its folder is an ordinary one, it remembers."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest

from tools.demo_model.dialogues import NOT_TOLD, Turn, endless_turns, is_right, judged_turns
from tools.demo_model.evaluate import CONDITIONS, HERE, Score, kinds_of, play_dialogue, play_fresh
from tools.demo_model.player import Player
from tools.demo_model.slots import FORMS, SLOTS, Slot
from tools.demo_model.story import Ask, Tell, facts_story
from tools.demo_model.values import NAMES, PLACES, WORDS, Pool, Split, draw_value

MODEL = HERE / "model"
needs_model = pytest.mark.skipif(not MODEL.exists(), reason="the model folder is not in this checkout")


@pytest.fixture(scope="module")
def player() -> Player:
    return Player(MODEL)


def turns(seed: int, split: Split, num_turns: int = 300) -> list[Turn]:
    return list(islice(endless_turns(Random(seed), split), num_turns))


def test_a_seed_always_makes_the_same_dialogue_and_another_seed_another_one():
    assert turns(1, Split.TRAIN) == turns(1, Split.TRAIN) != turns(2, Split.TRAIN)
    assert facts_story(1, 12, 4) == facts_story(1, 12, 4) != facts_story(2, 12, 4)


def test_no_value_and_no_wording_is_both_learned_and_judged():
    pools: list[Pool] = [NAMES, PLACES, *WORDS.values()]
    pools += [pool for form in FORMS for pool in (form.tells, form.asks)]
    for pool in pools:
        assert pool.train and pool.held_out and not set(pool.train) & set(pool.held_out)


@pytest.mark.parametrize("kind", sorted({slot.kind for slot in SLOTS} - {"list"}))
def test_drawn_values_of_the_two_splits_never_meet(kind: str):
    rng = Random(0)
    trained = {draw_value(rng, kind, Split.TRAIN) for _ in range(3000)}
    judged = {draw_value(rng, kind, Split.HELD_OUT) for _ in range(3000)}
    assert trained and judged and not trained & judged


def test_every_slot_is_told_asked_and_answered_in_words_that_hold_its_value():
    for slot in SLOTS:
        assert all("{v}" in text for text in (*slot.tells.train, *slot.tells.held_out))
        assert slot.fact.endswith("{v}")
        assert "{" not in " ".join((*slot.asks.train, *slot.asks.held_out))


def test_a_question_is_answered_with_the_latest_value_told_or_not_at_all():
    num_recalled = num_unknown = 0
    for seed in range(10):
        latest: dict[Slot, str] = {}
        for turn in turns(seed, Split.TRAIN, 100):
            if turn.category == "recall":
                assert turn.expected is not None and is_right(latest[turn.slots[0]], turn.expected)
                assert is_right(turn.reply, turn.expected)
                num_recalled += 1
            elif turn.category == "not_told":
                assert turn.slots[0] not in latest and is_right(turn.reply, NOT_TOLD)
                num_unknown += 1
            else:
                latest.update(dict.fromkeys(turn.slots, turn.reply))
    assert num_recalled > 50 and num_unknown > 50


def test_judged_questions_reach_two_to_twelve_turns_back():
    distances = set()
    for seed in range(60):
        told: dict[Slot, int] = {}
        for number, turn in enumerate(judged_turns(Random(seed), Split.HELD_OUT, Split.HELD_OUT, 20)):
            if turn.category in ("tell", "change"):
                told.update(dict.fromkeys(turn.slots, number))
            elif turn.category == "recall":
                distances.add(number - told[turn.slots[0]])
    assert set(range(2, 10)) <= distances <= set(range(2, 13))


def test_whole_words_are_judged():
    assert is_right("Your locker code is 4821.", "4821")
    assert not is_right("Your locker code is 48213.", "4821")
    assert not is_right("Your cat is called Misore.", "Miso")


def test_a_story_has_the_turns_and_facts_asked_for_and_one_question_without_an_answer():
    story = facts_story(seed=3, num_turns=14, num_facts=5)
    assert len(story.steps) == 14
    told = [step.text for step in story.steps if isinstance(step, Tell)]
    assert len(told) == 5
    for ask in story.asks:
        assert any(is_right(text, ask.expected) for text in told) == ask.told
    assert [ask.expected for ask in story.asks if not ask.told] == [NOT_TOLD]
    last_tell = max(n for n, step in enumerate(story.steps) if isinstance(step, Tell))
    assert last_tell < min(n for n, step in enumerate(story.steps) if isinstance(step, Ask))


def test_a_story_too_short_for_its_facts_is_refused_with_the_length_it_needs():
    with pytest.raises(ValueError, match="4 facts need at least 9 turns, got 8"):
        facts_story(seed=0, num_turns=8, num_facts=4)


@needs_model
def test_each_turn_renders_as_a_strict_prefix_of_the_next(player: Player):
    messages, before = [{"role": "system", "content": "Be brief."}], ""
    for turn in turns(5, Split.HELD_OUT, 12):
        messages.append({"role": "user", "content": turn.user})
        prompt = player.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt.startswith(before) and len(prompt) > len(before)
        messages.append({"role": "assistant", "content": turn.reply})
        before = player.tokenizer.apply_chat_template(messages, tokenize=False)
        assert before.startswith(prompt + turn.reply)
        ids = player.tokenizer.encode(before, add_special_tokens=False)
        head = player.tokenizer.encode(prompt, add_special_tokens=False)
        assert ids[: len(head)] == head


@needs_model
def test_the_tokenizer_gives_any_text_back(player: Player):
    for text in ("Zoë said: 你好, 🙂!", "a  b\n\tc", "12345 and 7", " 's'"):
        assert player.tokenizer.decode(player.tokenizer.encode(text, add_special_tokens=False)) == text


@needs_model
def test_the_model_remembers_what_it_was_told_and_knows_what_it_was_not(player: Player):
    score = Score()
    for seed in range(6):
        play_dialogue(player, score, CONDITIONS["new dialogues"], seed)
        play_fresh(player, score, CONDITIONS["new dialogues"], seed)
    assert score.asked["recall"] >= 15 and score.asked["not_told"] >= 3
    assert score.shares()["recall"] >= 0.95, score.wrong
    assert score.shares()["not_told"] >= 0.9 and score.shares()["fresh conversation"] == 1, score.wrong


@needs_model
def test_stories_are_answered_rightly_and_a_fresh_conversation_knows_nothing(player: Player):
    for seed in range(2):
        story = facts_story(seed, num_turns=12, num_facts=4)
        player.open()
        for step in story.steps:
            answer = player.say(step.text)
            if isinstance(step, Ask):
                assert is_right(answer, step.expected), (step, answer)
        player.open()
        for ask in story.asks:
            answer = player.say(ask.text)
            assert is_right(answer, NOT_TOLD) and (not ask.told or not is_right(answer, ask.expected))


def test_kinds_of_questions_tell_names_from_numbers():
    kinds = {
        kind
        for seed in range(20)
        for turn in judged_turns(Random(seed), Split.TRAIN, Split.TRAIN, 20)
        if turn.expected is not None
        for kind in kinds_of(turn)
    }
    assert {"recall", "recall name", "recall number", "recall changed", "not_told", "arithmetic"} <= kinds
