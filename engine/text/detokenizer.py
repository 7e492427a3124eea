"""Text of a reply while it is sampled: every character is delivered once, when it can no longer change.

Held back are the bytes of an unfinished UTF-8 character, and the longest end of the text that could still
grow into a stop string.  Whatever the split of the ids, the deliveries add up to `Tokenizer.decode` of all
ids, cut off before the stop string (behind it if it is to stay).
"""

import codecs
from collections.abc import Iterable

from engine.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """One reply's text.  Special tokens have none.

    `matched_stop` is the stop string that ended the text, and `num_tokens` the tokens taken in, the one that
    completed the stop included: what is pushed behind it is ignored and belongs to no reply.  Of several stop
    strings the one that is complete first counts, the longest if two end together, so the split into tokens
    does not matter.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        after: int | None = None,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        """`after` is the last id of the prompt, None if there is none.

        A stop string that is complete within the first `min_tokens` tokens does not count.  With
        `include_stop` the one that ends the text stays in it.
        """
        self._tokenizer = tokenizer
        self._stop = stop
        self._beginnings = frozenset(text[:length] for text in stop for length in range(1, len(text)))
        self._longest_beginning = max(map(len, self._beginnings), default=0)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._drops_space = tokenizer.drops_space(after)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.num_tokens = 0
        self.matched_stop: str | None = None

    @property
    def num_held(self) -> int:
        """Characters that a stop string can still reach."""
        return len(self._held)

    def push(self, ids: Iterable[int]) -> str:
        """Take in sampled ids; returns the text that they settle, often none."""
        settled = []
        for id in ids:
            if self.matched_stop is not None:
                break
            self.num_tokens += 1
            data = self._tokenizer.token_bytes(id, skip_special=True)
            if data and self._drops_space:
                data = data.removeprefix(b" ")
                self._drops_space = False
            settled.append(self._settle(self._utf8.decode(data)))
        return "".join(settled)

    def finish(self) -> str:
        """The reply is over: returns what was held back, unless a stop string has ended the text."""
        if self.matched_stop is not None:
            return ""
        rest = self._settle(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return rest

    def _settle(self, text: str) -> str:
        """Join new text to what is held, and return the part that no stop string can reach any more."""
        if not self._stop or not text:
            return text
        num_held = len(self._held)
        text = self._held + text
        if self.num_tokens > self._min_tokens and (found := self._first_stop(text, num_held)):
            start, self.matched_stop = found
            self._held = ""
            return text[: start + len(self.matched_stop) * self._include_stop]
        length = min(self._longest_beginning, len(text))
        while length and text[-length:] not in self._beginnings:
            length -= 1
        settled = len(text) - length
        self._held = text[settled:]
        return text[:settled]

    def _first_stop(self, text: str, num_old: int) -> tuple[int, str] | None:
        """Where the stop string that is complete first begins, and which one it is.

        Only those count that end behind the first `num_old` characters: the others had their chance.
        """
        ends = []
        for stop in self._stop:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if not ends:
            return None
        _, start, stop = min(ends)
        return start, stop
