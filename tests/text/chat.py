"""A conversation over `next_prompt` itself, its replies said by the test."""

from typing import NamedTuple

from engine.text.next_prompt import next_prompt
from engine.text.past import Past, PastTurn, sampled_message
from engine.text.tokenizer import Tokenizer
from engine.types import Message


def user(text: str) -> Message:
    return Message("user", text)


class Asked(NamedTuple):
    """A turn's prompt, and the text that it adds to what the conversation spells."""

    ids: list[int]
    first_token: int
    rewritten_from: int | None
    text: str


class Chat:
    """A conversation that 'samples' given replies, and the ids that are committed."""

    def __init__(self, tokenizer: Tokenizer, template, closing: str = "<|im_end|>", **options) -> None:
        self.tokenizer, self.template, self.closing = tokenizer, template, closing
        self.options = {"now": 0.0, **options}
        self.past = Past()
        self.said: list[Message] = []
        self.ids: list[int] = []

    @property
    def text(self) -> str:
        return self.past.text

    def ask(self, *new: Message, wants_reply: bool = True) -> Asked:
        prompt = next_prompt(
            self.template, self.tokenizer, self.past, new, wants_reply=wants_reply, **self.options
        )
        longer = self.past.copy()
        longer.extend(
            self.tokenizer, None, PastTurn(new, prompt.first_token, tuple(prompt.ids), (), has_reply=False)
        )
        text = longer.text[longer.segments[-1].start :] if prompt.ids else ""
        return Asked(prompt.ids, prompt.first_token, prompt.rewritten_from, text)

    def commit(self, prompt: Asked, new: tuple[Message, ...], reply_ids: tuple[int, ...] | None) -> None:
        turn = PastTurn(new, prompt.first_token, tuple(prompt.ids), reply_ids or (), reply_ids is not None)
        self.past.extend(self.tokenizer, None, turn)
        self.said += new
        if reply_ids is not None:
            self.said.append(sampled_message(self.tokenizer, reply_ids, prompt.ids[-1]))
        self.ids = [*self.ids[: prompt.first_token], *prompt.ids, *(reply_ids or ())]
        assert self.past.num_tokens == len(self.ids)
        assert [said.value["content"] for said in self.past.said] == [said.content for said in self.said]

    def say(self, *new: Message, reply: str, closed: bool = True) -> Asked:
        prompt = self.ask(*new)
        sampled = self.tokenizer.encode(reply, allow_special=True, after=prompt.ids[-1])
        if closed:
            sampled.append(self.tokenizer.control_tokens[self.closing])
        self.commit(prompt, new, tuple(sampled))
        return prompt

    def append(self, *new: Message) -> Asked:
        prompt = self.ask(*new, wants_reply=False)
        self.commit(prompt, new, None)
        return prompt

    def full_render(self, *new: Message, asks: bool = True) -> str:
        messages, tools = [*self.said, *new], self.options.get("tools", ())
        return self.template.render(messages, add_generation_prompt=asks, now=0.0, tools=tools)
