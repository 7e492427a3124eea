"""Generated dialogues in which a user tells facts and asks for them later: the model's lessons and its exams.

Every reply follows from the conversation alone (one right reply, no choice of wording), so that a trained
model is sure of each token and greedy decoding does not hang on rounding.  All randomness comes from the
generator that is passed in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from tools.demo_model import phrases
from tools.demo_model.slots import SLOTS, Slot
from tools.demo_model.values import Pool, Split, add_item, draw_value, join_items, spliced_word, split_items

NOT_TOLD = "something you have not told me"
_NUM_FACTS = (1,) * 9 + (2,)  # in one message


@dataclass(frozen=True)
class Turn:
    """One user message and its only right reply."""

    user: str
    reply: str
    category: (
        str  # "tell", "change", "digress", "arithmetic", "recall" (a told fact is asked for) or "not_told"
    )
    slots: tuple[Slot, ...] = ()  # what the message is about
    expected: str | None = None  # what the reply to a question must contain
    changed: bool = False  # recall: the fact was corrected or added to since it was first told


@dataclass(frozen=True)
class Fact:
    """A told fact: its present value, and the turn in which it got it."""

    value: str
    turn: int
    changed: bool = False


@dataclass(frozen=True)
class Mix:
    """How often a dialogue does what (relative weights), and how long its stories are."""

    tell: float = 3
    ask: float = 3
    ask_unknown: float = 1
    change: float = 0.7
    digress: float = 2
    story: float = 0.3
    arithmetic: float = 0.7
    echo: float = 0.2
    story_sentences: int = 6

    @classmethod
    def draw(cls, rng: Random) -> Mix:
        """The mix of one training dialogue: from question-and-answer sessions to long rambling ones."""
        return cls(
            tell=rng.choice((1, 3, 5)),
            ask=rng.choice((3, 6, 10)),
            ask_unknown=rng.choice((1, 2, 4)),
            change=rng.choice((0.5, 1, 2)),
            digress=rng.choice((0.3, 1, 3)),
            story=rng.choice((0, 0, 0.2, 1)),
            echo=rng.choice((0.2, 1)),
            story_sentences=rng.choice((2, 5, 12)),
        )


class Talk:
    """A conversation being made up: each method says one user message and knows the right reply."""

    def __init__(self, rng: Random, wording: Split, values: Split, noise: float = 0):
        """`noise` is the share of messages that open with words that mean nothing, to be read past."""
        self.rng = rng
        self.wording = wording
        self.values = values
        self.noise = noise
        self.facts: dict[Slot, Fact] = {}
        self.num_turns = 0

    def tell(self, num_facts: int = 1) -> Turn:
        """New facts in one message."""
        slots = tuple(self.rng.sample([slot for slot in SLOTS if slot not in self.facts], num_facts))
        known = [self._learn(slot, self._draw_new(slot)) for slot in slots]
        said = [self._pick(slot.tells).format(v=self.facts[slot].value) for slot in slots]
        user = self._open(phrases.TELL_OPENERS, " and ".join(said)) + "." + self._pick(phrases.TELL_CLOSERS)
        return self._turn(user, f"I will remember that {' and '.join(known)}.", "tell", slots)

    def change(self) -> Turn:
        """A known fact corrected, or a known list made longer."""
        slot = self.rng.choice(list(self.facts))
        if slot.kind == "list" and self.facts[slot].value.count(",") < 3:
            return self._add_item(slot)
        known = self._learn(slot, self._draw_new(slot), changed=True)
        said = self._pick(slot.tells).format(v=self.facts[slot].value)
        user = self._open(phrases.CORRECTIONS, said) + "."
        return self._turn(user, f"Thank you for the correction: {known}.", "change", (slot,))

    def ask(self, slot: Slot) -> Turn:
        """A question for this slot, whether it is known or not."""
        user = self._open(phrases.ASK_OPENERS, self._pick(slot.asks)) + "?" + self._pick(phrases.ASK_CLOSERS)
        fact = self.facts.get(slot)
        reply = _sentence(slot.fact.format(v=fact.value if fact else NOT_TOLD)) + "."
        if fact is None:
            return self._turn(user, reply, "not_told", (slot,), NOT_TOLD)
        return self._turn(user, reply, "recall", (slot,), fact.value, fact.changed)

    def ask_known(self) -> Turn:
        """A question for any of the known facts."""
        return self.ask(self.rng.choice(list(self.facts)))

    def ask_unknown(self) -> Turn:
        """A question for something never told, often about somebody of whom something else is known."""
        unknown = [slot for slot in SLOTS if slot not in self.facts]
        if self.rng.random() < 0.5:
            subjects = {slot.subject for slot in self.facts}
            unknown = [slot for slot in unknown if slot.subject in subjects] or unknown
        return self.ask(self.rng.choice(unknown))

    def digress(self) -> Turn:
        """Small talk, or a word about some topic."""
        if self.rng.random() < 0.4:
            user, reply = self.rng.choice(list(phrases.SMALL_TALK.items()))
            return self._turn(user, reply, "digress")
        topic = self._pick(phrases.TOPICS)
        user = self._pick(phrases.TOPIC_QUESTIONS).format(t=topic)
        return self._turn(user, f"I do not know much about {topic}.", "digress")

    def story(self, max_sentences: int) -> Turn:
        """A long message that says nothing about the user."""
        sentences = [phrases.story_sentence(self.rng) for _ in range(self.rng.randint(1, max_sentences))]
        return self._turn(f"Here is a story. {' '.join(sentences)}", "Thank you for the story.", "digress")

    def echo(self) -> Turn:
        """Words to repeat: exercise in copying what has no meaning."""
        kinds = self.rng.choices(("name", "place", "number", "count", "item"), k=self.rng.randint(1, 6))
        values = [draw_value(self.rng, kind, self.values) for kind in kinds]
        values += [spliced_word(self.rng) for _ in range(self.rng.randint(0, 6))]
        words = " ".join(self.rng.sample(values, len(values)))
        return self._turn(f"{self._pick(phrases.ECHO_OPENERS)} {words}.", f"You said {words}.", "digress")

    def arithmetic(self) -> Turn:
        """A small sum.  Both splits share its wordings: a table of 9 x 9 is learned, not generalised."""
        a, b = sorted((self.rng.randint(1, 9), self.rng.randint(1, 9)), reverse=True)
        sign, happened, result = self.rng.choice((("plus", "bought", a + b), ("minus", "lost", a - b)))
        thing = self.rng.choice(phrases.COUNTABLE)
        user = self.rng.choice(
            (f"What is {a} {sign} {b}?", f"I had {a} {thing} and {happened} {b}. How many {thing} is that?")
        )
        return self._turn(user, f"{a} {sign} {b} is {result}.", "arithmetic", expected=f"is {result}")

    def go_on(self, mix: Mix) -> Turn:
        """The next turn of a dialogue with this mix."""
        moves: list[tuple[float, Callable[[], Turn]]] = [
            (
                mix.tell if len(self.facts) < len(SLOTS) // 3 else 0,
                lambda: self.tell(self.rng.choice(_NUM_FACTS)),
            ),
            (mix.ask if self.facts else 0, self.ask_known),
            (mix.ask_unknown, self.ask_unknown),
            (mix.change if self.facts else 0, self.change),
            (mix.digress, self.digress),
            (mix.story, lambda: self.story(mix.story_sentences)),
            (mix.arithmetic, self.arithmetic),
            (mix.echo, self.echo),
        ]
        weights = [weight for weight, _ in moves]
        _, move = self.rng.choices(moves, weights)[0]
        return move()

    def _add_item(self, slot: Slot) -> Turn:
        items = split_items(self.facts[slot].value)
        items = add_item(self.rng, items, self.values)
        known = self._learn(slot, join_items(items), changed=True)
        user = self._pick(phrases.ADDITIONS).format(i=items[-1], s=slot.subject) + "."
        return self._turn(user, f"Done: {known}.", "change", (slot,))

    def _pick(self, pool: Pool) -> str:
        return self.rng.choice(pool[self.wording])

    def _open(self, openers: Pool, clause: str) -> str:
        """An opener and then the clause, capitalised where a sentence begins."""
        opener = self._pick(openers)
        if self.rng.random() < self.noise:
            words = [spliced_word(self.rng) for _ in range(self.rng.randint(1, 3))]
            noise = _sentence(" ".join(words)) + self.rng.choice((", ", ": ", ". "))
            opener = noise if openers is not phrases.CORRECTIONS else noise + opener
        return opener + (_sentence(clause) if not opener or opener[-2] in ".!?" else clause)

    def _draw_new(self, slot: Slot) -> str:
        """A value that hardly any other fact has (no answer is right by accident); never the present one.

        Few ages are held out, so a long dialogue may run out of fresh ones.
        """
        present = self.facts.get(slot)
        taken = {fact.value for fact in self.facts.values()}
        for _ in range(20):
            if (value := draw_value(self.rng, slot.kind, self.values)) not in taken:
                break
        while present is not None and value == present.value:
            value = draw_value(self.rng, slot.kind, self.values)
        return value

    def _learn(self, slot: Slot, value: str, changed: bool = False) -> str:
        self.facts[slot] = Fact(value, self.num_turns, changed)
        return slot.fact.format(v=value)

    def _turn(
        self,
        user: str,
        reply: str,
        category: str,
        slots: tuple[Slot, ...] = (),
        expected: str | None = None,
        changed: bool = False,
    ) -> Turn:
        self.num_turns += 1
        if self.rng.random() < 0.05:
            user = user.rstrip(".?")  # some people type like this
        return Turn(user, reply, category, slots, expected, changed)


def endless_turns(rng: Random, split: Split, mix: Mix | None = None) -> Iterator[Turn]:
    """A dialogue without end, of a random mix if none is given; cut it where the context is full."""
    talk, mix = Talk(rng, split, split, noise=0.15), mix or Mix.draw(rng)
    while True:
        yield talk.go_on(mix)


def judged_turns(rng: Random, wording: Split, values: Split, num_turns: int) -> Iterator[Turn]:
    """A dialogue to judge a model by: a fact is asked for once, 2-12 turns after it was told or changed."""
    talk, mix = Talk(rng, wording, values), Mix(ask=0)
    asked: set[Fact] = set()
    while talk.num_turns < num_turns:
        due = [s for s, f in talk.facts.items() if f not in asked and 2 <= talk.num_turns - f.turn <= 12]
        if due and rng.random() < 0.4:
            slot = rng.choice(due)
            asked.add(talk.facts[slot])
            yield talk.ask(slot)
        else:
            yield talk.go_on(mix)


def system_prompt(rng: Random, split: Split) -> str | None:
    """What a conversation opens with; mostly nothing."""
    return rng.choice(phrases.SYSTEM_PROMPTS[split]) if rng.random() < 0.3 else None


def is_right(answer: str, expected: str) -> bool:
    """Whether the answer holds the expected words, as whole words ("12" is not in "123")."""
    return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", answer) is not None


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
