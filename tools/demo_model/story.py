"""A script for demonstrations: what a user says who tells facts, digresses, and asks for the facts.

The wordings are those that the model was trained on, the values are ones that it has never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tools.demo_model.dialogues import NOT_TOLD, Talk, Turn, is_right
from tools.demo_model.values import Split

__all__ = ["NOT_TOLD", "Ask", "Digress", "Story", "Tell", "facts_story", "is_right"]


@dataclass(frozen=True)
class Tell:
    """The user tells one fact."""

    text: str


@dataclass(frozen=True)
class Digress:
    """The user says something that holds no fact."""

    text: str


@dataclass(frozen=True)
class Ask:
    """The user asks for a fact; `is_right(answer, expected)` judges the answer.

    Where the fact was never told (`told` is false, or the conversation is a fresh one) NOT_TOLD is expected.
    """

    text: str
    expected: str
    told: bool


@dataclass(frozen=True)
class Story:
    """What the user says, turn by turn."""

    steps: tuple[Tell | Digress | Ask, ...]

    @property
    def asks(self) -> tuple[Ask, ...]:
        """The questions alone: what a fresh conversation is asked as a control."""
        return tuple(step for step in self.steps if isinstance(step, Ask))


def facts_story(seed: int, num_turns: int, num_facts: int) -> Story:
    """A story of `num_turns` turns: facts told between digressions, then each asked for, and one never told.

    Raises ValueError if the turns do not suffice.
    """
    num_digressions = num_turns - 2 * num_facts - 1
    if num_facts < 1 or num_digressions < 0:
        raise ValueError(
            f"{num_facts} facts need at least {2 * num_facts + 1} turns, got {num_turns}; "
            "ask for at least one fact and for more turns"
        )
    rng = Random(seed)
    talk = Talk(rng, wording=Split.TRAIN, values=Split.HELD_OUT)
    num_early = num_digressions // 2
    early = ["tell"] * num_facts + ["digress"] * num_early
    rng.shuffle(early)
    opening = [Tell(talk.tell().user) if what == "tell" else Digress(talk.digress().user) for what in early]
    questions = [talk.ask(slot) for slot in talk.facts] + [talk.ask_unknown()]
    late = ["ask"] * len(questions) + ["digress"] * (num_digressions - num_early)
    rng.shuffle(questions)
    rng.shuffle(late)
    closing = [_ask(questions.pop()) if what == "ask" else Digress(talk.digress().user) for what in late]
    return Story((*opening, *closing))


def _ask(turn: Turn) -> Ask:
    assert turn.expected is not None
    return Ask(turn.user, turn.expected, told=turn.category == "recall")
