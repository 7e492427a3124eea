"""Which tokens the next step computes: one token budget, no phases.

Turns that decode come first, then prompts in chunks, first come first served, then the queue.  A turn that
was suspended or whose history lost blocks simply has more missing positions than others.  When slots run
out, the newest running turn is suspended: its blocks become evictable and it goes back to the head of the
queue.  So is a paused turn, whose reader is slow, as soon as another turn waits.
"""

from collections import deque
from dataclasses import dataclass

from engine.batch import RowParams, Segment, StepPlan
from engine.cache.block import Block
from engine.cache.manager import KVCacheManager, Run, Write
from engine.conversation import Turn, TurnState
from engine.types import Usage

RESERVED_SHARE = 0.1
"""Of the slots, kept for turns that run already; nothing is admitted into it (Pensieve, section 4.3.2)."""


@dataclass(frozen=True, slots=True)
class Step:
    """A plan together with what must be undone or confirmed when it has run."""

    plan: StepPlan
    turns: tuple[Turn, ...]  # of the segments that choose a token, in their order
    blocks: tuple[Block, ...]  # pinned while it runs
    writes: tuple[Write, ...]


class Scheduler:
    def __init__(self, manager: KVCacheManager, max_step_tokens: int, max_concurrent: int) -> None:
        self.manager = manager
        self.max_step_tokens = max_step_tokens
        self.max_concurrent = max_concurrent
        self.waiting: deque[Turn] = deque()
        self.running: list[Turn] = []  # in order of arrival
        self._short: Turn | None = None  # found no slots last time: goes first
        self._num_steps = 0

    @property
    def num_waiting(self) -> int:
        """Turns that would run if they could; those whose readers are slow do not want to."""
        return sum(not turn.paused for turn in self.waiting)

    def submit(self, turn: Turn) -> None:
        self.waiting.append(turn)

    def remove(self, turn: Turn, now: float) -> None:
        """The turn is over or given up.  Its blocks stay with the conversation, evictable from now on."""
        if turn.state is TurnState.RUNNING:
            self._stop(turn, now)
        elif turn.state is TurnState.WAITING:
            self.waiting.remove(turn)
        turn.state = TurnState.FINISHED

    def schedule(self, now: float) -> Step | None:
        """The next step, with its blocks pinned; None if nothing can be computed now."""
        self._num_steps += 1
        parts = _Parts()
        if self.num_waiting:
            for turn in [turn for turn in self.running if turn.paused]:
                self._suspend(turn, now)
        short, self._short = self._short, None
        order = sorted(self.running, key=lambda turn: (turn is not short, not turn.caught_up))
        for turn in order:
            if (
                turn.state is TurnState.RUNNING
                and turn.may_compute
                and parts.num_tokens < self.max_step_tokens
            ):
                self._add(parts, turn, now)
        while len(self.running) < self.max_concurrent and parts.num_tokens < self.max_step_tokens:
            first = next((turn for turn in self.waiting if not turn.paused), None)
            if first is None or not self._fits(first):
                break
            self.waiting.remove(first)
            self._start(first, now)
            self._add(parts, first, now)
        if not parts.segments:
            return None
        blocks = tuple(parts.blocks)
        self.manager.pin(blocks)
        plan = StepPlan(self._num_steps, tuple(parts.segments))
        return Step(plan, tuple(parts.turns), blocks, tuple(parts.writes))

    # -- private

    def _fits(self, turn: Turn) -> bool:
        table, manager = turn.conversation.table, self.manager
        reserve = int(manager.pool.num_slots * RESERVED_SHARE) if self.running else 0
        own = sum(block.evictable for block in table.blocks)
        missing = manager.num_missing(table, len(turn.conversation.tokens) + 1)
        return missing <= manager.num_available - own - reserve

    def _start(self, turn: Turn, now: float) -> None:
        conversation = turn.conversation
        self.manager.activate(conversation.table)
        turn.state = TurnState.RUNNING
        at = next((i for i, other in enumerate(self.running) if other.row > turn.row), len(self.running))
        self.running.insert(at, turn)
        if turn.usage is None:
            turn.started_s = now
            turn.usage = self._usage(turn)

    def _usage(self, turn: Turn) -> Usage:
        """The last token is computed in any case: its logits choose the reply's first."""
        conversation, num_cached = turn.conversation, self.manager.num_cached
        prompt, history = len(conversation.tokens), conversation.num_computed
        cached = num_cached(conversation.table, prompt - 1)
        recomputed = history - num_cached(conversation.table, history)
        return Usage(
            prompt_tokens=prompt,
            cached_device_tokens=cached,
            recomputed_tokens=recomputed,
            new_tokens=prompt - cached - recomputed,
        )

    def _suspend(self, turn: Turn, now: float) -> None:
        self._stop(turn, now)
        turn.state, turn.caught_up = TurnState.WAITING, False
        self.waiting.appendleft(turn)

    def _stop(self, turn: Turn, now: float) -> None:
        conversation = turn.conversation
        reached = self.manager.num_cached(conversation.table, len(conversation.tokens))
        conversation.num_computed = max(conversation.num_computed, reached)
        self.running.remove(turn)
        self.manager.deactivate(conversation.table, now)

    def _add(self, parts: "_Parts", turn: Turn, now: float) -> None:
        """Plan the turn's missing positions, as many as budget and slots allow."""
        conversation = turn.conversation
        known, end = len(conversation.tokens), len(conversation.tokens) + turn.num_pending
        runs: list[Run] = []
        while True:
            budget = self.max_step_tokens - parts.num_tokens
            more, writes, out_of_slots = self.manager.schedule(conversation.table, end, budget, now)
            runs += more
            parts.num_tokens += sum(run.length for run in more)
            parts.writes += writes
            parts.blocks.update(dict.fromkeys(write.block for write in writes))
            if not out_of_slots:
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
            if out_of_slots or turn.num_pending:
                return
            # Blocks of other conversations hold all of it, and yet nobody has this turn's next token: the
            # last position is computed once more, which writes what is there already.
            runs = [Run(end - 1, 1)]
            parts.num_tokens += 1
        parts.in_plan.add(turn)
        slots = self.manager.slots(conversation.table, end)
        size = self.manager.block_size
        for run in runs:
            stop = run.first + run.length
            ids = None if stop > known else tuple(conversation.tokens[run.first : stop])
            draw = None
            if stop == end:
                draw = RowParams(turn.sampling, turn.seed, end, turn.num_generated + turn.num_pending)
                parts.turns.append(turn)
            parts.segments.append(Segment(turn.row, run.first, ids, tuple(slots[: -(-stop // size)]), draw))
        turn.caught_up = runs[-1].first + runs[-1].length == end
        if turn.caught_up:
            turn.num_pending += 1
        parts.blocks.update(dict.fromkeys(block for block in conversation.table.blocks[: len(slots)]))

    def _newest_idle_in(self, parts: "_Parts", turn: Turn) -> Turn | None:
        """The newest running turn behind `turn`, or any paused one, that this step does not already
        compute.
        """
        for other in reversed(self.running):
            if other is not turn and other not in parts.in_plan and (other.row > turn.row or other.paused):
                return other
        return None


class _Parts:
    """A step in the making."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.turns: list[Turn] = []
        self.writes: list[Write] = []
        self.blocks: dict[Block, None] = {}
        self.in_plan: set[Turn] = set()
        self.num_tokens = 0
