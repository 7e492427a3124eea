"""Text in and out for the event loop: rendering and tokenising run on a small pool of threads."""

import asyncio
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from engine.errors import InvalidRequest, InvariantError
from engine.text.chat_template import ChatTemplate
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.kinds import KindTracker, Marks
from engine.text.next_prompt import TurnPrompt, next_prompt
from engine.text.past import Past, PastTurn
from engine.text.tokenizer import Tokenizer
from engine.types import Message, RewritePolicy, SamplingParams

__all__ = ["Past", "PastTurn", "TextService", "TurnPrompt"]

T = TypeVar("T")


class TextService:
    def __init__(self, tokenizer: Tokenizer, num_threads: int = 2) -> None:
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template is not None else None
        self._marks = Marks(tokenizer)
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

    async def extend_past(self, past: Past, system: str | None, turns: Sequence[PastTurn]) -> None:
        """Take the next committed turns into `past`; `system` goes in front of the first messages.

        A turn that begins before the end of the past takes the place of the tokens there.  If the caller is
        cancelled meanwhile, `past` is as it was.
        """

        def extended() -> Past:
            longer = past.copy()
            for turn in turns:
                longer.extend(self.tokenizer, system, turn)
            return longer

        past.become(await self._run(extended))

    async def prompt(
        self,
        past: Past,
        tokens: "array[int]",
        new: Sequence[Message],
        *,
        system: str | None,
        now: float,
        tools: Sequence[str] = (),
        wants_reply: bool = True,
        policy: RewritePolicy = RewritePolicy.KEEP,
    ) -> TurnPrompt:
        """What a turn with the messages `new` appends to `tokens`, which `past` describes.

        `system` is the conversation's; it is said with its first messages.  Raises InvalidRequest if the
        model has no chat template, or as `next_prompt` does.
        """
        template = self._template
        if template is None:
            raise InvalidRequest("this model has no chat template; send token_ids instead of text")
        if past.num_tokens != len(tokens):
            raise InvariantError(f"the past knows {past.num_tokens} tokens of {len(tokens)}")
        return await self._run(
            lambda: next_prompt(
                template,
                self.tokenizer,
                past,
                new,
                now=now,
                system=system,
                tools=tools,
                wants_reply=wants_reply,
                policy=policy,
            )
        )

    async def history(
        self, system: str | None, messages: Sequence[Message], tools: Sequence[str], now: float
    ) -> list[int]:
        """The ids of a history that was said elsewhere.  Raises InvalidRequest as `prompt` does."""
        empty = array("i")
        prompt = await self.prompt(
            Past(), empty, messages, system=system, now=now, tools=tools, wants_reply=False
        )
        return prompt.ids

    def detokenizer(self, sampling: SamplingParams, after: int) -> IncrementalDetokenizer:
        """For one reply behind token `after`."""
        return IncrementalDetokenizer(
            self.tokenizer,
            sampling.stop or (),
            after=after,
            min_tokens=sampling.min_tokens or 0,
            include_stop=bool(sampling.include_stop),
        )

    def kinds(self, prompt_ids: Sequence[int]) -> KindTracker:
        """For one reply to this prompt."""
        return KindTracker(self._marks, prompt_ids)

    async def bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each text as a reply could spell it, with and without a space before it; each run of ids once.

        A text that is a control token is that token.
        """

        def encoded() -> tuple[tuple[int, ...], ...]:
            encode = self.tokenizer.encode
            inside = encode("a", allow_special=False)[-1]  # texts occur in the middle of a reply
            texts = [space + word.removeprefix(" ") for word in words for space in ("", " ")]
            runs = (tuple(encode(text, allow_special=True, after=inside)) for text in texts)
            return tuple(dict.fromkeys(run for run in runs if run))

        return await self._run(encoded)
