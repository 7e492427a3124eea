"""What `TextService` is about to offer, for as long as it does not."""

from collections.abc import Sequence
from typing import Any

from engine.text_service import TextService
from engine.types import ReplyKind, SamplingParams


class OneKind:
    def push(self, token_id: int) -> ReplyKind:
        return ReplyKind.TEXT


def kinds(text: TextService, prompt_ids: Sequence[int]) -> Any:
    make = getattr(text, "kinds", None)
    return OneKind() if make is None else make(prompt_ids)


def detokenizer(text: TextService, sampling: SamplingParams, after: int) -> Any:
    make: Any = text.detokenizer
    if hasattr(text, "kinds"):
        return make(sampling, after)
    return make(sampling.stop or (), after, sampling.min_tokens or 0)


async def bad_word_ids(text: TextService, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    make: Any = getattr(text, "bad_word_ids", None)
    return () if make is None else await make(words)


async def history(text: TextService, *args: Any) -> Any:
    make: Any = getattr(text, "history", None)
    return await make(*args)
