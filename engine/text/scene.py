"""What a chat template writes for one turn: the whole conversation, and what comes behind its past.

Where the template does not render the past as it was committed, nothing in the text itself says where the
new turn begins.  So messages are rendered with a marker for their content: what is behind it is new.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.errors import InvalidRequest
from engine.text.chat_template import ChatTemplate
from engine.text.messages import Said, Shield, unused_characters
from engine.text.tokenizer import Tokenizer

Pieces = list[tuple[str, bool]]  # (text, whether it is plain text even where it looks like a control token)
Values = Sequence[dict[str, Any]]  # messages


@dataclass(frozen=True)
class Scene:
    """The messages `said`, of which the first `num_past` are committed, and the conversation's `tools`.

    `asks_for_reply` is whether the new ones are to be answered.  Renders keep the brackets of `shield`.
    Whatever renders raises InvalidRequest if the template refuses the messages.
    """

    template: ChatTemplate
    tokenizer: Tokenizer
    said: Sequence[Said]
    num_past: int
    tools: list[Any] | None
    asks_for_reply: bool
    now: float  # Unix seconds

    @cached_property
    def shield(self) -> Shield:
        return Shield.over(self.said, self.tools, self.tokenizer.lookalike)

    def whole(self) -> str:
        """All messages.  Raises InvalidRequest if the template reads look-alikes of control tokens."""
        if self.shield.found:
            plain = self.template.render_values(
                [message.value for message in self.said],
                self.tools,
                add_generation_prompt=self.asks_for_reply,
                now=self.now,
            )
            if self.shield.remove(self._everything) != plain:
                raise self.shield.refusal()
        return self._everything.removesuffix(self._passing_end)

    def first(self, num_messages: int, asks_for_reply: bool) -> str:
        """The first messages alone."""
        messages = self.shield.messages[:num_messages]
        text = self._render(messages, asks_for_reply)
        return text if asks_for_reply else text.removesuffix(self._passing(messages, text))

    def behind_past(self) -> str:
        """What the template writes behind the content of the last committed message.

        Raises InvalidRequest if the template leaves out the new messages.
        """
        behind = self._behind(self.shield.messages, self.num_past - 1, self.asks_for_reply)
        if behind is None:
            behind = self._behind_what_is_shown()
        return behind.removesuffix(self._passing_end)

    def closing(self, behind: str) -> str:
        """What of the text behind the past is written there whether or not new messages follow."""
        past = self.shield.messages[: self.num_past]
        end = None
        with suppress(InvalidRequest):
            end = self._behind(past, self.num_past - 1, False)
        return behind if end is None else behind[: common_length(behind, end)]

    def spelled(self, text: str) -> Pieces:
        """A render as tokens will spell it.  Raises InvalidRequest if the template took brackets apart."""
        spell = self.tokenizer.as_spelled
        return [(spell(part, allow_special=not raw), raw) for part, raw in self.shield.split(text)]

    @cached_property
    def _everything(self) -> str:
        return self._render(self.shield.messages, self.asks_for_reply)

    @cached_property
    def _passing_end(self) -> str:
        return "" if self.asks_for_reply else self._passing(self.shield.messages, self._everything)

    def _render(self, messages: Values, asks_for_reply: bool) -> str:
        return self.template.render_values(
            messages, self.shield.tools, add_generation_prompt=asks_for_reply, now=self.now
        )

    @cached_property
    def _marker(self) -> str:
        values = [message.value for message in self.said]
        return unused_characters(3, values, self.tools)[2]  # the first two are brackets

    def _behind(self, messages: Values, place: int, asks_for_reply: bool) -> str | None:
        """What is written behind the content of one message, None if the template leaves that out."""
        marked = {**messages[place], "content": self._marker}
        text = self._render([*messages[:place], marked, *messages[place + 1 :]], asks_for_reply)
        _, found, behind = text.rpartition(self._marker)
        return behind if found else None

    def _passing(self, messages: Values, text: str) -> str:
        """The end of `text`, the render of messages that ask for no reply, that it loses as the chat goes on.

        Some templates end it with a token that no longer chat has, or with a header for the next reply, or
        close a run of tool results that the next result would join.
        """
        longer = self._going_on(messages)
        num_lasting = min((common_length(text, other) for other in longer), default=len(text))
        end = self._behind(messages, len(messages) - 1, False) if num_lasting < len(text) else None
        if end is None or num_lasting < len(text) - len(end):  # then it rewrites the message itself
            return ""
        place = num_lasting - (len(text) - len(end))
        for word in re.finditer(rf"{self.tokenizer.lookalike.pattern}|\w+", end):
            if word.start() < place < word.end():
                place = word.start()
        return end[place:]

    def _going_on(self, messages: Values) -> Iterator[str]:
        """Renders with one message more, as far as the template accepts one."""
        if messages[-1]["role"] == "tool":
            with suppress(InvalidRequest):
                yield self._render([*messages, messages[-1]], False)
        for role in ("user", "assistant"):
            with suppress(InvalidRequest):
                yield self._render([*messages, {"role": role, "content": "."}], False)
                return

    def _behind_what_is_shown(self) -> str:
        """What is written behind the last committed message that the template shows.

        It leaves out the ones behind that, or writes something else in their place, which is left out as well
        if the template accepts the messages without them.
        """
        messages, num_past = self.shield.messages, self.num_past
        new = range(num_past, len(messages))
        if all(self._behind(messages, place, self.asks_for_reply) is None for place in new):
            raise InvalidRequest(
                "the model's chat template leaves out the new messages, so nothing can be appended; send"
                " token_ids"
            )
        marked = [
            {**message, "content": f"{self._marker}{place}{self._marker}"}
            for place, message in enumerate(messages[:num_past])
        ]
        num_shown, behind = self._shown([*marked, *messages[num_past:]])
        with suppress(InvalidRequest):
            _, without = self._shown([*marked[:num_shown], *messages[num_past:]])
            behind = behind[len(behind) - common_length(behind[::-1], without[::-1]) :]
        return behind

    def _shown(self, messages: Values) -> tuple[int, str]:
        """The number of the last marked message that is shown, from 1, and what is written behind it."""
        text = self._render(messages, self.asks_for_reply)
        number, end = 0, 0
        for found in re.finditer(rf"{self._marker}(\d+){self._marker}", text):
            number, end = int(found[1]) + 1, found.end()
        return number, text[end:]


def common_length(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning.

    Halves the distance: comparing slices is faster than comparing characters.
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
