"""Messages as chat templates see them, and brackets around what looks like control tokens in them.

What a client sends never becomes a control token: neither a content nor a name, a tool_call_id, a string
or key inside tool_calls, or one inside the conversation's tools.  Each look-alike is bracketed with two
characters that occur nowhere in what was sent, followed through the template, and encoded as plain text.
In a reply only look-alikes that the model spelled out are bracketed: control tokens that it sampled stay.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from engine.types import Message

Stretches = tuple[tuple[int, int], ...]  # (start, end) in a text, in order
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode reserves them for uses like this one


def as_values(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages in the form that `transformers` gives to templates: what is not set is not there.

    Raises InvalidRequest, with the message's place, if a tool call is no JSON object.
    """
    return [_as_value(message, place) for place, message in enumerate(messages)]


def tools_as_values(tools: Sequence[str]) -> list[Any] | None:
    """The conversation's tools in that form; None if there are none.  Raises InvalidRequest as above."""
    return [_json_object(tool, f"tools[{i}]") for i, tool in enumerate(tools)] or None


def _as_value(message: Message, place: int) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        value["name"] = message.name
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        value["tool_calls"] = [
            _json_object(call, f"tool_calls[{i}] of message {place}")
            for i, call in enumerate(message.tool_calls)
        ]
    return value


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where} is not JSON: {error}; send one JSON object") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} is JSON but no object: {text[:40]}; send one JSON object")
    return value


@dataclass(frozen=True, slots=True)
class Shield:
    """Brackets around look-alikes: put into messages and tools, taken out of what the template made of them.

    `found` holds the distinct look-alikes.
    """

    left: str
    right: str
    found: frozenset[str]
    messages: list[dict[str, Any]]
    tools: list[Any] | None

    @classmethod
    def over(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None,
        lookalike: re.Pattern[str],
        spelled: Mapping[int, Stretches],
    ) -> "Shield":
        """`spelled` has the replies among the messages: by index, the look-alikes that the model spelled.

        Raises InvalidRequest if no two characters are left for brackets.
        """
        texts = "".join([text for message in messages for text in _strings(message)] + [*_strings(tools)])
        unused = [char for char in _NONCHARACTERS if char not in texts]
        if len(unused) < 2:
            raise InvalidRequest(
                "the messages hold nearly all of the noncharacters U+FDD0 to U+FDEF; drop some"
            )
        left, right = unused[:2]
        found: set[str] = set()

        def enclose(match: re.Match[str]) -> str:
            found.add(match[0])
            return left + match[0] + right

        def bracket(text: str) -> str:
            return lookalike.sub(enclose, text)

        guarded = []
        for i, message in enumerate(messages):
            if i in spelled:
                text = message["content"]
                found.update(text[start:end] for start, end in spelled[i])
                guarded.append({**message, "content": _enclosed(text, spelled[i], left, right)})
            else:
                guarded.append({**_mapped(message, bracket), "role": message["role"]})
        return cls(left, right, frozenset(found), guarded, _mapped(tools, bracket))

    def remove(self, text: str) -> str:
        return text.replace(self.left, "").replace(self.right, "") if self.found else text

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Pieces of a rendered text in order, each with whether it is to be read as plain text.

        Raises InvalidRequest if the template has taken brackets apart.
        """
        if not self.found:
            return [(text, False)]
        pieces = re.split(f"{self.left}([^{self.right}]*){self.right}", text)
        template, literal = pieces[::2], pieces[1::2]
        torn = any(self.left in piece or self.right in piece for piece in template)
        if torn or not self.found.issuperset(literal):
            raise self.refusal()
        return [(piece, bool(i % 2)) for i, piece in enumerate(pieces)]

    def refusal(self) -> InvalidRequest:
        return InvalidRequest(
            f"the conversation contains {', '.join(map(repr, sorted(self.found)))}, a control token of this"
            " model, where the chat template rewrites or reads what is sent, so it cannot be kept apart from"
            " the template's own; leave it out"
        )


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, change) for part in value]
    return value


def _enclosed(text: str, stretches: Stretches, left: str, right: str) -> str:
    for start, end in reversed(stretches):
        text = text[:start] + left + text[start:end] + right + text[end:]
    return text
