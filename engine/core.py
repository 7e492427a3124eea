"""The engine without asyncio: plan, execute, apply.

`plan` and `apply` touch integers on one thread; `execute` runs a frozen plan and may run elsewhere, in the
order of planning.  A plan may be made before the previous one is applied (run-ahead): tokens that a
launched step samples are scheduled before they are known.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.batch import StepPlan, StepResult
from engine.cache.manager import KVCacheManager
from engine.conversation import Conversation, Turn, TurnState
from engine.errors import ContextOverflow, InvariantError
from engine.scheduler import Scheduler, Step
from engine.stopping import stop_reason
from engine.types import Clock, ConversationId, FinishReason, SamplingParams, Tenant, TurnId


class Runner(Protocol):
    """Computes a step: K/V of every segment is written before any of them attends, layer by layer."""

    def run(self, plan: StepPlan) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token of a reply; `finish_reason` is set on the last one."""

    turn: Turn
    token_id: int
    finish_reason: FinishReason | None


class EngineCore:
    def __init__(
        self,
        manager: KVCacheManager,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        eos_ids: frozenset[int],
        context_tokens: int,
    ) -> None:
        self.manager = manager
        self.scheduler = scheduler
        self.context_tokens = context_tokens
        self._runner = runner
        self._clock = clock
        self._eos_ids = eos_ids
        self._num_turns = 0

    # -- conversations

    def new_conversation(
        self, id: ConversationId, tenant: Tenant, tokens: Iterable[int] = ()
    ) -> Conversation:
        """A conversation with a committed history; nothing of it needs to be computed before a turn asks
        for it.
        """
        conversation = Conversation(id, tenant, self.manager.new_table(tenant, self._clock.monotonic()))
        conversation.tokens.extend(array("i", tokens))
        conversation.num_committed = len(conversation.tokens)
        conversation.num_computed = max(0, len(conversation.tokens) - 1)  # the last one was sampled only
        self.manager.extend(conversation.table, conversation.tokens)
        return conversation

    def forget(self, conversation: Conversation) -> None:
        """The conversation leaves memory."""
        if conversation.turn is not None:
            raise InvariantError(f"conversation {conversation.id} has a turn in flight")
        self.manager.release(conversation.table)

    def context_left(self, conversation: Conversation) -> int:
        return self.context_tokens - len(conversation.tokens)

    # -- turns

    def begin(
        self,
        conversation: Conversation,
        turn_id: TurnId,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        seed: int,
    ) -> Turn:
        """Append the prompt and queue the turn.  Raises ContextOverflow if not even one token of reply
        would fit.
        """
        left = self.context_left(conversation)
        if len(prompt_ids) + 1 > left:
            raise ContextOverflow(
                f"turn needs {len(prompt_ids) + 1} tokens but {left} of {self.context_tokens} are left in "
                f"{conversation.id}; shorten it or open a new conversation"
            )
        room = left - len(prompt_ids)
        max_new = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        self._num_turns += 1
        turn = Turn(
            turn_id,
            self._num_turns,
            conversation,
            tuple(prompt_ids),
            sampling,
            seed,
            max_new,
            self._clock.monotonic(),
        )
        conversation.begin(turn)
        self.manager.extend(conversation.table, conversation.tokens)
        self.scheduler.submit(turn)
        return turn

    def finish(self, turn: Turn, reason: FinishReason, num_reply_kept: int | None) -> None:
        """End a turn now, keeping `num_reply_kept` tokens of its reply, or with None nothing of it at all."""
        self.scheduler.remove(turn, self._clock.monotonic())
        turn.finish_reason = reason
        if num_reply_kept is not None:
            del turn.reply_ids[num_reply_kept:]
        turn.conversation.end(num_reply_kept)
        self.manager.truncate(turn.conversation.table, len(turn.conversation.tokens))

    def cut(self, conversation: Conversation, num_tokens: int) -> None:
        """Forget the committed history from token `num_tokens` on."""
        if conversation.turn is not None or num_tokens > conversation.num_committed:
            raise InvariantError(f"conversation {conversation.id} cannot be cut at token {num_tokens}")
        conversation.cut(num_tokens)
        self.manager.truncate(conversation.table, num_tokens)

    # -- steps

    def plan(self) -> Step | None:
        return self.scheduler.schedule(self._clock.monotonic())

    def execute(self, step: Step) -> StepResult:
        return self._runner.run(step.plan)

    def apply(self, step: Step, result: StepResult) -> list[TokenEvent]:
        """Append what the step sampled.  Tokens of turns that ended meanwhile are dropped."""
        self.manager.settle(step.blocks, step.writes)
        now = self._clock.monotonic()
        events = []
        for turn in step.turns:
            token_id = result.sampled[turn.row]
            turn.num_pending -= 1
            if turn.state is TurnState.FINISHED:
                continue
            if turn.first_token_s is None:
                turn.first_token_s = now
            turn.reply_ids.append(token_id)
            turn.conversation.tokens.append(token_id)
            self.manager.extend(turn.conversation.table, turn.conversation.tokens)
            reason = stop_reason(token_id, turn.num_generated, turn.sampling, self._eos_ids)
            if reason is None and turn.num_generated == turn.max_new:
                reason = FinishReason.CONTEXT_FULL
            if reason is not None:
                self.finish(turn, reason, turn.num_generated)
            events.append(TokenEvent(turn, token_id, reason))
        return events

    def step(self) -> list[TokenEvent] | None:
        """The three in a row; None if there was nothing to do."""
        step = self.plan()
        return None if step is None else self.apply(step, self.execute(step))
