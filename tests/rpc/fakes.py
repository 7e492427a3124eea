"""A scripted engine: it answers "You said: ..." one letter (= one token) at a time, and waits where told.

It keeps the promises of `rpc.backend`, so the wire can be tested without a model; nothing here touches torch.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from engine import errors
from engine.types import (
    ConversationEvent,
    ConversationId,
    ConversationRecord,
    Delta,
    FinishReason,
    GenerateRequest,
    Limits,
    ModelInfo,
    OpenRequest,
    ResumeRequest,
    Tenant,
    Timing,
    TurnAccepted,
    TurnDone,
    TurnFailed,
    TurnId,
    TurnRecord,
    TurnRequest,
    Usage,
)

CONTEXT = 4096


def tokens(text: str) -> tuple[int, ...]:
    return tuple(ord(character) for character in text)


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(chr(token_id) for token_id in token_ids)


@dataclass
class FakeConversation:
    record: ConversationRecord
    turns: list[TurnRecord] = field(default_factory=list)
    requests: dict[TurnId, TurnRequest] = field(default_factory=dict)
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
        return sum(len(turn.prompt_ids) + len(turn.reply_ids) for turn in self.turns)


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
        self.num_taken = 0  # events that the stream took
        self.ended: errors.EngineError | None = None
        self.closed = False
        self.detached = False

    async def events(self) -> AsyncIterator[ConversationEvent]:
        while True:
            self.conversation.changed.clear()
            waiting = [event for event in self.conversation.log if event.seq > self.taken_seq]
            if waiting and not isinstance(self.ended, errors.AttachmentTaken):
                event, count = waiting[0], 1
                while isinstance(event, Delta) and count < len(waiting):
                    following = waiting[count]
                    if not isinstance(following, Delta) or following.turn_id != event.turn_id:
                        break
                    ids, text = event.token_ids + following.token_ids, event.text + following.text
                    event, count = replace(event, seq=following.seq, token_ids=ids, text=text), count + 1
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
        await asyncio.sleep(0)
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
        elif here.running_id == request.turn_id:
            return
        elif here.running_id is not None:
            raise errors.Conflict(
                f"turn {here.running_id} is in flight in {here.record.id}; wait or cancel it"
            )
        elif self.engine.draining:
            raise errors.Draining("the server is shutting down; reconnect and resume")
        else:
            self.engine.start(here, request, restarted=known is not None)

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


class FakeEngine:
    """After `hold(n)` every reply waits behind its n-th token until `release()`."""

    def __init__(self) -> None:
        self.draining = False
        self.detach_grace_s = 0.0
        self.letters_per_token = 1  # more of them make a reply that fills every buffer on the way
        self.detached = asyncio.Event()  # some stream went away
        self.holding = asyncio.Event()  # some reply waits
        self.generation_ended = asyncio.Event()
        self.refuse: Exception | None = None  # what every turn is answered with
        self.fail_with: Exception | None = None  # what every turn fails with once it is accepted
        self.failure: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.seen: list[object] = []
        self.tenants: list[Tenant] = []
        self.conversations: dict[tuple[Tenant, ConversationId], FakeConversation] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self._hold_after: int | None = None
        self._released = asyncio.Event()

    async def __aenter__(self) -> "FakeEngine":
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def hold(self, num_tokens: int) -> None:
        self._hold_after = num_tokens
        self._released.clear()
        self.holding.clear()

    def release(self) -> None:
        self._hold_after = None
        self._released.set()

    async def open(self, tenant: Tenant, request: OpenRequest) -> FakeAttachment:
        self.tenants.append(tenant)
        self.seen.append(request)
        self._check_running()
        id = request.conversation_id or ConversationId(f"c-{len(self.conversations) + 1}")
        if (tenant, id) in self.conversations:
            raise errors.AlreadyExists(f"conversation {id} exists; resume it or choose another id")
        record = ConversationRecord(
            id=id,
            tenant=tenant,
            fingerprint="fake",
            system=request.system,
            sampling=request.sampling,
            labels=request.labels,
            created_at=1000.0,
            updated_at=1000.0,
            resume_token=f"token-of-{id}",
        )
        conversation = self.conversations[tenant, id] = FakeConversation(record)
        return self._attach(conversation, after_seq=0)

    async def resume(self, tenant: Tenant, request: ResumeRequest) -> FakeAttachment:
        self.seen.append(request)
        self._check_running()
        conversation = self._find(tenant, request.conversation_id)
        if request.resume_token not in (None, conversation.record.resume_token):
            raise errors.PermissionDenied(f"the resume token is not that of {request.conversation_id}")
        have, expected = conversation.committed_tokens(), request.expect_committed_tokens
        if expected not in (None, have):
            raise errors.Conflict(
                f"{request.conversation_id} holds {have} tokens, not {expected} as expected"
            )
        if conversation.attachment is not None:
            taken = errors.AttachmentTaken(f"another stream has attached to {request.conversation_id}")
            conversation.attachment.end(taken)
        after_seq = conversation.seq if request.after_seq is None else request.after_seq
        return self._attach(conversation, after_seq)

    async def get(
        self, tenant: Tenant, conversation_id: ConversationId
    ) -> tuple[ConversationRecord, list[TurnRecord]]:
        conversation = self._find(tenant, conversation_id)
        return self._record(conversation), list(conversation.turns)

    async def list(
        self, tenant: Tenant, labels: dict[str, str], page_size: int, page_token: str | None
    ) -> tuple[Sequence[ConversationRecord], str | None]:
        mine = [
            self._record(conversation)
            for (owner, _), conversation in self.conversations.items()
            if owner == tenant and labels.items() <= conversation.record.labels.items()
        ]
        begin = int(page_token or 0)
        end = begin + page_size
        return mine[begin:end], str(end) if end < len(mine) else None

    async def delete(self, tenant: Tenant, conversation_id: ConversationId) -> None:
        conversation = self._find(tenant, conversation_id)
        await self.erase(conversation)
        if conversation.attachment is not None:
            conversation.attachment.end(self._unknown(conversation_id))

    async def generate(
        self, tenant: Tenant, request: GenerateRequest
    ) -> AsyncGenerator[TurnAccepted | Delta | TurnDone, None]:
        self.tenants.append(tenant)
        self.seen.append(request)
        if self.refuse is not None:
            raise self.refuse
        turn_id = TurnId("g-1")
        prompt = request.prompt or text_of(request.token_ids) or request.messages[-1].content
        try:
            yield TurnAccepted(1, turn_id, queue_position=0)
            for n, character in enumerate(prompt):
                await self._hold(n)
                yield Delta(n + 2, turn_id, n, (ord(character),), character)
            usage = Usage(len(prompt), len(prompt), 0, 0, len(prompt))
            yield TurnDone(99, turn_id, FinishReason.STOP_TOKEN, None, usage, Timing(), CONTEXT, 0)
        finally:
            self.generation_ended.set()

    async def tokenize(self, text: str, allow_special: bool) -> Sequence[int]:
        return tokens(text)

    async def detokenize(self, token_ids: Sequence[int], skip_special: bool) -> str:
        for token_id in token_ids:
            if not 0 <= token_id < 128:
                raise errors.InvalidRequest(f"token id {token_id} is outside the vocabulary of 128")
        return text_of(token_ids)

    def model_info(self) -> ModelInfo:
        limits = Limits(context_tokens=CONTEXT, max_concurrent=8, max_queue=256, max_message_bytes=64 * 2**20)
        eos = (0,)
        return ModelInfo("fake", "0.0", "fake", "Parrot", "float32", "cpu", 128, eos, True, limits)

    async def drain(self, grace_s: float) -> None:
        self.draining = True
        self.seen.append(("drain", grace_s))
        running = [c.running for c in self.conversations.values() if c.running is not None]
        if running:
            await asyncio.wait(running, timeout=grace_s)
        for conversation in self.conversations.values():
            self.stop_turn(conversation, FinishReason.CANCELLED)
            if conversation.running is not None:
                await conversation.running
            if conversation.attachment is not None:
                conversation.attachment.end(
                    errors.Draining("the server is shutting down; reconnect and resume")
                )

    async def wait_failed(self) -> Exception:
        return await asyncio.shield(self.failure)

    # What the attachments call.

    def start(self, conversation: FakeConversation, request: TurnRequest, restarted: bool) -> None:
        conversation.requests[request.turn_id] = request
        conversation.running_id, conversation.stop, conversation.discard = request.turn_id, None, False
        conversation.emit(lambda seq: TurnAccepted(seq, request.turn_id, 0, restarted))
        conversation.running = asyncio.create_task(self._run(conversation, request))
        self.tasks.add(conversation.running)

    def stop_turn(self, conversation: FakeConversation, reason: FinishReason) -> None:
        conversation.stop = reason
        self._released.set()

    def lose_turn(self, conversation: FakeConversation) -> None:
        """As a crash would: the running turn is gone, nothing is said about it."""
        assert conversation.running is not None
        conversation.running.cancel()
        conversation.running = conversation.running_id = None
        conversation.log.clear()
        conversation.seq += 2**20

    def replay(self, conversation: FakeConversation, done: TurnRecord) -> None:
        conversation.emit(lambda seq: Delta(seq, done.turn_id, 0, done.reply_ids, done.reply_text))
        conversation.emit(lambda seq: self._done(seq, conversation, done))

    async def erase(self, conversation: FakeConversation) -> None:
        self.stop_turn(conversation, FinishReason.CANCELLED)
        if conversation.running is not None:
            await conversation.running
        self.conversations.pop((conversation.record.tenant, conversation.record.id), None)

    async def _run(self, conversation: FakeConversation, request: TurnRequest) -> None:
        prompt = request.messages[-1].content if request.messages else text_of(request.token_ids)
        reply: list[int] = []
        reason = FinishReason.STOP_TOKEN
        for token_id in tokens(f"You said: {prompt}"):
            await self._hold(len(reply))
            if conversation.stop is not None:
                reason = conversation.stop
                break
            if self.fail_with is not None:
                error = self.fail_with
                conversation.running = conversation.running_id = None
                conversation.emit(partial(TurnFailed, turn_id=request.turn_id, error=error))
                return
            offset = len(reply)
            reply.append(token_id)
            letter = chr(token_id) * self.letters_per_token
            conversation.emit(
                partial(Delta, turn_id=request.turn_id, offset=offset, token_ids=(token_id,), text=letter)
            )
            await asyncio.sleep(0)
        if conversation.discard:
            cancelled = errors.TurnCancelled(f"turn {request.turn_id} was cancelled and discarded")
            conversation.running = conversation.running_id = None
            conversation.emit(partial(TurnFailed, turn_id=request.turn_id, error=cancelled))
            return
        history = conversation.committed_tokens()
        record = TurnRecord(
            turn_id=request.turn_id,
            number=len(conversation.turns),
            first_token=history,
            prompt_ids=tokens(prompt),
            reply_ids=tuple(reply),
            messages=request.messages,
            reply_text=text_of(reply),
            finish_reason=reason,
            matched_stop=None,
            usage=Usage(history + len(prompt), len(reply), history, 0, len(prompt)),
            timing=Timing(0.001, 0.002, 0.003),
            created_at=1000.0,
            done_seq=conversation.seq + 1,
            digest=b"",
        )
        conversation.turns.append(record)
        conversation.running = conversation.running_id = None
        conversation.emit(lambda seq: self._done(seq, conversation, record))

    def _done(self, seq: int, conversation: FakeConversation, turn: TurnRecord) -> TurnDone:
        have = conversation.committed_tokens()
        reason, usage, timing = turn.finish_reason, turn.usage, turn.timing
        return TurnDone(seq, turn.turn_id, reason, None, usage, timing, CONTEXT - have, have)

    async def _hold(self, num_done: int) -> None:
        if self._hold_after is not None and num_done >= self._hold_after:
            self.holding.set()
            await self._released.wait()

    def _attach(self, conversation: FakeConversation, after_seq: int) -> FakeAttachment:
        conversation.attachment = FakeAttachment(self, conversation, after_seq)
        return conversation.attachment

    def _check_running(self) -> None:
        if self.draining:
            raise errors.Draining("the server is shutting down; reconnect and resume")

    def _find(self, tenant: Tenant, id: ConversationId) -> FakeConversation:
        if (tenant, id) not in self.conversations:
            raise self._unknown(id)
        return self.conversations[tenant, id]

    def _unknown(self, id: ConversationId) -> errors.NotFound:
        return errors.NotFound(f"there is no conversation {id}; List shows those that exist")

    def _record(self, conversation: FakeConversation) -> ConversationRecord:
        num_turns, num_tokens = len(conversation.turns), conversation.committed_tokens()
        return replace(conversation.record, num_turns=num_turns, num_tokens=num_tokens)
