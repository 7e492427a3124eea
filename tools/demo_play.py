"""Playing a script: who says what to a server, and what they see of it.

A `Speaker` says its lines either into a conversation that the server keeps, or with the whole history sent
again each time.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from rpc.client import Chat, ContinuoClient, FinishReason, Reply, Turn
from tools.demo_model.phrases import story_sentence
from tools.demo_model.story import NOT_TOLD, Ask, Digress, Tell, facts_story, is_right

SEED = 1
NUM_FRIENDS, NUM_TURNS, NUM_FACTS = 6, 25, 7
NUM_VISITORS, NUM_VISITOR_TURNS, NUM_SENTENCES = 7, 4, 20
MAX_REPLY_TOKENS = 64

Step = Tell | Digress | Ask


@dataclass(frozen=True)
class Exchange:
    """One turn as its speaker saw it."""

    step: Step
    turn: Turn
    ttft_s: float  # from sending to the arrival of the first token

    @property
    def computed_tokens(self) -> int:
        """Token positions that the model was run for."""
        usage = self.turn.usage
        return usage.recomputed_tokens + usage.new_tokens + usage.completion_tokens

    @property
    def tells(self) -> bool:
        return isinstance(self.step, Tell)

    @property
    def asks_for_a_fact(self) -> bool:
        return isinstance(self.step, Ask) and self.step.told

    @property
    def is_right(self) -> bool:
        assert isinstance(self.step, Ask)
        return is_right(self.turn.text, self.step.expected)

    @property
    def says_not_told(self) -> bool:
        return NOT_TOLD in self.turn.text


class Medium(Protocol):
    """How a speaker reaches the server."""

    def say(self, text: str, turn_id: str) -> Reply: ...

    def heard(self, text: str, answer: str) -> None: ...


class Kept:
    """The server keeps the conversation; only what is new is sent."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def say(self, text: str, turn_id: str) -> Reply:
        return self.chat.say(text, turn_id=turn_id, temperature=0.0, max_tokens=MAX_REPLY_TOKENS)

    def heard(self, text: str, answer: str) -> None: ...


class Resent:
    """The server forgets; the whole history is sent every time."""

    def __init__(self, client: ContinuoClient) -> None:
        self._client = client
        self._messages: list[dict[str, str]] = []

    def say(self, text: str, turn_id: str) -> Reply:
        messages = [*self._messages, {"role": "user", "content": text}]
        return self._client.generate(messages=messages, temperature=0.0, max_tokens=MAX_REPLY_TOKENS)

    def heard(self, text: str, answer: str) -> None:
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


class Speaker:
    """Somebody with lines to say."""

    medium: Medium

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.exchanges: list[Exchange] = []

    @property
    def has_more(self) -> bool:
        return len(self.exchanges) < len(self.steps)

    async def say_next(self, on_first_token: Callable[[], None] = lambda: None) -> Exchange:
        """Says the next line.  If that fails, the next call says the same under the same turn id."""
        number = len(self.exchanges)
        step = self.steps[number]
        begin = time.perf_counter()
        ttft_s = None
        reply = self.medium.say(step.text, turn_id=f"turn-{number}")
        async for _ in reply:
            if ttft_s is None:
                ttft_s = time.perf_counter() - begin
                on_first_token()
        turn = await reply
        self.medium.heard(step.text, turn.text)
        if ttft_s is None:  # an empty reply
            ttft_s = time.perf_counter() - begin
        self.exchanges.append(Exchange(step, turn, ttft_s))
        return self.exchanges[-1]


async def play(
    speakers: Sequence[Speaker], num_turns: int | None = None, after_turn: Callable[[], None] = lambda: None
) -> list[Exchange]:
    """Everybody says a line at the same time, then the next; `num_turns` of them, or all that they have."""
    exchanges: list[Exchange] = []
    while num_turns != 0 and (ready := [speaker for speaker in speakers if speaker.has_more]):
        exchanges += await asyncio.gather(*(speaker.say_next() for speaker in ready))
        num_turns = None if num_turns is None else num_turns - 1
        after_turn()
    return exchanges


async def num_comparable(client: ContinuoClient, speaker: Speaker) -> int:
    """How many of the turns have a history that becomes the same tokens again when it is sent as text.

    A model may spell a reply in other tokens than its tokenizer would, and what follows may then differ.
    """
    for number, exchange in enumerate(speaker.exchanges, start=1):
        turn = exchange.turn
        num_spelled = len(turn.token_ids) - (turn.finish_reason is FinishReason.STOP_TOKEN)
        if await client.tokenize(turn.text) != turn.token_ids[:num_spelled]:
            return number
    return len(speaker.exchanges)


@dataclass(frozen=True)
class Cast:
    """Those who tell facts and ask for them, and visitors who only take up memory."""

    friends: tuple[Speaker, ...]
    visitors: tuple[Speaker, ...]
    num_opening: int  # turns of a friend before the visitors come

    @property
    def everybody(self) -> tuple[Speaker, ...]:
        return (*self.friends, *self.visitors)

    @property
    def exchanges(self) -> list[Exchange]:
        return [exchange for speaker in self.everybody for exchange in speaker.exchanges]


def make_cast() -> Cast:
    """The script of the demo: always the same."""
    stories = [facts_story(SEED + number, NUM_TURNS, NUM_FACTS).steps for number in range(NUM_FRIENDS)]
    first_questions = [[isinstance(step, Ask) for step in steps].index(True) for steps in stories]
    rng = Random(SEED)
    visits = [[Digress(_long_story(rng)) for _ in range(NUM_VISITOR_TURNS)] for _ in range(NUM_VISITORS)]
    # Two turns are left: one to come back after the visitors, one to be cut off in.
    return Cast(tuple(map(Speaker, stories)), tuple(map(Speaker, visits)), min(first_questions) - 2)


def make_control() -> list[Speaker]:
    """Strangers who ask every friend's questions without having told anything."""
    return [
        Speaker([step for step in friend.steps if isinstance(step, Ask)]) for friend in make_cast().friends
    ]


def _long_story(rng: Random) -> str:
    return f"Here is a story. {' '.join(story_sentence(rng) for _ in range(NUM_SENTENCES))}"
