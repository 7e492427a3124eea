"""What is measured, defined and computed from the records of one point."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.bench.driver import Sample, TurnRecord
from tools.bench.generator import Observed
from tools.measure import percentile

DEFINITIONS = {
    "turns": "done within the measured time, however long before they were sent; latencies are theirs",
    "TTFT": "from sending the turn to the first delta that holds a token, at the client",
    "TTST": "from the first token's delta to the next delta",
    "ITL": "gap between two deltas / tokens in the later one; a value per token",
    "TPOT": "(E2E - TTFT) / (tokens of the reply - 1); a value per turn",
    "E2E": "from sending the turn to its last event, when it is committed",
    "normalised latency": "E2E / tokens of the reply; the mean and the 90th percentile over turns",
    "goodput": "turns per second that meet every given limit (--slo-ttft-ms, --slo-tpot-ms)",
    "device, host, recomputed": "shares of the tokens of histories whose KV was on the device, came from the "
    "host, or was computed again, over all turns, by the server's usage; history = prompt - new tokens",
    "at the server": "from accepting the turn: until it was first computed for (queue), until its first "
    "token was chosen (TTFT); of that, for copies from the host, for recomputed and for new tokens",
    "resume latency": "from opening a conversation by its id to the first token of the turn said then",
    "TTFT slope": "least squares of TTFT over the length of the history, ms per 1,000 tokens",
    "working set": "tokens in the histories of all conversations that have not ended, mean over the time",
    "CPU per turn": "user and system seconds of the server's process / turns",
    "cancelled turns": "count for TTFT and as cancelled; not as turns, nor for what needs a whole reply",
    "percentiles": "nearest rank",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a turn must meet to count as good; None: no such limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def is_any(self) -> bool:
        return self.ttft_ms is not None or self.tpot_ms is not None

    def met_by(self, record: TurnRecord) -> bool:
        return not (
            (self.ttft_ms is not None and 1000 * ttft_s(record) > self.ttft_ms)
            or (self.tpot_ms is not None and 1000 * (tpot_s(record) or 0.0) > self.tpot_ms)
        )


def ttft_s(record: TurnRecord) -> float:
    return record.deltas[0][0] - record.sent_s


def e2e_s(record: TurnRecord) -> float:
    assert record.done_s is not None
    return record.done_s - record.sent_s


def tpot_s(record: TurnRecord) -> float | None:
    """None for replies of one token."""
    return (e2e_s(record) - ttft_s(record)) / (record.reply_tokens - 1) if record.reply_tokens > 1 else None


def itl_s(record: TurnRecord) -> list[float]:
    gaps: list[float] = []
    for (before_s, _), (at_s, count) in zip(record.deltas, record.deltas[1:], strict=False):
        gaps += [(at_s - before_s) / count] * count
    return gaps


def summary(observed: Observed, warmup_s: float, limits: Limits) -> dict[str, Any]:
    """The figures of one point, by name with its unit; None for what did not occur."""
    measured_s, until_s = observed.measured_s, warmup_s + observed.measured_s
    ended = [
        record
        for record in observed.records
        if record.done_s is not None and warmup_s <= record.done_s <= until_s
    ]
    answered = [record for record in ended if record.deltas and not record.failure]
    whole = [record for record in answered if not record.cancelled]
    sent = [record for record in observed.records if warmup_s <= record.due_s < until_s]
    samples = [sample for sample in observed.samples if warmup_s <= sample.at_s <= until_s]
    working_set = mean([float(sample.live_tokens) for sample in samples])
    good = sum(limits.met_by(record) for record in whole)
    return {
        "measured_s": round(measured_s, 2),
        "turns": len(whole),
        "turns_per_s": _per(len(whole), measured_s),
        "due_turns_per_s": _per(len(sent), measured_s),
        "unfinished_turns": sum(record.done_s is None for record in observed.records),
        "output_tokens_per_s": _per(sum(record.reply_tokens for record in answered), measured_s),
        **_spread("ttft_ms", [1000 * ttft_s(record) for record in answered]),
        **_spread(
            "ttst_ms",
            [1000 * (each.deltas[1][0] - each.deltas[0][0]) for each in answered if len(each.deltas) > 1],
        ),
        **_spread("itl_ms", [1000 * gap for record in answered for gap in itl_s(record)]),
        **_spread("tpot_ms", [1000 * tpot for record in whole if (tpot := tpot_s(record)) is not None]),
        **_spread("e2e_ms", [1000 * e2e_s(record) for record in whole]),
        **_spread("normalised_ms", [1000 * e2e_s(record) / record.reply_tokens for record in whole]),
        **_spread("server_queue_ms", [1000 * record.timing.queue_s for record in answered]),
        **_spread("server_ttft_ms", [1000 * record.timing.ttft_s for record in answered]),
        **_spread("server_reload_ms", [1000 * record.timing.reload_s for record in answered]),
        **_spread("server_recompute_ms", [1000 * record.timing.recompute_s for record in answered]),
        **_spread("server_prefill_ms", [1000 * record.timing.prefill_s for record in answered]),
        "goodput_turns_per_s": _per(good, measured_s) if limits.is_any else None,
        **_sources(answered),
        **_spread(
            "resume_ms",
            [1000 * (each.deltas[0][0] - each.resumed_s) for each in answered if each.resumed_s is not None],
        ),
        "ttft_slope_ms_per_1k": slope(
            [(each.history_tokens / 1000, 1000 * ttft_s(each)) for each in answered]
        ),
        "cancelled_turns": sum(record.cancelled for record in answered),
        "failures": dict(Counter(record.failure for record in ended if record.failure)),
        "working_set_tokens": working_set,
        "working_set_device_tiers": _per(working_set, observed.device_tokens),
        "live_conversations_at_start": observed.live_at_start,
        "server_cpu_s_per_turn": _per(observed.server_cpu_s, len(whole)),
        "generator_cpu_share": _per(observed.generator_cpu_s, measured_s),
        **_spread("generator_late_ms", [1000 * record.late_s for record in sent]),
    }


def series(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Second by second: what happened since the sample before, and how things stand."""
    table: defaultdict[str, list[float]] = defaultdict(list)
    for before, now in zip(samples, samples[1:], strict=False):
        table["at_s"].append(round(now.at_s, 2))
        for name in ("cached_device", "cached_host", "recomputed", "new", "completion", "computed"):
            field = f"{name}_tokens"
            table[field].append(getattr(now.load, field) - getattr(before.load, field))
        table["stored_blocks"].append(now.load.stored_blocks - before.load.stored_blocks)
        table["loaded_blocks"].append(now.load.loaded_blocks - before.load.loaded_blocks)
        table["running_turns"].append(now.load.running_turns)
        table["waiting_turns"].append(now.load.waiting_turns)
        table["device_idle_tokens"].append(now.load.device.idle_tokens)
        table["device_free_tokens"].append(now.load.device.free_tokens)
        table["host_idle_tokens"].append(now.load.host.idle_tokens)
        table["live_tokens"].append(now.live_tokens)
    return dict(table)


