"""The conversations of the scripted engine in fakes.py: a log of events, and attachments that read it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from engine import errors
from engine.types import (
    ConversationEvent,
    ConversationRecord,
    Delta,
    FinishReason,
    Point,
    RegenerateRequest,
    Standing,
    TurnId,
    TurnRecord,
    TurnRequest,
    UpdateRequest,
)

if TYPE_CHECKING:
    from tests.rpc.fakes import FakeEngine

CONTEXT = 4096
Request = TurnRequest | RegenerateRequest


def tokens(text: str) -> tuple[int, ...]:
    return tuple(ord(character) for character in text)


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(chr(token_id) for token_id in token_ids)


def num_tokens(turns: Sequence[TurnRecord]) -> int:
    return sum(len(turn.prompt_ids) + len(turn.reply_ids) for turn in turns)


@dataclass
class FakeConversation:
    record: ConversationRecord
    turns: list[TurnRecord] = field(default_factory=list)
    requests: dict[TurnId, Request] = field(default_factory=dict)
    log: list[ConversationEvent] = field(default_factory=list)
    seq: int = 0
    running: asyncio.Task[None] | None = None
    running_id: TurnId | None = None
    stop: FinishReason | None = None  # set to end the running turn
    discard: bool = False
    attachment: "FakeAttachment | None" = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def emit(self, make: Callable[[int], ConversationEvent]) -> None:
        self.seq += 1
        self.log.append(make(self.seq))
        self.changed.set()

    def committed_tokens(self) -> int:
        return num_tokens(self.turns)

    def check_idle(self) -> None:
        if self.running_id is not None:
            raise errors.Conflict(
                f"turn {self.running_id} is in flight in {self.record.id}; wait or cancel it"
            )

    def turns_up_to(self, point: Point) -> list[TurnRecord]:
        """The history in front of `point`; the last reply may be cut."""
        if point.num_turns is not None and point.num_turns > len(self.turns):
            raise errors.InvalidRequest(
                f"{self.record.id} has {len(self.turns)} turns; {point.num_turns} cannot stay"
            )
        if point.num_tokens is None:
            return self.turns[: point.num_turns]
        if point.num_tokens > self.committed_tokens():
            raise errors.InvalidRequest(
                f"{self.record.id} has {self.committed_tokens()} tokens; {point.num_tokens} cannot stay"
            )
        kept, left = [], point.num_tokens
        for turn in self.turns:
            if left == 0:
                break
            if left < len(turn.prompt_ids):
                raise errors.InvalidRequest(
                    f"token {point.num_tokens} lies inside the message of {turn.turn_id}"
                )
            reply_ids = turn.reply_ids[: left - len(turn.prompt_ids)]
            left -= len(turn.prompt_ids) + len(reply_ids)
            kept.append(replace(turn, reply_ids=reply_ids, reply_text=text_of(reply_ids)))
        return kept


class FakeAttachment:
    def __init__(self, engine: "FakeEngine", conversation: FakeConversation, after_seq: int) -> None:
        self.engine = engine
        self.conversation = conversation
        self.conversation_id = conversation.record.id
        self.resume_token = conversation.record.resume_token
        self.committed_tokens = conversation.committed_tokens()
        self.committed_turns = len(conversation.turns)
        self.context_left = CONTEXT - self.committed_tokens
        self.last_seq = conversation.seq
        self.taken_seq = after_seq
        self.replays: list[ConversationEvent] = []  # with the numbers they had
        self.num_taken = 0  # events that the stream took
        self.ended: errors.EngineError | None = None
        self.closed = False
        self.detached = False

    async def events(self) -> AsyncIterator[ConversationEvent]:
        while True:
            await self.engine.pass_through("events")
            self.conversation.changed.clear()
            while self.replays:
                yield self.replays.pop(0)
            waiting = [event for event in self.conversation.log if event.seq > self.taken_seq]
            if waiting and not isinstance(self.ended, errors.AttachmentTaken):
                event, count = waiting[0], 1
                while isinstance(event, Delta) and count < len(waiting):
                    following = waiting[count]
                    if not isinstance(following, Delta) or following.turn_id != event.turn_id:
                        break
                    if following.kind is not event.kind:
                        break
                    ids, text = event.token_ids + following.token_ids, event.text + following.text
                    logprobs = event.logprobs + following.logprobs
                    event = replace(event, seq=following.seq, token_ids=ids, text=text, logprobs=logprobs)
                    count += 1
                self.taken_seq = event.seq
                self.num_taken += 1
                yield event
            elif self.ended is not None:
                raise self.ended
            elif self.closed:
                return
            else:
                await self.conversation.changed.wait()

    async def turn(self, request: TurnRequest) -> None:
        await self._begin("turn", request)

    async def regenerate(self, request: RegenerateRequest) -> None:
        await self._begin("regenerate", request)

    async def _begin(self, method: str, request: Request) -> None:
        await self.engine.pass_through(method)
        self.engine.seen.append(request)
        if self.engine.refuse is not None:
            raise self.engine.refuse
        here = self.conversation
        known = here.requests.get(request.turn_id)
        if known is not None and known != request:
            raise errors.AlreadyExists(
                f"turn {request.turn_id} was used with other content; give it another id"
            )
        done = next((turn for turn in here.turns if turn.turn_id == request.turn_id), None)
        if done is not None:
            self.engine.replay(here, done)
            return
        if here.running_id == request.turn_id:
            return
        here.check_idle()
        if self.engine.draining:
            raise errors.Draining("the server is shutting down; reconnect and resume")
        replaces = self._replaced(request) if isinstance(request, RegenerateRequest) else None
        self.engine.start(here, request, replaces, restarted=known is not None)

    def _replaced(self, request: RegenerateRequest) -> int:
        numbers = {turn.turn_id: number for number, turn in enumerate(self.conversation.turns)}
        replaces = request.replaces or next(reversed(numbers), None)
        if replaces not in numbers:
            raise errors.NotFound(f"there is no turn {replaces} in {self.conversation_id} to regenerate")
        return numbers[replaces]

    async def rewind(self, to: Point) -> Standing:
        self.engine.seen.append(to)
        await self.engine.pass_through("rewind")
        here = self.conversation
        here.check_idle()
        here.turns = here.turns_up_to(to)
        await self.engine.pass_through("answer")
        return Standing(here.committed_tokens(), len(here.turns), CONTEXT - here.committed_tokens())

    async def update(self, request: UpdateRequest) -> None:
        self.engine.seen.append(request)
        await self.engine.pass_through("update")
        record = self.conversation.record
        sampling = record.sampling if request.sampling is None else request.sampling.over(record.sampling)
        labels = record.labels if request.labels is None else request.labels
        self.conversation.record = replace(record, sampling=sampling, labels=labels)
        await self.engine.pass_through("answer")

    async def cancel(self, turn_id: TurnId, keep: bool) -> None:
        if any(turn.turn_id == turn_id for turn in self.conversation.turns):
            return  # over already
        if self.conversation.running_id != turn_id:
            raise errors.NotFound(f"turn {turn_id} is not in flight in {self.conversation_id}")
        self.conversation.discard = not keep
        self.engine.stop_turn(self.conversation, FinishReason.CANCELLED)

    async def close(self, delete: bool) -> None:
        if delete:
            await self.engine.erase(self.conversation)
        elif self.conversation.running is not None:
            await asyncio.shield(self.conversation.running)
        self.closed = True
        self.conversation.changed.set()

    def detach(self) -> None:
        assert not self.closed
        self.detached = True
        self.engine.detached.set()

        async def later() -> None:
            await asyncio.sleep(self.engine.detach_grace_s)
            if self.conversation.attachment is self:
                self.engine.stop_turn(self.conversation, FinishReason.CANCELLED)

        self.engine.tasks.add(asyncio.create_task(later()))

    def end(self, error: errors.EngineError) -> None:
        self.ended = error
        self.conversation.changed.set()
