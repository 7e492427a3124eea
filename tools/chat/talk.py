"""The conversation that the terminal is in: what is said in it, and what is said about it on the screen."""

import asyncio
import uuid
from typing import Any

from rpc.client import Chat, ContinuoClient, ContinuoError, Reply, RunState, TurnState, Unavailable
from tools.chat.screen import Screen
from tools.chat.wording import transcript

NUM_PAST = 3  # turns shown when a conversation is opened again
TITLE = 60  # characters of the first message that name a conversation in a list


class Mistake(Exception):
    """Something that cannot be done as it was asked for; told in one line."""


class Talk:
    """`chat` is None until something is said: only then is a conversation opened at the server."""

    def __init__(self, client: ContinuoClient, screen: Screen, system: str | None = None) -> None:
        self.client, self.screen, self.system = client, screen, system
        self.chat: Chat | None = None
        self.sampling: dict[str, Any] = {}  # what the user has set; defaults of every new conversation
        self.listed: list[str] = []  # ids, as numbered when they were listed last
        self.has_ended = False
        self._unanswered: tuple[str, str] | None = None  # a message and its turn id
        self._answering: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.chat.id if self.chat else ""

    @property
    def is_kept(self) -> bool:
        return self.chat is not None and self.chat.committed_turns > 0

    def begun(self) -> Chat:
        """The conversation, if anything has been said in it."""
        if self.chat is None or not self.is_kept:
            raise Mistake("nothing has been said yet")
        return self.chat

    async def say(self, text: str) -> None:
        # Said once more after a failure, it is the same turn, and cannot enter the history twice.
        turn_id = self._unanswered[1] if self._unanswered and self._unanswered[0] == text else _new_turn_id()
        self._unanswered = text, turn_id
        try:
            chat = await self.opened(text)
            await self.answer(chat.say(text, turn_id=turn_id, on_state=self.state_changed))
        except ContinuoError:
            self.screen.suggest(text)
            raise
        except asyncio.CancelledError:
            self._unanswered = None
            raise
        self._unanswered = None

    async def append(self, text: str) -> None:
        chat = await self.opened(text)
        await chat.append(text)
        self.screen.note(f"noted, without a reply; {chat.context_left:,} tokens left")

    async def answer(self, reply: Reply) -> None:
        """Shows a reply as it comes."""
        self._answering = asyncio.current_task()
        try:
            async for delta in reply:
                self.screen.reply(delta)
            self.screen.turn_ended(await reply)
        finally:
            self._answering = None

    def state_changed(self, turn: TurnState) -> None:
        if turn.state is RunState.SUSPENDED:
            self.screen.suspended()

    async def opened(self, first_words: str) -> Chat:
        if self.chat is None:
            title = " ".join(first_words.split())[:TITLE]
            self.chat = await self.client.open(self.system, labels={"title": title}, **self.sampling)
        return self.chat

    async def resume(self, id: str) -> None:
        """Goes on with a conversation, and shows the end of what was said in it."""
        chat = await self.client.resume(id)
        _, turns = await self.client.get(id)
        self.leave()
        self.chat = chat
        if len(turns) > NUM_PAST:
            self.screen.note(f"... {len(turns) - NUM_PAST} earlier\n")
        for turn in turns[-NUM_PAST:]:
            self.screen.note(f"{transcript(turn)}\n")

    def leave(self) -> None:
        """The next thing said begins a new conversation."""
        if self.is_kept:
            self.screen.note(f"{self.id} stays as it is; /open {self.id} goes on with it")
        self.chat = None

    async def interrupt(self, doing: "asyncio.Task[None]") -> None:
        """Ends a reply, keeping what was said; anything else, and a reply without a connection, at once."""
        if self._answering is doing and self.chat is not None:
            try:
                return await self.chat.cancel()
            except Unavailable:
                pass
            except ContinuoError:  # it has just ended by itself
                return
        doing.cancel()


def _new_turn_id() -> str:
    return f"t-{uuid.uuid4().hex[:12]}"
