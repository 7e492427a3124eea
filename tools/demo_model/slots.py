"""What a user can tell, and the wordings in which it is told, asked for and answered.

A form covers many subjects ("my cat is called ...", "my sister is called ..."); a slot is a form about one
subject and holds one value at a time.  The assistant has one way to state a fact, with the value at its end:
acknowledging, recalling and not knowing all begin alike, and differ only in what there is to copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.demo_model.values import COUNTED, EVENTS, LISTS, NUMBERED, PEOPLE, PETS, THINGS, WORDS, Pool


@dataclass(frozen=True, eq=False)  # each is the only one about its subject, and a key of many dicts
class Slot:
    """One thing that can be known; in its clauses `{v}` is where the value goes."""

    subject: str
    kind: str  # which values fit: see `values.draw_value`
    tells: Pool
    asks: Pool
    fact: str  # as the assistant says it, value last: "the name of your cat is {v}"


@dataclass(frozen=True)
class Form:
    """The wordings of many alike slots; `{s}` is where the subject goes."""

    kind: str
    subjects: str
    tells: Pool
    asks: Pool
    fact: str

    def slots(self) -> list[Slot]:
        """One slot per subject; favourite colours take colours, all else takes values of the form's kind."""
        return [self._about(subject) for subject in self.subjects.split("|")]

    def _about(self, subject: str) -> Slot:
        def fill(text: str) -> str:
            return text.replace("{s}", subject)

        def fill_pool(pool: Pool) -> Pool:
            return Pool(tuple(map(fill, pool.train)), tuple(map(fill, pool.held_out)))

        kind = subject if self.kind == "favourite" else self.kind
        return Slot(subject, kind, fill_pool(self.tells), fill_pool(self.asks), fill(self.fact))


