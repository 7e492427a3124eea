"""Conversations through the service, and what `transformers` makes of the same messages."""

import json
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.text.tokenizer import Tokenizer
from engine.text_service import Past, PastTurn, TextService, TurnPrompt
from engine.types import Message, RewritePolicy

END = "<|im_end|>"


def assistant(text: str, *calls: str) -> Message:
    return Message("assistant", text, tool_calls=calls)


def result(text: str) -> Message:
    return Message("tool", text, name="find", tool_call_id="123456789")


@dataclass(frozen=True)
class Step:
    """A turn; without a reply, messages that are appended."""

    new: tuple[Message, ...]
    reply: str | None = None


def say(reply: str, *new: Message) -> Step:
    return Step(new, reply)


@dataclass(frozen=True)
class Story:
    """`rewritten` are the steps at which the template renders the past differently."""

    template: str
    steps: tuple[Step, ...] = ()
    rewritten: frozenset[int] = frozenset()
    system: str | None = "Be brief."
    tools: tuple[str, ...] = ()
    history: tuple[Message, ...] = ()


class Telling:
    """One conversation: its committed `ids`, and `said`, the same as messages for `transformers`."""

    def __init__(
        self, tokenizer: Tokenizer, tokenizer_file: Path, story: Story, policy: RewritePolicy
    ) -> None:
        self.service = TextService(tokenizer, num_threads=1)
        self.story, self.policy = story, policy
        self.now = time.time()
        self.past = Past()
        self.ids: list[int] = []
        self.said: list[dict[str, Any]] = []
        self._tokenizer_file = tokenizer_file

    async def prompt(self, *new: Message, wants_reply: bool = True) -> TurnPrompt:
        return await self.service.prompt(
            self.past,
            array("i", self.ids),
            new,
            system=self.story.system,
            now=self.now,
            tools=self.story.tools,
            wants_reply=wants_reply,
            policy=self.policy,
        )

    async def take(self, step: Step, end: str = END) -> TurnPrompt:
        """The whole turn; with an empty `end` its reply is cut short."""
        prompt = await self.prompt(*step.new, wants_reply=step.reply is not None)
        await self.commit(prompt, step, end)
        return prompt

    async def commit(self, prompt: TurnPrompt, step: Step, end: str = END) -> None:
        reply_ids: list[int] = []
        if step.reply is not None:
            encode, after = self.service.tokenizer.encode, prompt.ids[-1]
            reply_ids = encode(step.reply + end, allow_special=True, after=after)
        turn = PastTurn(
            step.new, prompt.first_token, tuple(prompt.ids), tuple(reply_ids), step.reply is not None
        )
        await self.service.extend_past(self.past, self.story.system, [turn])
        self.ids = [*self.ids[: prompt.first_token], *prompt.ids, *reply_ids]
        self.said = self._with(step.new)
        if step.reply is not None:
            self.said.append({"role": "assistant", "content": step.reply})

    def full(self, *new: Message, asks: bool = True) -> str:
        """The render of everything by `transformers`."""
        from transformers import PreTrainedTokenizerFast

        tokenizer = self.service.tokenizer
        library = PreTrainedTokenizerFast(tokenizer_file=str(self._tokenizer_file), **tokenizer.named_tokens)
        return library.apply_chat_template(
            self._with(new),
            tools=[json.loads(tool) for tool in self.story.tools] or None,
            chat_template=tokenizer.chat_template,
            add_generation_prompt=asks,
            tokenize=False,
        )

    def spell(self, ids: list[int]) -> str:
        return self.service.tokenizer.decode(ids, skip_special=False)

    def _with(self, new: tuple[Message, ...]) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.story.system}] if self.story.system else []
        return [*(self.said or system), *map(_as_dict, new)]


def _as_dict(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "tool":
        value |= {"name": message.name, "tool_call_id": message.tool_call_id}
    if message.tool_calls:
        value["tool_calls"] = [json.loads(call) for call in message.tool_calls]
    return value
