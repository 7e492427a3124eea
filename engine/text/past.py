"""What was said in a conversation, and the text that its committed tokens spell: what a new turn follows.

Built turn by turn, so that nothing is decoded twice.
"""

import codecs
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from engine.errors import InvariantError
from engine.text.messages import Said
from engine.text.tokenizer import Tokenizer
from engine.types import FinishReason, Message, TurnRecord


@dataclass(frozen=True, slots=True)
class PastTurn:
    """A committed turn, less what a prompt has no use for."""

    messages: tuple[Message, ...]  # empty if it was given as ids
    first_token: int
    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    has_reply: bool  # it may be empty; False if none was asked for

    @classmethod
    def of(cls, record: TurnRecord) -> "PastTurn":
        has_reply = record.finish_reason is not FinishReason.APPENDED
        return cls(record.messages, record.first_token, record.prompt_ids, record.reply_ids, has_reply)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of committed tokens: one turn's prompt, or its reply.  `start` is its place in `Past.text`."""

    ids: "array[int]"
    after: int | None  # the id before it
    is_reply: bool
    first_token: int
    start: int

    def spelled(self, tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
        """For each token boundary that splits no character: how many ids lie before it, the text since the
        last such boundary.

        A space that encoding put behind a control token is dropped; in a reply it is the model's own.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        before, text = self.after, ""
        for count, id in enumerate(self.ids, 1):
            data = tokenizer.token_bytes(id, skip_special=False)
            if (count == 1 or not self.is_reply) and tokenizer.drops_space(before):
                data = data.removeprefix(b" ")
            text += utf8.decode(data)
            before = id
            if not utf8.getstate()[0]:
                yield count, text
                text = ""
        if rest := text + utf8.decode(b"", final=True):
            yield len(self.ids), rest


@dataclass(frozen=True, slots=True)
class Given:
    """How much of a history ends with the last prompt that was given as ids: the client wants it as it is,
    and no template is held against it.
    """

    messages: int = 0
    tokens: int = 0
    chars: int = 0
    asks_for_reply: bool = False  # a reply follows


@dataclass(slots=True)
class Past:
    """Committed messages and tokens of one conversation."""

    said: list[Said] = field(default_factory=list)
    ends_with_reply: bool = False
    text: str = ""
    num_tokens: int = 0
    segments: list[Segment] = field(default_factory=list)
    given: Given = Given()

    def copy(self) -> "Past":
        return replace(self, said=list(self.said), segments=list(self.segments))

    def become(self, other: "Past") -> None:
        for part in fields(self):
            setattr(self, part.name, getattr(other, part.name))

    def extend(self, tokenizer: Tokenizer, system: str | None, turn: PastTurn) -> None:
        """Take in the next committed turn; `system` is the conversation's, said with the first messages."""
        self._cut(tokenizer, turn.first_token)
        if turn.messages:
            self.said += self.saying(tokenizer, system, turn.messages)
        else:
            content = tokenizer.decode(turn.prompt_ids, skip_special=True)
            self.said.append(Said.sent(tokenizer, Message("user", content), 0))
        self._append(tokenizer, turn.prompt_ids, is_reply=False)
        if not turn.messages:
            self.given = Given(len(self.said), self.num_tokens, len(self.text), turn.has_reply)
        self.ends_with_reply = turn.has_reply
        if turn.has_reply:
            after = turn.prompt_ids[-1] if turn.prompt_ids else self.last_id
            reply = sampled_message(tokenizer, turn.reply_ids, after)
            self.said.append(Said.sampled(tokenizer, reply, turn.reply_ids, after))
            self._append(tokenizer, turn.reply_ids, is_reply=True)

    def saying(self, tokenizer: Tokenizer, system: str | None, messages: Sequence[Message]) -> list[Said]:
        """What a turn with these messages says: if it is the first to say anything, `system` before them.

        Raises InvalidRequest if a tool call is no JSON object.
        """
        said = [Said.sent(tokenizer, message, place) for place, message in enumerate(messages)]
        if system and not self.said:
            said.insert(0, Said.sent(tokenizer, Message("system", system), 0))
        return said

    def boundary(self, tokenizer: Tokenizer, place: int) -> tuple[int, int]:
        """The last token boundary at or before `place` in `text`: in tokens, and in characters.

        None lies inside a character, or within what was given as ids.
        """
        best = self.given.tokens, self.given.chars
        for segment in reversed(self.segments):
            if segment.start > place or segment.first_token < self.given.tokens:
                continue
            best = segment.first_token, segment.start
            chars = segment.start
            for count, text in segment.spelled(tokenizer):
                chars += len(text)
                if chars > place:
                    break
                best = segment.first_token + count, chars
            break
        return best

    def id_before(self, num_tokens: int) -> int | None:
        """The last of the first `num_tokens` committed ids, None if there is none."""
        for segment in reversed(self.segments):
            if segment.first_token < num_tokens:
                return segment.ids[num_tokens - segment.first_token - 1]
        return None

    @property
    def last_id(self) -> int | None:
        return self.segments[-1].ids[-1] if self.segments else None

    def _append(self, tokenizer: Tokenizer, ids: Sequence[int], *, is_reply: bool) -> None:
        if not ids:
            return
        segment = Segment(array("i", ids), self.last_id, is_reply, self.num_tokens, len(self.text))
        self.segments.append(segment)
        self.text += "".join(text for _, text in segment.spelled(tokenizer))
        self.num_tokens += len(ids)

    def _cut(self, tokenizer: Tokenizer, num_tokens: int) -> None:
        """Forget the tokens from there on: the next turn takes their place."""
        if num_tokens > self.num_tokens:
            raise InvariantError(f"a turn begins at token {num_tokens} of a past with {self.num_tokens}")
        while self.num_tokens > num_tokens:
            segment = self.segments.pop()
            self.text = self.text[: segment.start]
            self.num_tokens = segment.first_token
            if segment.first_token < num_tokens:
                kept = segment.ids[: num_tokens - segment.first_token]
                self._append(tokenizer, kept, is_reply=segment.is_reply)
                break


def sampled_message(tokenizer: Tokenizer, reply_ids: Sequence[int], after: int | None) -> Message:
    """The reply as the history holds it: all its text, less the special token that ended it.

    `after` is the last id of the turn's prompt.
    """
    unended = reply_ids[:-1] if reply_ids and reply_ids[-1] in tokenizer.special_ids else reply_ids
    return Message("assistant", tokenizer.decode(unended, skip_special=False, after=after))
