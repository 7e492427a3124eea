"""Text in and out for the event loop: rendering and tokenising run on a small pool of threads."""

import asyncio
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from engine.errors import InvalidRequest
from engine.text.chat_template import ChatTemplate
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer
from engine.text.turn_prompt import TurnPrompt, prompt_for_turn, sampled_message
from engine.types import Message, TurnRecord

T = TypeVar("T")


class TextService:
    def __init__(self, tokenizer: Tokenizer, num_threads: int = 2) -> None:
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template is not None else None
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="text")

    def close(self) -> None:
        self._pool.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def encode(self, text: str, *, allow_special: bool) -> list[int]:
        return await self._run(lambda: self.tokenizer.encode(text, allow_special=allow_special))

    async def raw_prompt(self, text: str) -> tuple[int, ...]:
        """A prompt that no template renders, behind the token with which this model's histories begin."""
        return (*self.tokenizer.prompt_prefix_ids, *await self.encode(text, allow_special=True))

    async def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        return await self._run(lambda: self.tokenizer.decode(ids, skip_special=skip_special))

    async def prompt(
        self, past: Sequence[Message], last_id: int | None, new: Sequence[Message], now: float
    ) -> TurnPrompt:
        """What `new` appends to a conversation.  InvalidRequest if the model has no chat template or
        refuses the messages.
        """
        template = self._template
        if template is None:
            raise InvalidRequest("this model has no chat template; send token_ids instead of text")
        return await self._run(lambda: prompt_for_turn(template, self.tokenizer, past, last_id, new, now))

    def detokenizer(self, stop: tuple[str, ...], after: int, min_tokens: int) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.tokenizer, stop, after=after, min_tokens=min_tokens)

    async def past(
        self, system: str | None, turns: Sequence["PastTurn"], tokens: "array[int]"
    ) -> list[Message]:
        """The messages of committed turns that lie in `tokens`; the first brings the system message."""

        def build() -> list[Message]:
            messages: list[Message] = []
            for turn in turns:
                prompt_ids = tokens[turn.first_token : turn.first_reply_token]
                messages += self.sent_messages(
                    None if turn.first_token else system, turn.messages, prompt_ids
                )
                reply_ids = tokens[turn.first_reply_token : turn.end]
                messages.append(sampled_message(self.tokenizer, reply_ids, prompt_ids[-1]))
            return messages

        return await self._run(build)

    def sent_messages(
        self, system: str | None, messages: Sequence[Message], prompt_ids: Sequence[int]
    ) -> list[Message]:
        """What a turn adds to the past before its reply.  One that was given as ids is a user's, and in
        words."""
        if not messages:
            return [Message("user", self.tokenizer.decode(prompt_ids, skip_special=True))]
        return [Message("system", system), *messages] if system else list(messages)


@dataclass(frozen=True, slots=True)
class PastTurn:
    """Where a committed turn lies in the history."""

    messages: tuple[Message, ...]  # empty if it was given as ids
    first_token: int
    first_reply_token: int
    end: int

    @classmethod
    def of(cls, record: TurnRecord) -> "PastTurn":
        first_reply_token = record.first_token + len(record.prompt_ids)
        end = first_reply_token + len(record.reply_ids)
        return cls(record.messages, record.first_token, first_reply_token, end)
