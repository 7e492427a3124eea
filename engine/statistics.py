"""Counters of a running engine, and the one snapshot of them that serves `GetLoad`, metrics and the log.

Called on the event loop only.  A token costs a few additions; a snapshot visits every conversation in memory.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields

from engine.batch import StepPlan, StepResult
from engine.conversation import Turn, TurnState
from engine.errors import EngineError, reason_of
from engine.live import LiveConversation
from engine.load import ConversationCounts, Histogram, Load, Tier
from engine.scheduler import Scheduler
from engine.types import FinishReason, TurnRecord, Usage

BOUNDS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0),
)

PROMPT_FIELDS = [
    field.name for field in fields(Usage) if field.name not in ("completion_tokens", "unseen_tokens")
]


class Observations:
    """Of one kind of time."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._sum += seconds

    def histogram(self) -> Histogram:
        return Histogram(BOUNDS_S, tuple(self._counts), self._sum)


class Statistics:
    """All since `now`, the monotonic time at which it is made."""

    def __init__(self, now: float) -> None:
        self._begin_s = now
        self._accepted = 0
        self._finished: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._reattached = 0
        self._suspensions = 0
        self._prompts = dict.fromkeys(PROMPT_FIELDS, 0)
        self._completion_tokens = self._computed_tokens = self._steps = 0
        self._step_s = self._reload_s = self._recompute_s = 0.0
        self._queue, self._ttft, self._total = Observations(), Observations(), Observations()
        self._inter_token = Observations()
        self._last_token_s: dict[int, float] = {}  # by Turn.row, of turns in flight

    # -- what happens

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Around the acceptance of a turn: an EngineError that leaves it counts as a refusal."""
        try:
            yield
        except EngineError as error:
            self._refused[reason_of(error)] += 1
            raise

    def turn_accepted(self) -> None:
        self._accepted += 1

    def turn_suspended(self) -> None:
        """Others need its memory."""
        self._suspensions += 1

    def turn_done(self, turn: Turn, record: TurnRecord) -> None:
        """The turn is over and stays."""
        self._last_token_s.pop(turn.row, None)
        self._finished[record.finish_reason.name] += 1
        if record.finish_reason is FinishReason.APPENDED:  # nobody waits for a reply
            self._add_prompt(record.usage)
        else:
            self._total.add(record.timing.total_s)

    def turn_failed(self, turn: Turn, error: Exception) -> None:
        """The turn is over and leaves no trace."""
        self._last_token_s.pop(turn.row, None)
        self._failed[reason_of(error)] += 1

    def reattached(self) -> None:
        """A stream resumed a conversation."""
        self._reattached += 1

    def step_done(self, plan: StepPlan, result: StepResult, turns: Iterable[Turn], now: float) -> None:
        """`turns` got a token each."""
        self._steps += 1
        self._step_s += result.seconds
        self._computed_tokens += plan.num_tokens
        for turn in turns:
            self._completion_tokens += 1
            last_s = self._last_token_s.get(turn.row)
            self._last_token_s[turn.row] = now
            if last_s is None:
                self._first_token(turn, now)
            else:
                self._inter_token.add(now - last_s)

    def _first_token(self, turn: Turn, now: float) -> None:
        self._ttft.add(now - turn.arrived_s)
        self._queue.add((now if turn.started_s is None else turn.started_s) - turn.arrived_s)
        self._add_prompt(turn.usage or Usage())
        self._reload_s += turn.reload_s
        self._recompute_s += turn.recompute_s

    def _add_prompt(self, usage: Usage) -> None:
        for name in PROMPT_FIELDS:
            self._prompts[name] += getattr(usage, name)

    # -- looking in

    def load(self, now: float, scheduler: Scheduler, conversations: Iterable[LiveConversation]) -> Load:
        cache, size = scheduler.manager.statistics(), scheduler.manager.block_size
        states = Counter(map(_state, conversations))
        return Load(
            uptime_s=now - self._begin_s,
            running_turns=len(scheduler.running),
            waiting_turns=len(scheduler.waiting),
            suspended_turns=sum(turn.usage is not None for turn in scheduler.waiting),
            conversations=ConversationCounts(
                states["running"], states["waiting"], states["attached"], states["idle"]
            ),
            device=_tier(cache.num_slots, cache.num_evictable, cache.num_free, size),
            host=_tier(cache.num_host_slots, cache.num_host_evictable, cache.num_host_free, size),
            accepted_turns=self._accepted,
            finished_turns=dict(self._finished),
            failed_turns=dict(self._failed),
            refused_turns=dict(self._refused),
            reattached_streams=self._reattached,
            suspensions=self._suspensions,
            **self._prompts,
            completion_tokens=self._completion_tokens,
            computed_tokens=self._computed_tokens,
            steps=self._steps,
            step_s=self._step_s,
            reload_s=self._reload_s,
            recompute_s=self._recompute_s,
            evicted_blocks=cache.num_evicted,
            stored_blocks=cache.num_stored,
            loaded_blocks=cache.num_loaded,
            failed_copies=cache.num_failed_copies,
            queue_s=self._queue.histogram(),
            ttft_s=self._ttft.histogram(),
            inter_token_s=self._inter_token.histogram(),
            total_s=self._total.histogram(),
        )


def _tier(num_slots: int, num_idle: int, num_free: int, block_size: int) -> Tier:
    in_use = num_slots - num_idle - num_free
    return Tier(*(count * block_size for count in (num_slots, in_use, num_idle, num_free)))


def _state(live: LiveConversation) -> str:
    if live.flight is not None:
        return "waiting" if live.flight.turn.state is TurnState.WAITING else "running"
    return "idle" if live.outbox is None else "attached"


def summary_line(now: Load, before: Load) -> str | None:
    """What happened between two snapshots, or None if nothing was computed."""
    steps, seconds = now.steps - before.steps, now.uptime_s - before.uptime_s
    if not steps:
        return None
    device = now.device
    return (
        f"{now.running_turns} running, {now.waiting_turns} waiting | "
        f"{(now.completion_tokens - before.completion_tokens) / seconds:.1f} tokens/s out, "
        f"{(now.computed_tokens - before.computed_tokens) / seconds:.1f} computed/s | "
        f"KV {device.in_use_tokens / device.total_tokens:.0%} in use, "
        f"{device.idle_tokens / device.total_tokens:.0%} idle, "
        f"{device.free_tokens / device.total_tokens:.0%} free | "
        f"step {1000 * (now.step_s - before.step_s) / steps:.1f} ms"
    )
