"""A scripted engine: it answers "You said: ..." one letter (= one token) at a time, and waits where told.

It keeps the promises of `rpc.backend`, so the wire can be tested without a model; nothing here touches torch.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial

from engine import errors
from engine.load import Load
from engine.types import (
    ConversationId,
    ConversationRecord,
    Delta,
    FinishReason,
    ForkRequest,
    GenerateRequest,
    HistoryRewritten,
    Limits,
    ModelInfo,
    OpenRequest,
    ReplyKind,
    ResumeRequest,
    RunState,
    StateChanged,
    Tenant,
    Timing,
    TokenLogprobs,
    TurnAccepted,
    TurnDone,
    TurnFailed,
    TurnId,
    TurnRecord,
    TurnRequest,
    Usage,
)
from tests.loads import a_load
from tests.rpc.fake_conversation import (
    CONTEXT,
    FakeAttachment,
    FakeConversation,
    Request,
    num_tokens,
    text_of,
    tokens,
)


class FakeEngine:
    """After `hold(n)` every reply waits behind its n-th token until `release()`."""

    def __init__(self) -> None:
        self.draining = False
        self.detach_grace_s = 0.0
        self.greeting = "You said: "
        self.thoughts = ""  # letters that are marked as reasoning
        self.rewritten_from: int | None = None  # from there on the template renders the past of a turn anew
        self.interruptions: tuple[RunState, ...] = ()  # of every turn, before its first token
        self.letters_per_token = 1  # more of them make a reply that fills every buffer on the way
        self.detached = asyncio.Event()  # some stream went away
        self.holding = asyncio.Event()  # some reply waits
        self.generation_ended = asyncio.Event()
        self.refuse: Exception | None = None  # what every turn is answered with
        self.fail_with: Exception | None = None  # what every turn fails with once it is accepted
        self.blocked = ""  # the name of a method that never returns
        self.reached = asyncio.Event()  # somebody waits in it
        self.abandoned = asyncio.Event()  # and was cancelled there
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

    async def pass_through(self, method: str) -> None:
        if method == self.blocked:
            self.reached.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.abandoned.set()

    def hold(self, num_tokens: int) -> None:
        self._hold_after = num_tokens
        self._released.clear()
        self.holding.clear()

    def let_others_pass(self) -> None:
        """Whoever waits goes on waiting, until it is cancelled."""
        self._hold_after = None

    def release(self) -> None:
        self._hold_after = None
        self._released.set()

    async def open(self, tenant: Tenant, request: OpenRequest) -> FakeAttachment:
        await self.pass_through("open")
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
            tools=request.tools,
            on_rewrite=request.on_rewrite,
        )
        conversation = self.conversations[tenant, id] = FakeConversation(record)
        if request.history:
            said = TurnRequest(TurnId("history"), request.history, wants_reply=False)
            self._committed(conversation, said, [], FinishReason.APPENDED)
        await self.pass_through("opened")
        return self._attach(conversation, after_seq=0)

    async def resume(self, tenant: Tenant, request: ResumeRequest) -> FakeAttachment:
        await self.pass_through("resume")
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
        await self.pass_through("get")
        conversation = self._find(tenant, conversation_id)
        return self._record(conversation), list(conversation.turns)

    async def fork(self, tenant: Tenant, request: ForkRequest) -> ConversationRecord:
        self.seen.append(request)
        await self.pass_through("fork")
        parent = self._find(tenant, request.conversation_id)
        turns = parent.turns if request.at is None else parent.turns_up_to(request.at)
        id = request.new_id or ConversationId(f"c-{len(self.conversations) + 1}")
        fork = self.conversations.get((tenant, id))
        origin = parent.record.id, num_tokens(turns)
        if fork is None:
            record = replace(parent.record, id=id, resume_token=f"token-of-{id}")
            if request.labels is not None:
                record = replace(record, labels=request.labels)
            record = replace(record, parent=origin[0], forked_at=origin[1])
            fork = self.conversations[tenant, id] = FakeConversation(record, list(turns), seq=parent.seq)
        elif (fork.record.parent, fork.record.forked_at) != origin:
            raise errors.AlreadyExists(f"conversation {id} exists; resume it or choose another id")
        await self.pass_through("answer")
        return self._record(fork)

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
            usage = Usage(len(prompt), len(prompt), new_tokens=len(prompt))
            yield TurnDone(99, turn_id, FinishReason.STOP_TOKEN, None, usage, Timing(), CONTEXT, 0)
        finally:
            self.generation_ended.set()

    async def tokenize(self, text: str, allow_special: bool) -> Sequence[int]:
        await self.pass_through("tokenize")
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

    def load(self) -> Load:
        return a_load()

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

    def start(
        self, conversation: FakeConversation, request: Request, replaces: int | None, restarted: bool
    ) -> None:
        """`replaces`: the number of the turn that gives way, with all behind it, when this one is done."""
        conversation.requests[request.turn_id] = request
        conversation.running_id, conversation.stop, conversation.discard = request.turn_id, None, False
        conversation.emit(lambda seq: TurnAccepted(seq, request.turn_id, 0, restarted))
        conversation.running = asyncio.create_task(self._run(conversation, request, replaces))
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
        assert conversation.attachment is not None
        reply = Delta(done.done_seq - 1, done.turn_id, 0, done.reply_ids, done.reply_text)
        conversation.attachment.replays += [reply, self._done(done)]
        conversation.changed.set()

    async def erase(self, conversation: FakeConversation) -> None:
        self.stop_turn(conversation, FinishReason.CANCELLED)
        if conversation.running is not None:
            await conversation.running
        self.conversations.pop((conversation.record.tenant, conversation.record.id), None)

    async def _run(self, conversation: FakeConversation, request: Request, replaces: int | None) -> None:
        if isinstance(request, TurnRequest):
            said, number = request, len(conversation.turns)
        else:
            assert replaces is not None
            old, number = conversation.turns[replaces], replaces
            said = TurnRequest(request.turn_id, old.messages, () if old.messages else old.prompt_ids)
        if self.rewritten_from is not None:
            conversation.emit(
                partial(
                    HistoryRewritten,
                    turn_id=said.turn_id,
                    first_token=self.rewritten_from,
                    num_tokens=conversation.committed_tokens() - self.rewritten_from,
                    policy=conversation.record.on_rewrite,
                )
            )
        if said.wants_reply:
            history, num_new = conversation.committed_tokens(), len(_prompt(said))
            found = Usage(history + num_new, 0, history, new_tokens=num_new)
            conversation.emit(
                partial(StateChanged, turn_id=said.turn_id, state=RunState.RUNNING, found=found)
            )
            for state in self.interruptions:
                conversation.emit(partial(StateChanged, turn_id=said.turn_id, state=state))
        reply: list[int] = []
        reason = FinishReason.STOP_TOKEN if said.wants_reply else FinishReason.APPENDED
        failure: Exception | None = None
        for token_id in tokens(self.greeting + _prompt(said)) if said.wants_reply else ():
            await self._hold(len(reply))
            if conversation.stop is not None:
                reason = conversation.stop
                break
            if self.fail_with is not None:
                failure = self.fail_with
                break
            conversation.emit(partial(self._delta, request, len(reply), token_id))
            reply.append(token_id)
            await asyncio.sleep(0)
        if conversation.discard:
            failure = errors.TurnCancelled(f"turn {said.turn_id} was cancelled and discarded")
        conversation.running = conversation.running_id = None
        if failure is not None:
            conversation.emit(partial(TurnFailed, turn_id=said.turn_id, error=failure))
            return
        del conversation.turns[number:]
        record = self._committed(conversation, said, reply, reason)
        conversation.emit(lambda seq: self._done(record))

    def _delta(self, request: Request, offset: int, token_id: int, seq: int) -> Delta:
        text = chr(token_id) * self.letters_per_token
        kind = ReplyKind.REASONING if chr(token_id) in self.thoughts else ReplyKind.TEXT
        asked = request.sampling.logprobs is not None
        logprobs = (TokenLogprobs(token_id, -0.5, ((token_id, -0.5), (0, -1.0))),) if asked else ()
        return Delta(seq, request.turn_id, offset, (token_id,), text, kind, logprobs)

    def _committed(
        self, conversation: FakeConversation, said: TurnRequest, reply: Sequence[int], reason: FinishReason
    ) -> TurnRecord:
        history, prompt = conversation.committed_tokens(), _prompt(said)
        record = TurnRecord(
            turn_id=said.turn_id,
            number=len(conversation.turns),
            first_token=history,
            prompt_ids=tokens(prompt),
            reply_ids=tuple(reply),
            messages=said.messages,
            reply_text=text_of(reply),
            finish_reason=reason,
            matched_stop=None,
            usage=Usage(history + len(prompt), len(reply), history, new_tokens=len(prompt)),
            timing=Timing(0.001, 0.002, 0.003),
            created_at=1000.0,
            done_seq=conversation.seq + 1,
            digest=b"",
        )
        conversation.turns.append(record)
        return record

    def _done(self, turn: TurnRecord) -> TurnDone:
        have = turn.first_token + len(turn.prompt_ids) + len(turn.reply_ids)
        reason, usage, timing = turn.finish_reason, turn.usage, turn.timing
        return TurnDone(turn.done_seq, turn.turn_id, reason, None, usage, timing, CONTEXT - have, have)

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
        num_turns, committed = len(conversation.turns), conversation.committed_tokens()
        return replace(conversation.record, num_turns=num_turns, num_tokens=committed)


def _prompt(request: TurnRequest) -> str:
    return request.messages[-1].content if request.messages else text_of(request.token_ids)
