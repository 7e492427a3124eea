"""The ids that a new turn appends to a conversation: only what is new is tokenised.

Every turn renders all messages and checks that the render begins with the text that the committed tokens
spell; the rest of it is the turn's prompt.  If it does not, the template rewrites the past: it strips white
space, or drops reasoning.  Under KEEP the committed tokens stand, and the turn appends what the template
writes behind the last message that it shows; under STRIP it begins at the last token before the divergence
and appends all that the render has from there.  What was given as ids stands under both.

Texts are compared as tokens spell them (`Tokenizer.as_spelled`): some tokenizers normalise, and some control
tokens swallow the white space beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import InvalidRequest
from engine.text.chat_template import ChatTemplate
from engine.text.messages import tools_as_values
from engine.text.past import Past
from engine.text.scene import Pieces, Scene, common_length
from engine.text.tokenizer import Tokenizer
from engine.types import Message, RewritePolicy

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class TurnPrompt:
    """What a turn puts behind the first `first_token` committed tokens.

    `rewritten_from` is the first committed token from which the template now renders the past differently,
    None if the whole history reads as the template would write it.
    """

    ids: list[int]
    first_token: int
    rewritten_from: int | None


def next_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    past: Past,
    new: Sequence[Message],
    *,
    now: float,
    system: str | None = None,
    tools: Sequence[str] = (),
    wants_reply: bool = True,
    policy: RewritePolicy = RewritePolicy.KEEP,
) -> TurnPrompt:
    """Render all, encode what `new` adds to `past`; `system` is said with the first messages.

    `now`, in Unix seconds, is the time that a template may write into its text; the same for all turns of a
    conversation, it keeps the past as it was.  A reply that was cut short is closed as the template closes
    it.  Without `wants_reply` the prompt holds no more than what stays there however the chat goes on.
    Raises InvalidRequest if the messages are malformed, the template refuses them or gives them no place.
    """
    _check(new)
    said = [*past.said, *past.saying(tokenizer, system, new)]
    scene = Scene(template, tokenizer, said, len(past.said), tools_as_values(tools), wants_reply, now)
    whole = scene.spelled(scene.whole())
    given, given_text = past.given, ""
    if given.messages:
        given_text = _text(scene.spelled(scene.first(given.messages, given.asks_for_reply)))
    committed = given_text + past.text[given.chars :]
    text = _text(whole)
    if text.startswith(committed):
        ids = _encode(tokenizer, _without(whole, len(committed)), past.last_id)
        return TurnPrompt(ids, past.num_tokens, None)
    same = common_length(text, committed)
    rewritten_from = given.tokens
    if same >= len(given_text):
        shift = len(given_text) - given.chars  # from a place in past.text to the same one in text
        rewritten_from, chars = past.boundary(tokenizer, same - shift)
        if policy is RewritePolicy.STRIP:
            rest = _without(whole, chars + shift)
            ids = _encode(tokenizer, rest, past.id_before(rewritten_from))
            return TurnPrompt(ids, rewritten_from, rewritten_from)
    ids = _encode(tokenizer, _uncommitted(tokenizer, past, scene), past.last_id)
    return TurnPrompt(ids, past.num_tokens, rewritten_from)


def _check(new: Sequence[Message]) -> None:
    if not new:
        raise InvalidRequest("the turn has no messages; send at least one")
    for message in new:
        if message.role not in _ROLES:
            raise InvalidRequest(f"role is {message.role!r}; it must be one of {', '.join(_ROLES)}")


def _uncommitted(tokenizer: Tokenizer, past: Past, scene: Scene) -> Pieces:
    """What the template writes behind the past, less what is committed of it."""
    behind = scene.behind_past()
    pieces = scene.spelled(behind)
    text = _text(pieces)
    if not past.ends_with_reply:
        closing = _text(scene.spelled(scene.closing(behind)))
        overlaps = (n for n in range(len(closing), 0, -1) if past.text.endswith(closing[:n]))
        return _without(pieces, next(overlaps, 0))
    sampled = (tokenizer.special_text(past.last_id) or "") if past.last_id is not None else ""
    num_spaces = len(text) - len(text.lstrip())
    if sampled and text.startswith(sampled, num_spaces):
        return _without(pieces, num_spaces + len(sampled))
    return pieces


def _encode(tokenizer: Tokenizer, pieces: Pieces, after: int | None) -> list[int]:
    """Ids of the pieces behind the token `after`."""
    ids: list[int] = []
    for text, is_literal in pieces:
        ids += tokenizer.encode(text, allow_special=not is_literal, after=ids[-1] if ids else after)
    return ids


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