def rows(records: Sequence[TurnRecord]) -> dict[str, list[Any]]:
    """A column per property of the turns that were answered, in the order in which they were sent."""
    answered = [
        record for record in records if record.deltas and record.done_s is not None and not record.failure
    ]
    columns: dict[str, Callable[[TurnRecord], Any]] = {
        "conversation": lambda each: each.conversation,
        "turn": lambda each: each.turn,
        "sent_s": lambda each: round(each.sent_s, 3),
        "history_tokens": lambda each: each.history_tokens,
        "new_tokens": lambda each: each.new_tokens,
        "reply_tokens": lambda each: each.reply_tokens,
        "cached_device_tokens": lambda each: each.cached_device_tokens,
        "cached_host_tokens": lambda each: each.cached_host_tokens,
        "recomputed_tokens": lambda each: each.recomputed_tokens,
        "ttft_ms": lambda each: round(1000 * ttft_s(each), 2),
        "e2e_ms": lambda each: round(1000 * e2e_s(each), 2),
        "cancelled": lambda each: each.cancelled,
        "resumed": lambda each: each.resumed_s is not None,
    }
    return {name: [take(record) for record in answered] for name, take in columns.items()}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the line with the least squares; None if all points have the same x."""
    middle_x, middle_y = mean([x for x, _ in points]), mean([y for _, y in points])
    if middle_x is None or middle_y is None:
        return None
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else None


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        f"{name}_mean": mean(values),
        **{f"{name}_{at}": percentile(values, share) if values else None for at, share in shares.items()},
    }


def _sources(answered: Sequence[TurnRecord]) -> dict[str, float | None]:
    history = sum(record.history_tokens for record in answered)
    return {
        "history_tokens": history,
        "cached_device_share": _per(sum(record.cached_device_tokens for record in answered), history),
        "cached_host_share": _per(sum(record.cached_host_tokens for record in answered), history),
        "recomputed_share": _per(sum(record.recomputed_tokens for record in answered), history),
    }


def _per(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None
