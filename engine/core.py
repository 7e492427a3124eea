"""The engine without asyncio: plan, execute, apply.

`plan` and `apply` touch integers on one thread; `execute` runs a frozen plan and may run elsewhere, in the
order of planning.  It is `launch`, and then the function that it returns, which collects the result; the next
step may be planned and launched in between (run-ahead): tokens that a launched step samples are scheduled
before they are known.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from engine.batch import Collect, StepPlan, StepResult, at_once, needs_history
from engine.cache.manager import KVCacheManager
from engine.cache.transfer import TransferEngine
from engine.computed import Miss
from engine.conversation import Conversation, Turn, TurnState, common_length
from engine.errors import ContextOverflow, InvariantError
from engine.scheduler import Scheduler, Step
from engine.step_profile import StepRecorder
from engine.stopping import stop_reason
from engine.types import (
    Clock,
    ConversationId,
    FinishReason,
    SamplingParams,
    Tenant,
    TokenLogprobs,
    TurnId,
    Usage,
)


class Runner(Protocol):
    """Computes steps: K/V of every segment is written before any of them attends, layer by layer.  Before a
    layer attends it calls `wait_for(layer)`: what follows has that layer's part of the loads.  A device may
    still compute when `launch` returns, and the next step may be launched before this one is collected.
    """

    def launch(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> Collect: ...


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token of a reply; `finish_reason` is set on the last one."""

    turn: Turn
    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None  # if asked for


