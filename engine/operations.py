"""What can be done to a conversation besides taking turns: rewind, fork, update.

Each goes to the token log first.  What it means for the conversation in memory follows when the log has it,
also if the caller has gone by then.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future as ThreadFuture
from dataclasses import replace
from typing import TypeVar

from engine.core import EngineCore
from engine.errors import EngineError, InvalidRequest
from engine.history import Rewound
from engine.live import LiveConversation
from engine.registry import Registry
from engine.text_service import TextService
from engine.token_log import TokenLog
from engine.turn_input import TurnInputs
from engine.types import (
    Clock,
    ConversationId,
    ConversationRecord,
    ForkRequest,
    Point,
    Standing,
    Tenant,
    UpdateRequest,
)

MAX_ID_LENGTH = 128
T = TypeVar("T")
R = TypeVar("R")


class Operations:
    """Used on the event loop only."""

    def __init__(
        self,
        core: EngineCore,
        log: TokenLog,
        text: TextService,
        clock: Clock,
        registry: Registry,
        inputs: TurnInputs,
    ) -> None:
        self._core, self._log, self._text, self._clock = core, log, text, clock
        self._registry, self._inputs = registry, inputs

    async def rewind(self, live: LiveConversation, point: Point) -> Standing:
        """Forget the history behind `point`.  Conflict while a turn is in flight; InvalidRequest."""
        if (conflict := live.conflict) is not None:
            raise conflict
        live.is_rewinding = True
        live.idle.clear()
        try:
            done = self._log.rewind(live.record.id, point, self._decode)
        except EngineError:
            self._end_rewind(live)
            raise
        return await _then(done, lambda done: self._rewound(live, done))

    async def update(self, live: LiveConversation, request: UpdateRequest) -> None:
        """Change defaults of the turns to come, or the labels.  InvalidRequest for defaults that no turn can
        take.
        """
        if request.sampling is not None:
            await self._inputs.check_defaults(request.sampling.over(live.record.sampling))
        done = self._log.update(live.record.id, request.sampling, request.labels)
        await _then(done, lambda done: self._updated(live, done))

    async def fork(self, tenant: Tenant, request: ForkRequest) -> ConversationRecord:
        """NotFound; AlreadyExists for an id in use; InvalidRequest for an id or a point that cannot be."""
        new_id = checked_id(request.new_id)
        parent = (await self._registry.find(tenant, request.conversation_id)).record
        self._registry.unload_idle()  # nobody attaches to it for this
        # `created_at` stays: templates may write it into the history, which must be rendered as before.
        record = replace(
            parent,
            id=new_id,
            labels=parent.labels if request.labels is None else dict(request.labels),
            updated_at=self._clock.wall(),
            resume_token=secrets.token_urlsafe(16),
            parent=parent.id,
        )
        return await asyncio.wrap_future(self._log.fork(record, request.at, self._decode))

    def _rewound(self, live: LiveConversation, done: "ThreadFuture[Rewound]") -> Standing:
        self._end_rewind(live)
        history = done.result()
        if (history.num_turns, history.num_tokens) != (len(live.turns), live.core.num_committed):
            tokens = live.core.tokens[: history.num_tokens] if history.tokens is None else history.tokens
            self._core.rewind(live.core, tokens)
            live.keep_turns(history.num_turns)
            live.history_rewritten = history.history_rewritten
        return Standing(live.committed_tokens, len(live.turns), self._core.context_left(live.core))

    def _updated(self, live: LiveConversation, done: "ThreadFuture[ConversationRecord]") -> None:
        stored = done.result()
        live.record = replace(live.record, sampling=stored.sampling, labels=stored.labels)

    def _end_rewind(self, live: LiveConversation) -> None:
        live.is_rewinding = False
        live.idle.set()

    def _decode(self, ids: Sequence[int], after: int) -> str:
        return self._text.tokenizer.decode(ids, skip_special=True, after=after)


def checked_id(id: ConversationId | None) -> ConversationId:
    """The id that a caller wants for a new conversation, or one of ours.  InvalidRequest."""
    if id is None:
        return ConversationId(f"c-{secrets.token_hex(8)}")
    if not (0 < len(id) <= MAX_ID_LENGTH and id.isprintable()):
        raise InvalidRequest(
            f"conversation id {id[:40]!r} has {len(id)} characters; "
            f"use 1 to {MAX_ID_LENGTH} printable ones, or none"
        )
    return id


async def _then(done: "ThreadFuture[T]", effect: Callable[["ThreadFuture[T]"], R]) -> R:
    """What `effect` returns.  It runs on the loop once `done` is, also if nobody waits for it any more."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[R] = loop.create_future()

    def run() -> None:
        try:
            result = effect(done)
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
        else:
            if not answer.done():
                answer.set_result(result)

    done.add_done_callback(lambda _: loop.call_soon_threadsafe(run))
    return await answer
