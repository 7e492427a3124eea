"""Which stretches of a reply are reasoning or a tool call, by the marks that the chat template writes.

A mark counts if it is one added token of the vocabulary and occurs in the template: then the model was
trained with it.  Marks belong to their stretch.  The text passes through untouched.
"""

from collections.abc import Sequence

from engine.text.marks import INSIDE, MARKS
from engine.text.tokenizer import Tokenizer
from engine.types import ReplyKind


class Marks:
    """The marks of one model.  Shared by its replies."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        template = tokenizer.chat_template or ""
        ids = {text: id for text, id in tokenizer.added_tokens.items() if text in template}
        self.starts = {ids[start]: kind for kind, start, _ in MARKS if start in ids}
        self.ends = {ids[end]: kind for kind, start, end in MARKS if start in ids and end in ids}
        inside = {tokenizer.added_tokens[text] for text in INSIDE if text in tokenizer.added_tokens}
        self.breaks = tokenizer.special_ids - self.starts.keys() - self.ends.keys() - inside


class KindTracker:
    """The kind of each token of one reply.  The prompt counts too: it may open the first stretch."""

    def __init__(self, marks: Marks, prompt_ids: Sequence[int]) -> None:
        self._marks = marks
        self._kind = ReplyKind.TEXT
        begin = len(prompt_ids)
        while begin and prompt_ids[begin - 1] not in marks.breaks:
            begin -= 1
        for id in prompt_ids[begin:]:
            self.push(id)

    def push(self, token_id: int) -> ReplyKind:
        """Take in the next token; returns what it belongs to."""
        kind = self._marks.starts.get(token_id)
        if kind is not None:
            self._kind = kind
            return kind
        kind = self._marks.ends.get(token_id, self._kind)
        if token_id in self._marks.ends or token_id in self._marks.breaks:
            self._kind = ReplyKind.TEXT
        return kind
