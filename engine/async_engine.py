"""The engine on an event loop: operations on conversations in, events out.

The loop owns all state.  Steps run on the step thread (`step_loop`), text is tokenised on a small pool
(`text_service`), commits go to the token log's thread.  Conversations live in the `registry` while somebody
uses them; idle ones beyond `max_conversations` leave memory and come back from the log.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from engine.attachment import Attachment
from engine.batch import StepResult
from engine.config import EngineConfig
from engine.core import EngineCore, TokenEvent
from engine.errors import (
    AttachmentTaken,
    Conflict,
    Draining,
    EngineError,
    EngineStopped,
    InvalidRequest,
    PermissionDenied,
)
from engine.in_flight import TurnsInFlight
from engine.live import LiveConversation, Outbox
from engine.load import Load
from engine.operations import Operations, checked_id
from engine.registry import Registry, not_found
from engine.sampler import SamplerRules
from engine.scheduler import Step
from engine.statistics import Statistics
from engine.step_loop import StepLoop
from engine.text_service import TextService
from engine.token_log import TokenLog
from engine.turn_input import TurnInputs
from engine.turns import Turns
from engine.types import (
    Clock,
    ConversationEvent,
    ConversationId,
    ConversationRecord,
    Delta,
    FinishReason,
    ForkRequest,
    GenerateRequest,
    ModelInfo,
    OpenRequest,
    ResumeRequest,
    SamplingParams,
    Tenant,
    TurnAccepted,
    TurnDone,
    TurnFailed,
    TurnId,
    TurnRecord,
    TurnRequest,
)

COMMIT_S = 10.0
"""A drain whose grace is over waits so long for the token log to take what was said."""


class AsyncEngine:
    """Made by `engine.loader.load_engine`; an async context manager, used on its event loop only."""

    def __init__(
        self,
        config: EngineConfig,
        core: EngineCore,
        log: TokenLog,
        text: TextService,
        sampler: SamplerRules,
        clock: Clock,
        info: ModelInfo,
        defaults: SamplingParams,
        thread_setup: Callable[[], None],
        description: Sequence[str] = (),
    ) -> None:
        self.description = tuple(description)  # lines for people: what runs here and with how much
        self._statistics = Statistics(clock.monotonic())
        self._config, self._core, self._log, self._text, self._clock = config, core, log, text, clock
        self._info = info
        self._inputs = TurnInputs(
            log, text, sampler, defaults, vocab_size=info.vocab_size, context_tokens=core.context_tokens
        )
        self._in_flight = TurnsInFlight(core, log, clock, self._statistics, stateless=config.stateless)
        self._turns = Turns(
            core,
            log,
            text,
            clock,
            self._inputs,
            self._in_flight,
            self._statistics,
            max_queue=config.max_queue,
        )
        self._steps = StepLoop(
            core,
            self._after_step,
            self._after_failure,
            run_ahead=config.run_ahead,
            stall_s=config.stall_s,
            thread_setup=thread_setup,
            recorder=core.recorder,
        )
        self._in_flight.wake = self._steps.wake
        self._registry = Registry(core, log, info.fingerprint, config.max_conversations)
        self._operations = Operations(core, log, text, clock, self._registry, self._inputs)
        self._failed: asyncio.Event = asyncio.Event()
        self._num_generated = 0
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "AsyncEngine":
        self._stack.callback(self._text.close)
        self._stack.callback(self._log.close)
        await self._stack.enter_async_context(self._steps)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop(Draining("the server is shutting down; reconnect and resume"))
        await self._stack.aclose()

    # -- conversations

    async def open(self, tenant: Tenant, request: OpenRequest) -> Attachment:
        """A new conversation, in the log before this returns, with the history it is given as its first turn.

        AlreadyExists, InvalidRequest, Draining; ContextOverflow for a history that is too long.
        """
        self._refuse_if_over()
        now = self._clock.wall()
        record = ConversationRecord(
            id=checked_id(request.conversation_id),
            tenant=tenant,
            fingerprint=self._info.fingerprint,
            system=request.system,
            sampling=request.sampling,
            labels=dict(request.labels),
            created_at=now,
            updated_at=now,
            resume_token=secrets.token_urlsafe(16),
            tools=request.tools,
            on_rewrite=request.on_rewrite,
        )
        await self._inputs.check_open(request)
        first = None
        if request.history:
            first = await self._inputs.of_history(record, request.history)
            record = replace(record, seq_mark=first.done_seq)
        await asyncio.wrap_future(self._log.create(record, first))
        live = self._registry.get(record.id)  # somebody may have resumed it already
        if live is None:
            turns = [] if first is None else [first]
            live = self._registry.keep(self._registry.new(record, turns))
            self._in_flight.compute_when_idle(live)
        return self._attach(live, [], live.seq)

    async def fork(self, tenant: Tenant, request: ForkRequest) -> ConversationRecord:
        """A new conversation with the history of another up to a point; `resume` attaches to it.

        NotFound; AlreadyExists unless the id was given to the same fork; InvalidRequest; Draining.
        """
        self._refuse_if_over()
        return await self._operations.fork(tenant, request)

    async def resume(self, tenant: Tenant, request: ResumeRequest) -> Attachment:
        """Attach to a conversation wherever it is; a stream that holds it loses it.  What came after
        `after_seq` follows.

        NotFound; PermissionDenied for a wrong token; Conflict for another model or number of tokens.
        """
        self._refuse_if_over()
        live = await self._registry.find(tenant, request.conversation_id)
        await live.rewound()
        if request.resume_token is not None and not secrets.compare_digest(
            request.resume_token.encode(), live.record.resume_token.encode()
        ):
            raise PermissionDenied(
                f"the resume token for {live.record.id} is wrong; "
                "leave it out, the id is enough for its owner"
            )
        expected = request.expect_committed_tokens
        if expected is not None and expected != live.committed_tokens:
            found = f"{live.record.id} has {live.committed_tokens} committed tokens, not {expected}"
            raise Conflict(f"{found}; resume without an expectation and read what is new")
        after_seq = request.after_seq if request.after_seq is not None else live.journal_start
        while True:
            turns = tuple(live.turns)
            missed = await self._missed(live, after_seq)
            if self._registry.get(live.record.id) is live and turns == tuple(live.turns):
                self._statistics.reattached()
                return self._attach(live, missed, after_seq)
            live = await self._registry.find(tenant, request.conversation_id)

    async def get(
        self, tenant: Tenant, conversation_id: ConversationId
    ) -> tuple[ConversationRecord, list[TurnRecord]]:
        """A conversation and its committed turns.  NotFound."""
        return await self._registry.read(tenant, conversation_id)

    async def list(
        self, tenant: Tenant, labels: dict[str, str], page_size: int, page_token: str | None
    ) -> tuple[list[ConversationRecord], str | None]:
        """Conversations of the tenant, last used first, and the token of the next page if there is one."""
        token = page_token or ""
        listing = self._log.list_conversations(tenant, labels=labels, page_size=page_size, page_token=token)
        page = await asyncio.wrap_future(listing)
        return list(page.records), page.next_token or None

    async def delete(self, tenant: Tenant, conversation_id: ConversationId) -> None:
        """Erase a conversation everywhere.  NotFound."""
        if self._registry.get(conversation_id) is None:
            await self.get(tenant, conversation_id)
        await self._registry.loaded(tenant, conversation_id)
        live = self._registry.get(conversation_id)
        if live is None:
            await asyncio.wrap_future(self._log.delete(conversation_id))
        elif live.record.tenant != tenant:
            raise not_found(conversation_id)
        else:
            await self._erase(live)

    # -- without a conversation

    async def generate(
        self, tenant: Tenant, request: GenerateRequest
    ) -> AsyncGenerator[TurnAccepted | Delta | TurnDone, None]:
        """One prompt, one reply, nothing kept.  Closing the generator cancels it."""
        self._refuse_if_over()
        self._num_generated += 1
        id = ConversationId(f"generate-{self._num_generated}")
        now = self._clock.wall()
        record = ConversationRecord(
            id, tenant, self._info.fingerprint, None, SamplingParams(), created_at=now, tools=request.tools
        )
        live = self._registry.new(record)
        live.is_logged = False
        attachment = self._attach(live, [], live.seq)
        try:
            token_ids = request.token_ids
            if request.prompt is not None:
                if request.messages or token_ids:
                    raise InvalidRequest("give a prompt, messages or token ids, not several of them")
                if not request.prompt:
                    raise InvalidRequest("the prompt is empty; give it some text")
                token_ids = await self._text.raw_prompt(request.prompt)
            turn = TurnRequest(
                TurnId("generate"), request.messages, token_ids, request.sampling, request.timeout_s
            )
            await attachment.turn(turn)
            async for event in attachment.events():
                if isinstance(event, TurnFailed):
                    raise event.error
                assert isinstance(event, TurnAccepted | Delta | TurnDone)
                yield event
                if isinstance(event, TurnDone):
                    return
        finally:
            self._in_flight.end(live, FinishReason.CANCELLED, keep=False)
            self._core.forget(live.core)

    async def tokenize(self, text: str, allow_special: bool) -> Sequence[int]:
        return await self._text.encode(text, allow_special=allow_special)

    async def detokenize(self, token_ids: Sequence[int], skip_special: bool) -> str:
        bad = next((id for id in token_ids if not 0 <= id < self._info.vocab_size), None)
        if bad is not None:
            raise InvalidRequest(f"token id {bad} is outside the vocabulary of {self._info.vocab_size}")
        return await self._text.decode(token_ids, skip_special=skip_special)

    def model_info(self) -> ModelInfo:
        return self._info

    # -- the engine as a whole

    async def drain(self, grace_s: float) -> None:
        """Take no new turn; those in flight may end for `grace_s` seconds, then are cancelled, text kept."""
        error = Draining("the server is shutting down; reconnect and resume")
        self._turns.stopped = error
        ends = [asyncio.create_task(live.idle.wait()) for live in self._in_flight]
        try:
            if ends:
                await asyncio.wait(ends, timeout=grace_s)
                for live in self._in_flight:
                    self._in_flight.end(live, FinishReason.CANCELLED, keep=True)
                await asyncio.wait(ends, timeout=COMMIT_S)
        finally:
            for task in ends:
                task.cancel()
        self._end_all(error)

    async def wait_failed(self) -> EngineStopped:
        """Returns once the engine makes no progress any more."""
        await self._failed.wait()
        assert self._steps.failed is not None
        return self._steps.failed

    def load(self) -> Load:
        """What is done now, and what has been done since the start."""
        return self._statistics.load(self._clock.monotonic(), self._core.scheduler, self._registry)

    # -- private

    def _after_step(self, step: Step, result: StepResult, events: Sequence[TokenEvent]) -> None:
        turns = (event.turn for event in events)
        self._statistics.step_done(step.plan, result, turns, self._clock.monotonic())
        self._in_flight.deliver(events)

    def _after_failure(self, error: EngineStopped) -> None:
        self._stop(error)
        self._failed.set()

    def _stop(self, error: EngineError) -> None:
        self._turns.stopped = error
        self._in_flight.stop_all(error)
        self._end_all(error)

    def _end_all(self, error: Exception) -> None:
        for live in self._registry:
            if live.outbox is not None:
                live.outbox.end(error)

    def _refuse_if_over(self) -> None:
        if self._turns.stopped is not None:
            raise self._turns.stopped

    async def _missed(self, live: LiveConversation, after_seq: int) -> Sequence[ConversationEvent]:
        """Events of committed turns behind `after_seq`; those of the turn in flight are in the journal."""
        if not live.turns or after_seq >= live.journal_start:
            return []
        turns = await self._inputs.committed_turns(live)
        return [event for turn in turns if turn.done_seq > after_seq for event in self._turns.replay(turn)]

    def _attach(
        self, live: LiveConversation, missed: Sequence[ConversationEvent], after_seq: int
    ) -> Attachment:
        self._refuse_if_over()
        if live.outbox is not None:
            live.outbox.end(AttachmentTaken(f"another stream has attached to {live.record.id}"))
        outbox = Outbox(on_read=lambda: self._in_flight.resume_reading(live))
        live.attach(outbox, missed, after_seq)
        self._in_flight.resume_reading(live)
        if live.is_logged:
            self._registry.keep(live)
        self._registry.unload_idle()
        return Attachment(
            live,
            outbox,
            self._turns,
            self._in_flight,
            self._operations,
            self._erase,
            grace_s=self._config.disconnect_grace_s,
            context_tokens=self._core.context_tokens,
        )

    async def _erase(self, live: LiveConversation) -> None:
        await self._turns.erase(live)
        self._registry.forget(live)
