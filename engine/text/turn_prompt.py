"""The ids that a new turn appends to a conversation: only what is new is tokenised.

Committed ids are never touched.  The new text is what the full render has beyond the committed part:

    render(past without the last reply) + that reply as sampled + its closing token   |   the new text
    \\_______________________________ render(past + new) _____________________________________________/

(both renders with generation prompt).  If the full render does not begin that way, the template rewrites the
past: it strips white space, or drops reasoning.  The committed ids stand; the new text is then what the
render has behind the last reply, and the turn says so.

Content never becomes a control token: look-alikes in new messages are bracketed with two characters that
occur nowhere in them, followed through the template, and encoded as plain text.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from engine.errors import InvalidRequest, InvariantError
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.types import Message

_ROLES = ("system", "user", "assistant")
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode reserves them for uses like this one


@dataclass(frozen=True, slots=True)
class TurnPrompt:
    """What a turn appends before its reply.

    `matches_full_render` speaks of this turn: if it is true for every turn of a conversation, the text of the
    whole history equals the template's render of all messages.
    """

    ids: list[int]
    text: str
    matches_full_render: bool


def sampled_message(tokenizer: Tokenizer, reply_ids: Sequence[int], after: int | None) -> Message:
    """The reply as the history holds it: all its text, less the special token that ended it.

    `after` is the last id of the turn's prompt.
    """
    ended = bool(reply_ids) and reply_ids[-1] in tokenizer.special_ids
    kept = reply_ids[:-1] if ended else reply_ids
    return Message("assistant", tokenizer.decode(kept, skip_special=False, after=after))


def prompt_for_turn(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    past: Sequence[Message],
    last_id: int | None,
    new: Sequence[Message],
    now: float,
) -> TurnPrompt:
    """Render and encode what `new` adds to a conversation.

    `past` holds the committed messages and ends with the last reply (`sampled_message`); `last_id` is the
    last committed id.  They are empty and None for the first turn, whose prompt is the full render.  A reply
    that was cut short is closed as the template closes it.  `now`, in Unix seconds, is the time that a
    template may write into its text; the same for all turns of a conversation, it keeps the past as it was.
    Raises InvalidRequest if the template refuses the messages or gives them no place behind the last reply.
    """
    if past and past[-1].role != "assistant":
        raise InvariantError(f"the past of a turn must end with a reply, not with role {past[-1].role!r}")
    _check(new)
    shield = _Shield.over(new, tokenizer)
    shielded = [replace(message, content=shield.bracket(message.content)) for message in new]

    def render(messages: Sequence[Message]) -> str:
        return template.render(messages, add_generation_prompt=True, now=now)

    full = render([*past, *shielded])
    if shield.found and shield.remove(full) != render([*past, *new]):
        raise shield.refusal()
    closing = (tokenizer.special_text(last_id) or "") if past and last_id is not None else ""
    committed = render(past[:-1]) + past[-1].content + closing if past else ""
    matches = full.startswith(committed)
    if matches:
        text = full[len(committed) :]
    else:
        text = _behind_reply(render, [*past, *shielded], len(past) - 1, closing)
    return TurnPrompt(_encode(tokenizer, shield.split(text), last_id), shield.remove(text), matches)


def _check(new: Sequence[Message]) -> None:
    if not new:
        raise InvalidRequest("the turn has no messages; send at least one")
    for message in new:
        if message.role not in _ROLES:
            raise InvalidRequest(f"role is {message.role!r}; it must be one of {', '.join(_ROLES)}")


def _behind_reply(
    render: Callable[[Sequence[Message]], str], messages: list[Message], reply: int, closing: str
) -> str:
    """What the template writes behind message `reply`, without the `closing` that is committed already."""
    contents = "".join(message.content for message in messages)
    marker = "CommittedReply"
    while marker in contents:
        marker += "0"
    messages[reply] = replace(messages[reply], content=marker)
    _, found, behind = render(messages).rpartition(marker)
    if not found:
        raise InvalidRequest(
            "the model's chat template leaves out the last reply, so nothing can be appended to it;"
            " send token_ids"
        )
    unspaced = behind.lstrip()
    return unspaced.removeprefix(closing) if closing and unspaced.startswith(closing) else behind


def _encode(tokenizer: Tokenizer, pieces: Iterable[tuple[str, bool]], after: int | None) -> list[int]:
    ids: list[int] = []
    for text, is_literal in pieces:
        ids += tokenizer.encode(text, allow_special=not is_literal, after=ids[-1] if ids else after)
    return ids


@dataclass(frozen=True, slots=True)
class _Shield:
    """Brackets around what looks like control tokens in the content of new messages."""

    found: tuple[str, ...]  # distinct look-alikes, in order of appearance
    stretches: dict[
        str, tuple[int, int]
    ]  # content -> where its first look-alike begins and its last one ends
    left: str
    right: str

    @classmethod
    def over(cls, messages: Sequence[Message], tokenizer: Tokenizer) -> "_Shield":
        contents = [message.content for message in messages]
        matches = {content: list(tokenizer.lookalike.finditer(content)) for content in contents}
        found = dict.fromkeys(match[0] for many in matches.values() for match in many)
        stretches = {text: (many[0].start(), many[-1].end()) for text, many in matches.items() if many}
        unused = [char for char in _NONCHARACTERS if not any(char in content for content in contents)]
        if len(unused) < 2:
            raise InvalidRequest(
                "the messages hold nearly all of the noncharacters U+FDD0 to U+FDEF; drop some"
            )
        return cls(tuple(found), stretches, *unused[:2])

    def bracket(self, content: str) -> str:
        if content not in self.stretches:
            return content
        start, end = self.stretches[content]
        return content[:start] + self.left + content[start:end] + self.right + content[end:]

    def remove(self, text: str) -> str:
        return text.replace(self.left, "").replace(self.right, "") if self.found else text

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Pieces of a rendered text in order, each with whether it is to be read as plain text."""
        if not self.found:
            return [(text, False)]
        intact = {content[start:end] for content, (start, end) in self.stretches.items()}
        pieces = re.split(f"{self.left}([^{self.right}]*){self.right}", text)
        template, literal = pieces[::2], pieces[1::2]
        if any(self.left in piece or self.right in piece for piece in template) or not intact.issuperset(
            literal
        ):
            raise self.refusal()
        return [(piece, bool(i % 2)) for i, piece in enumerate(pieces)]

    def refusal(self) -> InvalidRequest:
        return InvalidRequest(
            f"the message contains {', '.join(map(repr, self.found))}, a control token of this model, where"
            " the chat template rewrites the content, so it cannot be kept apart from the template's own;"
            " leave it out"
        )