FORMS = (
    Form(
        "name",
        "I",
        Pool.of(
            "my name is {v}|I am called {v}|people call me {v}|my own name is {v}", "everyone calls me {v}"
        ),
        Pool.of("what is my name|what am I called|who am I|do you know my name", "can you tell me my name"),
        "your name is {v}",
    ),
    Form(
        "place",
        "I",
        Pool.of(
            "I live in {v}|my home is in {v}|I have a house in {v}|my house is in {v}", "I am living in {v}"
        ),
        Pool.of("where do I live|where is my home|do you know where I live", "can you tell me where I live"),
        "your home is {v}",
    ),
    Form(
        "place",
        "I",
        Pool.of("I was born in {v}|my place of birth is {v}|I come from {v}", "my birthplace is {v}"),
        Pool.of(
            "where was I born|what is my place of birth|where do I come from", "do you know where I was born"
        ),
        "your birthplace is {v}",
    ),
    Form(
        "place",
        "I",
        Pool.of(
            "I work in {v}|my office is in {v}|I have a job in {v}|my job is in {v}", "I am working in {v}"
        ),
        Pool.of("where do I work|where is my office|where is my job", "do you know where I work"),
        "your workplace is {v}",
    ),
    Form(
        "age",
        "I",
        Pool.of("I am {v} years old|my age is {v}|I am aged {v}|my own age is {v}", "I turned {v} years old"),
        Pool.of("how old am I|what is my age|do you know how old I am", "can you tell me how old I am"),
        "your age is {v}",
    ),
    Form(
        "name",
        f"{PEOPLE}|{PETS}|{THINGS}",
        Pool.of(
            "my {s} is called {v}|my {s}'s name is {v}|the name of my {s} is {v}|I have a {s} called {v}|"
            "I have a {s} named {v}|my {s} goes by the name {v}",
            "my {s} is named {v}|I have a {s} whose name is {v}|the name my {s} has is {v}",
        ),
        Pool.of(
            "what is my {s} called|what is my {s}'s name|what is the name of my {s}|"
            "what name does my {s} have|do you know my {s}'s name|can you tell me what my {s} is called",
            "do you know what my {s} is called|can you tell me my {s}'s name|which name does my {s} have",
        ),
        "the name of your {s} is {v}",
    ),
    Form(
        "age",
        f"{PEOPLE}|{PETS}",
        Pool.of(
            "my {s} is {v} years old|my {s}'s age is {v}|the age of my {s} is {v}|my {s} is aged {v}",
            "my {s} has the age of {v}|my {s} turned {v} years old",
        ),
        Pool.of(
            "how old is my {s}|what is my {s}'s age|what is the age of my {s}|do you know how old my {s} is",
            "can you tell me how old my {s} is|what age is my {s}",
        ),
        "the age of your {s} is {v}",
    ),
    Form(
        "place",
        PEOPLE,
        Pool.of(
            "my {s} lives in {v}|my {s}'s home is in {v}|the home of my {s} is in {v}|"
            "my {s} has a house in {v}",
            "my {s} has a home in {v}|my {s} is living in {v}",
        ),
        Pool.of(
            "where does my {s} live|where is my {s}'s home|in which place does my {s} live|"
            "do you know where my {s} lives",
            "can you tell me where my {s} lives|where is the home of my {s}",
        ),
        "the home of your {s} is {v}",
    ),
    Form(
        "place",
        EVENTS,
        Pool.of(
            "my {s} is in {v}|my {s} takes place in {v}|the place of my {s} is {v}|I go to {v} for my {s}",
            "my {s} will be in {v}|the place for my {s} is {v}",
        ),
        Pool.of(
            "where is my {s}|where does my {s} take place|what is the place of my {s}|"
            "do you know where my {s} is",
            "can you tell me where my {s} is|in which place is my {s}",
        ),
        "the place of your {s} is {v}",
    ),
    Form(
        "number",
        NUMBERED,
        Pool.of(
            "my {s} is {v}|I have {v} as my {s}|the {s} I have is {v}|they gave me {s} {v}|"
            "I was given the {s} {v}",
            "I got the {s} {v}|the {s} they gave me is {v}",
        ),
        Pool.of(
            "what is my {s}|which {s} do I have|do you know my {s}|what {s} was I given",
            "can you tell me my {s}|what {s} do I have",
        ),
        "your {s} is {v}",
    ),
    Form(
        "count",
        COUNTED,
        Pool.of(
            "I own {v} {s}|I have {v} {s} at home|there are {v} {s} in my house",
            "I have {v} {s} in my house|at home I own {v} {s}",
        ),
        Pool.of(
            "how many {s} do I own|how many {s} do I have|do you know how many {s} I own",
            "can you tell me how many {s} I own|how many {s} are in my house",
        ),
        "the number of your {s} is {v}",
    ),
    Form(
        "favourite",
        "|".join(kind for kind in WORDS if kind != "item"),
        Pool.of(
            "my favourite {s} is {v}|the {s} I like best is {v}|I like {v} more than any other {s}|"
            "{v} is my favourite {s}|of every {s} I love {v} most",
            "the {s} I love most is {v}|I love {v} more than any other {s}",
        ),
        Pool.of(
            "what is my favourite {s}|which {s} do I like best|what {s} do I love most|"
            "do you know my favourite {s}",
            "can you tell me my favourite {s}|which {s} is my favourite",
        ),
        "your favourite {s} is {v}",
    ),
    Form(
        "list",
        LISTS,
        Pool.of(
            "my {s} is {v}|on my {s} are {v}|I put {v} on my {s}|my {s} has {v} on it",
            "there are {v} on my {s}|I have {v} on my {s}",
        ),
        Pool.of(
            "what is on my {s}|what did I put on my {s}|do you know what is on my {s}|what does my {s} say",
            "can you tell me what is on my {s}|which things are on my {s}",
        ),
        "your {s} is {v}",
    ),
)

SLOTS: tuple[Slot, ...] = tuple(slot for form in FORMS for slot in form.slots())
