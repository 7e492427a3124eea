"""The ids that a new turn appends to a conversation: only what is new is tokenised.

Every turn renders all messages and checks that the render begins with the text that the committed tokens
spell; the rest of it is the turn's prompt.  If it does not, the template rewrites the past: it strips white
space, or drops reasoning.  Under KEEP the committed tokens stand, and the turn appends what the template
writes behind the last message; under STRIP it begins at the last token before the divergence and appends all
that the render has from there.

Texts are compared as tokens spell them (`Tokenizer.as_spelled`): some tokenizers normalise, and some control
tokens swallow the white space beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from engine.errors import InvalidRequest
from engine.text.chat_template import ChatTemplate
from engine.text.messages import Shield, as_values, tools_as_values
from engine.text.past import Past, Segment
from engine.text.tokenizer import Tokenizer
from engine.types import Message, RewritePolicy

_ROLES = ("system", "user", "assistant", "tool")
Pieces = list[tuple[str, bool]]  # (text, whether it is plain text even where it looks like a control token)


@dataclass(frozen=True, slots=True)
class TurnPrompt:
    """What a turn puts behind the first `first_token` committed tokens.

    `text` is what `ids` spell.  `rewritten_from` is the first committed token from which the template now
    renders the past differently, None if the whole history reads as the template would write it.
    """

    ids: list[int]
    text: str
    first_token: int
    rewritten_from: int | None


def next_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    past: Past,
    new: Sequence[Message],
    *,
    now: float,
    tools: Sequence[str] = (),
    wants_reply: bool = True,
    policy: RewritePolicy = RewritePolicy.KEEP,
) -> TurnPrompt:
    """Render all, encode what `new` adds to `past`.

    `now`, in Unix seconds, is the time that a template may write into its text; the same for all turns of a
    conversation, it keeps the past as it was.  A reply that was cut short is closed as the template closes
    it.  Without `wants_reply` the prompt holds no more than what a prompt with a reply begins with.
    Raises InvalidRequest if the messages are malformed, the template refuses them or gives them no place.
    """
    _check(new)
    values, tool_values = as_values([*past.messages, *new]), tools_as_values(tools)
    shield = Shield.over(values, tool_values, tokenizer.lookalike, past.spelled)
    scene = _Scene(template, tokenizer, shield, values, tool_values, now)
    place = scene.after(past, policy, wants_reply)
    ids = place.ids(tokenizer)
    if not wants_reply:
        # Some templates end a chat that asks for no reply with a token that no longer chat has.
        asking = scene.after(past, policy, True)
        ids = _common(ids, asking.ids(tokenizer)) or ids
    text = "".join(part for _, part in Segment(tuple(ids), place.last_id, False, 0, 0).spelled(tokenizer))
    return TurnPrompt(ids, text, place.first_token, place.rewritten_from)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a turn begins, and what it writes there."""

    pieces: Pieces
    first_token: int
    last_id: int | None  # before it
    rewritten_from: int | None

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        ids: list[int] = []
        for text, is_literal in self.pieces:
            after = ids[-1] if ids else self.last_id
            ids += tokenizer.encode(text, allow_special=not is_literal, after=after)
        return ids


@dataclass(frozen=True, slots=True)
class _Scene:
    """All that one turn's renders have in common."""

    template: ChatTemplate
    tokenizer: Tokenizer
    shield: Shield
    values: list[dict[str, Any]]
    tools: list[Any] | None
    now: float

    def after(self, past: Past, policy: RewritePolicy, asks: bool) -> _Place:
        full = self._render(self.shield.messages, asks)
        if self.shield.found and self.shield.remove(full) != self.template.render_values(
            self.values, self.tools, add_generation_prompt=asks, now=self.now
        ):
            raise self.shield.refusal()
        pieces = self._spelled(full)
        given_text = ""
        if past.given.messages:
            given = self._render(self.shield.messages[: past.given.messages], past.given.asks_for_reply)
            given_text = _text(self._spelled(given))
        committed = given_text + past.text[past.given.chars :]
        text = _text(pieces)
        if text.startswith(committed):
            return _Place(_without(pieces, len(committed)), past.num_tokens, past.last_id, None)
        same = len(commonprefix([text, committed]))
        if same < len(given_text):
            rewritten_from = past.given.tokens
        else:
            shift = len(given_text) - past.given.chars  # from a place in past.text to the same one in text
            rewritten_from, chars = past.boundary(self.tokenizer, same - shift)
            if policy is RewritePolicy.STRIP:
                before = past.id_before(rewritten_from)
                return _Place(_without(pieces, chars + shift), rewritten_from, before, rewritten_from)
        behind = self._behind_past(past, asks)
        return _Place(behind, past.num_tokens, past.last_id, rewritten_from)

    def _behind_past(self, past: Past, asks: bool) -> Pieces:
        """What the template writes behind the last committed message, less what is committed of it."""
        messages, last = list(self.shield.messages), len(past.messages) - 1
        marker = "CommittedMessage"
        while any(marker in message["content"] for message in messages):
            marker += "0"
        messages[last] = {**messages[last], "content": marker}
        _, found, behind = self._render(messages, asks).rpartition(marker)
        if not found:
            raise InvalidRequest(
                "the model's chat template leaves out the last message, so nothing can be appended to it;"
                " send token_ids"
            )
        pieces = self._spelled(behind)
        text = _text(pieces)
        if not past.ends_with_reply:
            overlaps = (n for n in range(len(text), 0, -1) if past.text.endswith(text[:n]))
            return _without(pieces, next(overlaps, 0))
        closing = (self.tokenizer.special_text(past.last_id) or "") if past.last_id is not None else ""
        num_spaces = len(text) - len(text.lstrip())
        if closing and text.startswith(closing, num_spaces):
            return _without(pieces, num_spaces + len(closing))
        return pieces

    def _render(self, messages: Sequence[dict[str, Any]], asks: bool) -> str:
        return self.template.render_values(
            messages, self.shield.tools, add_generation_prompt=asks, now=self.now
        )

    def _spelled(self, text: str) -> Pieces:
        spell = self.tokenizer.as_spelled
        return [(spell(part, allow_special=not raw), raw) for part, raw in self.shield.split(text)]


def _check(new: Sequence[Message]) -> None:
    if not new:
        raise InvalidRequest("the turn has no messages; send at least one")
    for message in new:
        if message.role not in _ROLES:
            raise InvalidRequest(f"role is {message.role!r}; it must be one of {', '.join(_ROLES)}")


def _common(ids: list[int], others: list[int]) -> list[int]:
    length = next((i for i, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), None)
    return ids[: min(len(ids), len(others)) if length is None else length]


def _text(pieces: Pieces) -> str:
    return "".join(text for text, _ in pieces)


def _without(pieces: Pieces, num_chars: int) -> Pieces:
    """The pieces less their first characters."""
    rest = []
    for text, is_literal in pieces:
        if num_chars < len(text):
            rest.append((text[num_chars:], is_literal))
        num_chars = max(0, num_chars - len(text))
    return rest
