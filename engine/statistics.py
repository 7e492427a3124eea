"""Counters of a running engine, and the line that `continuo serve` prints from them while it is busy."""

from dataclasses import dataclass, replace

from engine.batch import StepPlan, StepResult
from engine.cache.manager import CacheStatistics


@dataclass(slots=True)
class Statistics:
    """All since start."""

    num_steps: int = 0
    num_computed: int = 0  # token positions, recomputed ones included
    num_sampled: int = 0  # tokens chosen
    step_s: float = 0.0

    def count(self, plan: StepPlan, result: StepResult) -> None:
        self.num_steps += 1
        self.num_computed += plan.num_tokens
        self.num_sampled += len(result.sampled)
        self.step_s += result.seconds

    def snapshot(self) -> "Statistics":
        return replace(self)


def summary_line(
    now: Statistics, before: Statistics, seconds: float, running: int, waiting: int, cache: CacheStatistics
) -> str | None:
    """What happened in the last `seconds`, or None if nothing did."""
    steps = now.num_steps - before.num_steps
    if not steps:
        return None
    in_use = cache.num_slots - cache.num_free - cache.num_evictable
    return (
        f"{running} running, {waiting} waiting | "
        f"{(now.num_sampled - before.num_sampled) / seconds:.1f} tokens/s out, "
        f"{(now.num_computed - before.num_computed) / seconds:.1f} computed/s | "
        f"KV {in_use / cache.num_slots:.0%} in use, {cache.num_evictable / cache.num_slots:.0%} idle, "
        f"{cache.num_free / cache.num_slots:.0%} free | "
        f"step {1000 * (now.step_s - before.step_s) / steps:.1f} ms"
    )
