"""Which tokens the next step computes: one token budget, no phases.

Turns that decode come first, then those from the queue that fit begin to run, and then prompts are computed
in chunks, as `engine.step_budget` shares them out.  A turn that was suspended or whose history lost blocks
simply has more missing positions than others.  When slots run out, the newest running turn is suspended: its
blocks become evictable and it goes back to the head of the queue.  So is a paused turn, whose reader is slow,
as soon as another turn waits.

While no turn wants anything, histories that were appended to are computed ahead of the turn that will need
them, in slots that are free.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from engine.accounting import Share, less_what_was_lost, shares_of, usage_of
from engine.batch import RowParams, Segment, StepPlan, StepResult
from engine.cache.block import BlockIds, Copy
from engine.cache.manager import KVCacheManager, Run, Scheduled, Write
from engine.conversation import Conversation, Turn, TurnState
from engine.step_budget import Pacing, paced, shared
from engine.step_times import StepTimes, Work
from engine.types import RunState, Usage

EARLY_TURNS = 8
"""So many of those that wait have their blocks brought back ahead of time."""
RESERVED_SHARE = 0.1
"""Of the slots, kept for turns that run already; nothing is admitted into it (Pensieve, section 4.3.2)."""


@dataclass(frozen=True, slots=True)
class Step:
    """A plan together with what must be undone or confirmed when it has run."""

    plan: StepPlan
    turns: tuple[Turn, ...]  # of the segments that choose a token, in their order
    blocks: BlockIds  # that it touches; they may repeat
    writes: tuple[Write, ...]
    copies: tuple[Copy, ...] = ()
    shares: tuple[Share, ...] = ()


class Scheduler:
    """Without `pacing` every step takes as many tokens as `max_step_tokens` lets it."""

    def __init__(
        self, manager: KVCacheManager, max_step_tokens: int, max_concurrent: int, pacing: Pacing | None = None
    ) -> None:
        self.manager = manager
        self.max_step_tokens = max_step_tokens
        self.max_concurrent = max_concurrent
        self._pacing = pacing
        self._times = StepTimes()
        self.on_state: Callable[[Turn, RunState, Usage | None], None] = lambda turn, state, found: None
        self.waiting: deque[Turn] = deque()
        self.running: list[Turn] = []  # in order of arrival
        self._idle: dict[Conversation, int] = {}  # to be computed ahead -> row of its segments
        self._short: Turn | None = None  # found no slots last time: goes first

    @property
    def num_waiting(self) -> int:
        """Turns that would run if they could; those whose readers are slow do not want to."""
        return sum(not turn.paused for turn in self.waiting)

    def submit(self, turn: Turn) -> None:
        self._idle.pop(turn.conversation, None)
        self.manager.expect(turn.conversation.table, turn.arrived_s)
        self.waiting.append(turn)

    def compute_when_idle(self, conversation: Conversation, row: int) -> None:
        """Compute the history's missing KV while no turn wants anything, as long as it fits free slots."""
        self._idle[conversation] = row

    def forget(self, conversation: Conversation) -> None:
        """The conversation leaves memory."""
        self._idle.pop(conversation, None)

    def remove(self, turn: Turn, now: float) -> None:
        """The turn is over or given up.  Its blocks stay with the conversation, evictable from now on."""
        if turn.state is TurnState.RUNNING:
            self._stop(turn, now)
        elif turn.state is TurnState.WAITING:
            self.waiting.remove(turn)
        turn.state = TurnState.FINISHED

    def schedule(self, now: float) -> Step | None:
        """The next step, with its blocks pinned; None if nothing can be computed now."""
        parts = _Parts()
        if self.num_waiting:
            for turn in [turn for turn in self.running if turn.paused]:
                self._suspend(turn, now)
        short, self._short = self._short, None
        decoding = [turn for turn in self.running if turn.caught_up or turn is short]
        for turn in sorted(decoding, key=lambda turn: turn is not short):
            at_most = self._pacing.least if self._pacing and not turn.caught_up else self.max_step_tokens
            self._add(parts, turn, at_most, now)
        self._admit(now)
        prompts = [
            turn
            for turn in self.running
            if not turn.caught_up and turn.may_compute and turn not in parts.runs
        ]
        for turn, chunk in zip(prompts, self._chunks(parts, prompts), strict=True):
            self._add(parts, turn, chunk, now)
        self._load_early(now)
        if not self.num_waiting and all(turn.paused for turn in self.running):
            self._add_idle(parts, now)
        self.manager.store_ahead(now)
        if not parts.segments and not self.manager.has_begun_copies:
            return None
        blocks = np.concatenate(parts.blocks) if parts.blocks else np.empty(0, np.int32)
        number, copies = self.manager.launch(blocks)
        stores = tuple(copy.move for copy in copies if not copy.is_load)
        loads = tuple(copy.move for copy in copies if copy.is_load)
        plan = StepPlan(number, tuple(parts.segments), stores, loads)
        loaded = [copy.block for copy in copies if copy.is_load]
        turns = (*self.running, *self.waiting) if loaded else self.running
        shares = shares_of(turns, parts.runs, loaded)
        return Step(plan, tuple(parts.turns), blocks, tuple(parts.writes), copies, shares)

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        """A step has ended."""
        if self._pacing and plan.segments and not plan.loads and result.seconds > 0:
            self._times.observe(Work.of(plan.segments), result.seconds)

    def plan_again(self) -> None:
        """What was planned and has not ended came to nothing: what is missing is found anew."""
        for turn in (*self.running, *self.waiting):
            turn.num_pending, turn.caught_up = 0, False
            turn.conversation.table.cursor = 0

    def count_lost(self, copies: Sequence[Copy]) -> None:
        """The KV of these copies' blocks was lost on its way: the turns that counted on it compute it."""
        for copy in copies:
            for turn in (*self.running, *self.waiting):
                if turn.usage is None or not (turn.conversation.table.blocks == copy.block).any():
                    continue
                turn.usage = less_what_was_lost(turn.usage, copy.num_tokens)

    # -- private

    def _admit(self, now: float) -> None:
        """Begin to run those of the queue, in its order, that fit beside what running turns still need."""
        room = self.max_concurrent - len(self.running)
        if not room or not self.num_waiting:
            return
        claimed = sum(self._num_missing(turn) for turn in self.running if not turn.caught_up)
        for turn in [turn for turn in self.waiting if not turn.paused][:room]:
            missing = self._num_missing(turn)
            own = self.manager.held.num_own(turn.conversation.table)
            if missing > self.manager.num_available - own - self._reserve - claimed:
                return
            self.waiting.remove(turn)
            self._start(turn, now)
            claimed += missing

    def _num_missing(self, turn: Turn) -> int:
        """Slots that it lacks to hold its prompt and a token more."""
        conversation = turn.conversation
        return self.manager.held.num_missing(conversation.table, len(conversation.tokens) + 1)

    def _chunks(self, parts: "_Parts", prompts: Sequence[Turn]) -> list[int]:
        """How many tokens of each the step computes, at most."""
        room, missing, token_s = self.max_step_tokens - parts.num_tokens, [], []
        for turn in prompts:
            conversation = turn.conversation
            end = len(conversation.tokens) + turn.num_pending
            missing.append(max(1, self.manager.held.num_to_compute(conversation.table, end)))
            token_s.append(self._times.prompt_token_s(end - missing[-1]))
        if self._pacing is None or not parts.segments or not self._times.is_known:
            return shared(room, missing)
        decode_s = self._times.seconds(Work.of(parts.segments))
        return paced(self._pacing, room, decode_s, missing, token_s)

    @property
    def _reserve(self) -> int:
        """Slots; a lone conversation is exempt."""
        return int(self.manager.pool.num_slots * RESERVED_SHARE) if self.running else 0

    def _load_early(self, now: float) -> None:
        """Begin to bring back what waiting turns will need, as many in their order as fit all together, and
        little per step: those that run wait for it.
        """
        manager = self.manager
        if not manager.tiers.host.num_slots:
            return
        room = manager.num_available - self._reserve
        at_most = manager.tiers.num_per_step
        for turn in islice(self.waiting, EARLY_TURNS):
            end, table = len(turn.conversation.tokens), turn.conversation.table
            room -= manager.held.num_missing(table, end + 1) + manager.held.num_own(table)
            if room < 0 or not at_most:
                return
            if not turn.paused:
                at_most -= manager.load_early(table, end, at_most, now)

    def _start(self, turn: Turn, now: float) -> None:
        conversation = turn.conversation
        self.manager.activate(conversation.table)
        turn.state = TurnState.RUNNING
        at = next((i for i, other in enumerate(self.running) if other.row > turn.row), len(self.running))
        self.running.insert(at, turn)
        found = usage_of(turn, self.manager.held)
        if turn.usage is None:
            turn.started_s = now
            turn.usage, turn.num_known = found, conversation.computed.num_tokens
        self.on_state(turn, RunState.RUNNING, found)

    def _suspend(self, turn: Turn, now: float) -> None:
        self._stop(turn, now)
        turn.state, turn.caught_up = TurnState.WAITING, False
        self.waiting.appendleft(turn)
        self.on_state(turn, RunState.PAUSED if turn.paused else RunState.SUSPENDED, None)

    def _stop(self, turn: Turn, now: float) -> None:
        self.running.remove(turn)
        self._deactivate(turn.conversation, now)

    def _deactivate(self, conversation: Conversation, now: float) -> None:
        reached = self.manager.held.num_scheduled(conversation.table, len(conversation.tokens))
        conversation.computed.compute(reached)
        self.manager.deactivate(conversation.table, now)

    def _add(self, parts: "_Parts", turn: Turn, at_most: int, now: float) -> None:
        """Plan the turn's missing positions, as many as budget and slots allow, and `at_most` so many."""
        last = min(self.max_step_tokens, parts.num_tokens + at_most)
        if turn.state is not TurnState.RUNNING or not turn.may_compute or parts.num_tokens >= last:
            return
        conversation = turn.conversation
        end = len(conversation.tokens) + turn.num_pending
        runs: list[Run] = []
        while True:
            budget = last - parts.num_tokens
            more = self.manager.schedule(conversation.table, end, budget, now)
            runs += more.runs
            for run in more.runs:
                parts.num_tokens += run.length
            parts.writes += more.writes
            if not more.out_of_slots:
                break
            victim = self._newest_idle_in(parts, turn)
            if victim is not None:
                self._suspend(victim, now)
            elif not runs and len(self.running) > 1 and self.running[-1] is turn:
                self._suspend(turn, now)
                return
            else:
                self._short = turn
                break
        if not runs:
            if (
                more.out_of_slots
                or more.waits
                or turn.num_pending
                or self.manager.held.is_loading(conversation.table)
            ):
                return
            # Blocks of other conversations hold all of it, and yet nobody has this turn's next token: the
            # last position is computed once more, which writes what is there already - unless it attended to
            # a load that fails, so not before all of them have ended.
            runs = [Run(end - 1, 1)]
            parts.num_tokens += 1
        parts.runs[turn] = runs
        draw = None
        if runs[-1].first + runs[-1].length == end:
            draw = RowParams(
                turn.sampling,
                turn.seed,
                end,
                turn.num_generated + turn.num_pending,
                conversation.tokens[:] if turn.needs_history else None,  # a copy: the step runs later
                turn.first_reply_token,
                turn.bad_word_ids,
            )
            parts.turns.append(turn)
        self._add_segments(parts, conversation, turn.row, runs, end, draw)
        turn.caught_up = draw is not None
        turn.num_pending += turn.caught_up

    def _add_idle(self, parts: "_Parts", now: float) -> None:
        """Plan missing positions of the first history that lacks any.  One that does not fit free slots, or
        lacks none, is struck off.
        """
        for conversation, row in list(self._idle.items()):
            table, end = conversation.table, len(conversation.tokens)
            more = Scheduled([], [])
            self.manager.activate(table)
            if self.manager.held.num_missing(table, end) <= self.manager.pool.num_free:
                more = self.manager.schedule(table, end, self.max_step_tokens, now)
                parts.writes += more.writes
            self._deactivate(conversation, now)
            if more.runs:
                self._add_segments(parts, conversation, row, more.runs, end, None)
            if more.runs or more.waits:
                return
            del self._idle[conversation]

    def _add_segments(
        self,
        parts: "_Parts",
        conversation: Conversation,
        row: int,
        runs: Sequence[Run],
        end: int,
        draw: RowParams | None,
    ) -> None:
        """Turn `runs` into segments, the last of which chooses a token if there is a `draw`."""
        tokens, table, size = conversation.tokens, conversation.table, self.manager.block_size
        slots = self.manager.slots(table, end)
        for run in runs:
            stop = run.first + run.length
            ids = None if stop > len(tokens) else tuple(tokens[run.first : stop])
            drawn = draw if run is runs[-1] else None
            parts.segments.append(Segment(row, run.first, ids, slots[: -(-stop // size)], drawn))
        parts.blocks.append(table.blocks[: len(slots)])

    def _newest_idle_in(self, parts: "_Parts", turn: Turn) -> Turn | None:
        """The newest running turn behind `turn`, or any paused one, that this step does not already
        compute.
        """
        for other in reversed(self.running):
            if other is not turn and other not in parts.runs and (other.row > turn.row or other.paused):
                return other
        return None


class _Parts:
    """A step in the making."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.turns: list[Turn] = []
        self.writes: list[Write] = []
        self.blocks: list[BlockIds] = []  # of each conversation in it
        self.runs: dict[Turn, Sequence[Run]] = {}
        self.num_tokens = 0