class EngineCore:
    def __init__(
        self,
        manager: KVCacheManager,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        eos_ids: frozenset[int],
        context_tokens: int,
        transfer: TransferEngine | None = None,
        recorder: StepRecorder | None = None,
    ) -> None:
        """`transfer` is needed if there is a host tier; `recorder` is told where the time of steps goes."""
        self.recorder = recorder or StepRecorder()
        self.manager = manager
        self.scheduler = scheduler
        self.context_tokens = context_tokens
        self._runner = runner
        self._transfer = transfer
        self._clock = clock
        self._eos_ids = eos_ids
        self._num_rows = 0  # names that steps know segments by
        self._launched: deque[Step] = deque()  # planned and not yet applied
        self._num_copying = 0  # steps whose copies are not collected; the step thread's
        self._void_through = 0  # number of the last step that read what a failed copy had not brought

    # -- conversations

    def new_conversation(
        self,
        id: ConversationId,
        tenant: Tenant,
        tokens: Sequence[int] = (),
        *,
        num_computed: int | None = None,
    ) -> Conversation:
        """A conversation with a committed history; nothing of it needs to be computed before a turn asks
        for it.  `num_computed` of its first tokens were computed once (None: all but the last), which tells
        apart what is computed again from what is new.
        """
        conversation = Conversation(id, tenant, self.manager.new_table(tenant, self._clock.monotonic()))
        if num_computed is None:
            num_computed = len(tokens) - 1
        conversation.extend(tokens, num_computed, Miss.RESTART)
        self.manager.extend(conversation.table, conversation.tokens)
        return conversation

    def forget(self, conversation: Conversation) -> None:
        """The conversation leaves memory."""
        if conversation.turn is not None:
            raise InvariantError(f"conversation {conversation.id} has a turn in flight")
        self.scheduler.forget(conversation)
        self.manager.release(conversation.table)

    def rewind(self, conversation: Conversation, tokens: Sequence[int]) -> None:
        """`tokens` is the committed history from now on; the KV of what stays the same is kept."""
        if conversation.turn is not None:
            raise InvariantError(f"conversation {conversation.id} has a turn in flight")
        num_kept = common_length(tokens, conversation.tokens)
        self._cut(conversation, num_kept)
        if num_kept < len(tokens):
            conversation.extend(tokens[num_kept:], len(tokens) - 1, Miss.REWRITTEN)
            self.manager.extend(conversation.table, conversation.tokens)

    def compute_when_idle(self, conversation: Conversation) -> None:
        """Compute the KV of the history as long as nobody else wants anything."""
        self._num_rows += 1
        self.scheduler.compute_when_idle(conversation, self._num_rows)

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
        *,
        first_token: int | None = None,
        rewritten_to: int = 0,
        bad_word_ids: tuple[tuple[int, ...], ...] = (),
    ) -> Turn:
        """Go on from token `first_token` of the history (None: its end) with the prompt, and queue the turn.
        Where the prompt departs from what stood there, it tells the past in other words up to token
        `rewritten_to`.

        Raises ContextOverflow if not even one token of reply would fit.
        """
        turn = self._new_turn(conversation, turn_id, prompt_ids, sampling, seed, first_token, room_for=1)
        conversation.computed.add(rewritten_to, Miss.REWRITTEN)
        turn.bad_word_ids = bad_word_ids
        turn.needs_history = needs_history(sampling)
        self.scheduler.submit(turn)
        return turn

    def append(
        self,
        conversation: Conversation,
        turn_id: TurnId,
        prompt_ids: Sequence[int],
        *,
        first_token: int | None = None,
        rewritten_to: int = 0,
    ) -> Turn:
        """A turn that is over as soon as its prompt stands in the history.  ContextOverflow."""
        turn = self._new_turn(conversation, turn_id, prompt_ids, SamplingParams(), 0, first_token, room_for=0)
        conversation.computed.add(rewritten_to, Miss.REWRITTEN)
        turn.state, turn.finish_reason = TurnState.FINISHED, FinishReason.APPENDED
        turn.usage = Usage(prompt_tokens=len(prompt_ids), new_tokens=len(prompt_ids))
        conversation.end(0)
        return turn

    def finish(self, turn: Turn, reason: FinishReason, num_reply_kept: int | None) -> None:
        """End a turn now, keeping `num_reply_kept` tokens of its reply, or with None nothing of it at all.

        What the turn had set aside can be put back by `take_back` until `confirm`.
        """
        self.scheduler.remove(turn, self._clock.monotonic())
        turn.finish_reason = reason
        if num_reply_kept is not None:
            del turn.reply_ids[num_reply_kept:]
        turn.conversation.end(num_reply_kept or 0)
        self.manager.truncate(turn.conversation.table, len(turn.conversation.tokens))
        if num_reply_kept is None:
            self.take_back(turn)

    def confirm(self, turn: Turn) -> None:
        """A finished turn stands for good: what it had set aside is forgotten."""
        if turn.aside is not None:
            self.manager.release(turn.aside.table)
            turn.aside = None

    def take_back(self, turn: Turn) -> None:
        """The conversation stands again as before this finished turn."""
        conversation, aside = turn.conversation, turn.aside
        if aside is None:
            self._cut(conversation, turn.first_token)
        else:
            self.manager.release(conversation.put_back(aside, turn.first_token))
            turn.aside = None

    def _new_turn(
        self,
        conversation: Conversation,
        turn_id: TurnId,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        seed: int,
        first_token: int | None,
        room_for: int,
    ) -> Turn:
        """Append the prompt, with at least `room_for` tokens left behind it.  ContextOverflow."""
        first = len(conversation.tokens) if first_token is None else first_token
        left, needed = self.context_tokens - first, len(prompt_ids) + room_for
        if needed > left:
            raise ContextOverflow(
                f"turn needs {needed} tokens but {left} of {self.context_tokens} are left in "
                f"{conversation.id}; shorten it or open a new conversation"
            )
        room = left - len(prompt_ids)
        self._num_rows += 1
        turn = Turn(
            turn_id,
            self._num_rows,
            conversation,
            first,
            tuple(prompt_ids),
            sampling,
            seed,
            room if sampling.max_tokens is None else min(sampling.max_tokens, room),
            self._clock.monotonic(),
        )
        if first < len(conversation.tokens):
            table = self.manager.new_table(conversation.tenant, self._clock.monotonic())
            size = self.manager.block_size
            turn.aside = conversation.set_aside(first, table, turn.prompt_ids, size)
        conversation.begin(turn)
        self.manager.extend(conversation.table, conversation.tokens)
        return turn

    def _cut(self, conversation: Conversation, num_tokens: int) -> None:
        num_kept = self._num_kept(conversation, num_tokens)
        conversation.cut(num_tokens)
        self.manager.truncate(conversation.table, num_tokens)
        if self._num_kept(conversation, num_tokens) < num_kept:
            conversation.computed.lose(num_tokens - num_tokens % self.manager.block_size)

    def _num_kept(self, conversation: Conversation, num_tokens: int) -> int:
        table = conversation.table
        return self.manager.held.num_cached(table, num_tokens) + self.manager.held.num_reloadable(
            table, num_tokens
        )

    # -- steps

    def plan(self) -> Step | None:
        step = self.scheduler.schedule(self._clock.monotonic())
        if step is not None:
            self._launched.append(step)
        return step

    def execute(self, step: Step) -> StepResult:
        self.recorder.mark("host")
        result = self._launch(step.plan)()
        self.recorder.end(step.plan)
        return result

    def launch(self, step: Step) -> Collect:
        """All of the step that does not wait for a device; the function waits for it and has the result.
        Steps are launched in the order of planning, and collected in that order.
        """
        self.recorder.mark("host")
        collect = self._launch(step.plan)
        self.recorder.end(step.plan)
        return collect

    def _launch(self, plan: StepPlan) -> Collect:
        if self._transfer is None or not (plan.stores or plan.loads or self._num_copying):
            return self._runner.launch(plan)
        self._num_copying += 1
        overwritten = plan.overwritten(self.manager.block_size)
        failed = self._transfer.store(plan.stores, overwritten)
        loading = self._transfer.load(plan.loads)
        self.recorder.mark("copies")
        wait_for = loading.wait_for if plan.loads else None  # without it, all layers run in one go
        computing = self._runner.launch(plan, wait_for) if plan.segments else at_once(StepResult())

        def collect() -> StepResult:
            result = computing()
            all_failed = failed | loading.finish()
            self._num_copying -= 1
            self.recorder.mark("copies")
            return replace(result, failed_moves=all_failed, load_s=loading.seconds)

        return collect

    def apply(self, step: Step, result: StepResult) -> list[TokenEvent]:
        """Append what the step sampled.  Tokens of turns that ended meanwhile are dropped."""
        if self._launched[0] is not step:
            raise InvariantError(f"step {step.plan.number} is applied out of turn")
        failed, number = result.failed_moves, step.plan.number
        if self.manager.is_pipelined and any(copy.is_load and copy.move in failed for copy in step.copies):
            self._void_launched()
        self._launched.popleft()
        is_void = number <= self._void_through
        lost = self.manager.settle(number, step.blocks, () if is_void else step.writes, step.copies, failed)
        self.scheduler.count_lost(lost)
        self._note_times(step, result)
        self.scheduler.observe(step.plan, result)
        if is_void:
            return []
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
            events.append(TokenEvent(turn, token_id, reason, result.logprobs.get(turn.row)))
        return events

    def _note_times(self, step: Step, result: StepResult) -> None:
        """What the step took of each turn's time to its first token."""
        num_loads, num_tokens = max(1, len(step.plan.loads)), max(1, step.plan.num_tokens)
        compute_s = max(0.0, result.seconds - result.load_s)
        for share in step.shares:
            turn = share.turn
            if turn.first_token_s is None:
                turn.reload_s += result.load_s * share.num_loads / num_loads
                turn.recompute_s += compute_s * share.num_again / num_tokens
                turn.prefill_s += compute_s * share.num_new / num_tokens

    def _void_launched(self) -> None:
        """A step may have read KV that was not there, and those planned upon it what it wrote: all of them
        are as if they had not been.
        """
        for step in self._launched:
            self.manager.void(step.writes)
        self._void_through = self._launched[-1].plan.number
        self.scheduler.plan_again()

    def step(self) -> list[TokenEvent] | None:
        """The three in a row; None if there was nothing to do."""
        step = self.plan()
        return None if step is None else self.apply(step, self.execute(step))
