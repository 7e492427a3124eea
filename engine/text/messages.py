"""Messages as chat templates see them, and brackets around what looks like control tokens in them.

What a client sends never becomes a control token: neither a content nor a name, a tool_call_id, a string
or key inside tool_calls, or one inside the conversation's tools.  Each look-alike is bracketed with two
characters that occur nowhere in what was sent, followed through the template, and encoded as plain text.

Replies differ in two ways, as templates take them apart by what the model wrote.  The marks of reasoning and
tool calls in an assistant message are such marks, whoever sent it.  And in a reply that was sampled here only
look-alikes that the model spelled out are bracketed: control tokens that it sampled stay.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from engine.text.tokenizer import Tokenizer
from engine.types import Message

Stretches = tuple[tuple[int, int], ...]  # (start, end) in a text, in order
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode reserves them for uses like this one


@dataclass(frozen=True, slots=True)
class Said:
    """A message in the form that `transformers` gives to templates, looked through once for all its renders.

    `literal` are the stretches of its content that look like control tokens and are none.
    """

    value: dict[str, Any]
    literal: Stretches
    has_lookalikes: bool  # in its content or elsewhere

    @classmethod
    def sent(cls, tokenizer: Tokenizer, message: Message, place: int) -> "Said":
        """Raises InvalidRequest, with the message's place, if a tool call is no JSON object."""
        value = as_value(message, place)
        is_reply = message.role == "assistant"
        pattern = tokenizer.lookalike_in_reply if is_reply else tokenizer.lookalike
        literal = tuple(match.span() for match in pattern.finditer(message.content))
        return cls(value, literal, bool(literal) or _holds(tokenizer.lookalike, _fields(value)))

    @classmethod
    def sampled(cls, tokenizer: Tokenizer, message: Message, ids: Sequence[int], after: int | None) -> "Said":
        """A reply whose text these ids spell behind `after`."""
        literal = tuple(match.span() for match in tokenizer.lookalike_in_reply.finditer(message.content))
        if literal:
            controls = set(tokenizer.control_tokens.values())
            own = set()
            for i, id in enumerate(ids):
                if id in controls:
                    start = len(tokenizer.decode(ids[:i], skip_special=False, after=after))
                    own.add((start, start + len(tokenizer.decode([id], skip_special=False))))
            literal = tuple(span for span in literal if span not in own)
        return cls(as_value(message, 0), literal, bool(literal))


def as_value(message: Message, place: int) -> dict[str, Any]:
    """The message as a template sees it: what is not set is not there.  Raises InvalidRequest as `sent`."""
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


def tools_as_values(tools: Sequence[str]) -> list[Any] | None:
    """The conversation's tools in that form; None if there are none.  Raises InvalidRequest as above."""
    return [_json_object(tool, f"tools[{i}]") for i, tool in enumerate(tools)] or None


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

    `found` holds the distinct look-alikes; without any, nothing is bracketed.
    """

    left: str
    right: str
    found: frozenset[str]
    messages: list[dict[str, Any]]
    tools: list[Any] | None

    @classmethod
    def over(cls, said: Sequence[Said], tools: list[Any] | None, lookalike: re.Pattern[str]) -> "Shield":
        """Raises InvalidRequest if no two characters are left for brackets."""
        values = [message.value for message in said]
        if not any(message.has_lookalikes for message in said) and not _holds(lookalike, tools):
            return cls("", "", frozenset(), values, tools)
        left, right = unused_characters(2, values, tools)
        found: set[str] = set()

        def enclose(text: str) -> str:
            found.add(text)
            return left + text + right

        def bracket(text: str) -> str:
            return lookalike.sub(lambda match: enclose(match[0]), text)

        guarded = []
        for message in said:
            content = message.value["content"]
            for start, end in reversed(message.literal):
                content = content[:start] + enclose(content[start:end]) + content[end:]
            guarded.append({**message.value, "content": content, **_mapped(_fields(message.value), bracket)})
        tools = _mapped(tools, bracket)
        return cls(left, right, frozenset(found), guarded, tools)

    def remove(self, text: str) -> str:
        return text.replace(self.left, "").replace(self.right, "")

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


def unused_characters(count: int, *values: Any) -> list[str]:
    """That many characters that occur in none of the values.  Raises InvalidRequest if there are not."""
    text = json.dumps(values, ensure_ascii=False)
    unused = [char for char in _NONCHARACTERS if char not in text][:count]
    if len(unused) < count:
        raise InvalidRequest("the messages hold nearly all of the noncharacters U+FDD0 to U+FDEF; drop some")
    return unused


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    """What a client sent of a message beside its role and content."""
    return {name: part for name, part in value.items() if name not in ("role", "content")}


def _holds(lookalike: re.Pattern[str], value: Any) -> bool:
    return any(lookalike.search(text) for text in _strings(value))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, change) for part in value]
    return value
