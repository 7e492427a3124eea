"""A client, a conversation and a screen that keep what they are told, for tests of the chat program."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

from rpc._generated import continuo_pb2 as pb
from rpc.client import Delta, FinishReason, NotFound, Turn, TurnState


def turn(text="Miso.", **fields) -> Turn:
    usage = pb.Usage(prompt_tokens=30, completion_tokens=3, cached_device_tokens=20, new_tokens=10)
    plain = Turn(
        id="t",
        text=text,
        token_ids=(1, 2, 3),
        finish_reason=FinishReason.STOP_TOKEN,
        matched_stop=None,
        usage=usage,
        timing=pb.Timing(ttft_s=0.012, total_s=0.5),
        context_left=100,
        committed_tokens=33,
        history_rewritten=False,
    )
    return replace(plain, **fields)


class FakeReply:
    """`then` is raised behind the first delta; without an end it waits for ever."""

    def __init__(self, chat, then=None, endless=False):
        self._chat, self._then, self._endless = chat, then, endless

    async def __aiter__(self):
        yield Delta("Miso.", (1, 2, 3))
        if self._then is not None:
            raise self._then
        if self._endless:
            await self._chat.cancelled.wait()

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        self._chat.committed_turns += 1
        return turn()


class FakeChat:
    def __init__(self, client, id, turns=0):
        self.id, self.committed_turns, self.committed_tokens, self.context_left = id, turns, 33 * turns, 100
        self.cancelled = asyncio.Event()
        self._client = client

    def say(self, text, *, turn_id, on_state):
        self._client.called("say", self.id, text)
        self._client.turn_ids.append(turn_id)
        for state in self._client.states:
            on_state(TurnState(state, pb.Usage()))
        return FakeReply(self, self._client.next_failure(), self._client.endless)

    def regenerate(self, *, on_state, **sampling):
        self._client.called("regenerate", self.id, sampling)
        return FakeReply(self)

    async def append(self, text):
        self._client.called("append", self.id, text)

    async def rewind(self, *, turns):
        self._client.called("rewind", self.id, turns)
        self.committed_turns, self.committed_tokens = turns, 33 * turns

    async def update(self, **sampling):
        self._client.called("update", self.id, sampling)

    async def fork(self, *, turns):
        self._client.called("fork", self.id, turns)
        return FakeChat(self._client, f"{self.id}-fork", turns)

    async def cancel(self):
        if self._client.cannot_cancel is not None:
            raise self._client.cannot_cancel
        self.cancelled.set()


class FakeClient:
    """Knows the conversations `kept`, each with two turns."""

    def __init__(self, *kept):
        self.kept = list(kept)
        self.calls = []
        self.turn_ids = []
        self.states = []  # of every turn
        self.failures = []
        self.endless = False
        self.cannot_cancel = None

    def called(self, *call):
        self.calls.append(call)

    def next_failure(self):
        return self.failures.pop(0) if self.failures else None

    async def open(self, system, *, labels, **sampling):
        self.called("open", system, labels, sampling)
        return FakeChat(self, "c-new")

    async def resume(self, id):
        if id not in self.kept:
            raise NotFound(f"there is no conversation {id}")
        return FakeChat(self, id, turns=2)

    async def get(self, id):
        conversation = pb.Conversation(
            conversation_id=id, num_turns=2, num_tokens=66, sampling=pb.Sampling(top_k=5)
        )
        texts = ("One.", "Two.")
        return conversation, [
            pb.CommittedTurn(messages=[pb.Message(role="user", content=text)], reply=f"Re: {text}")
            for text in texts
        ]

    async def list(self, *, page_size):
        for id in self.kept:
            yield pb.Conversation(
                conversation_id=id, num_turns=2, num_tokens=66, labels={"title": f"on {id}"}
            )

    async def delete(self, id):
        self.called("delete", id)
        self.kept.remove(id)


class FakeScreen(SimpleNamespace):
    """`input` is what the user says, one after the other."""

    is_interactive = True

    def __init__(self, *input):
        super().__init__(input=list(input), notes=[], errors=[], replies=[], suggestions=[])

    async def read(self):
        return self.input.pop(0) if self.input else None

    def suggest(self, text):
        self.suggestions.append(text)

    def reply(self, delta):
        self.replies.append(delta.text)

    def turn_ended(self, turn):
        pass

    def suspended(self):
        self.notes.append("suspended")

    def note(self, text):
        self.notes.append(text)

    def failed(self, text):
        self.errors.append(text)
