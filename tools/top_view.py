"""What `continuo top` shows: the difference of two answers of `GetLoad`, as lines of text."""

from collections.abc import Mapping, Sequence

from rpc._generated import continuo_pb2 as pb

BAR = 24  # characters
LABEL = 15


def since_start(now: pb.GetLoadResponse) -> pb.GetLoadResponse:
    """What `now` is to be compared with to show all since the server's start."""
    nothing = pb.GetLoadResponse()
    for name in ("queue_s", "ttft_s", "inter_token_s", "total_s"):
        observed: pb.Histogram = getattr(now, name)
        empty: pb.Histogram = getattr(nothing, name)
        empty.bounds.extend(observed.bounds)
        empty.counts.extend([0] * len(observed.counts))
    return nothing


def line(now: pb.GetLoadResponse, before: pb.GetLoadResponse) -> str:
    """All that matters in one line, for a file or another program."""
    states, device = now.conversations, now.device
    causes = _causes(now, before)
    sources = _sources(now, before) + (f"; recomputed: {causes}" if causes else "")
    return (
        f"{_turns(now)} | "
        f"{_rate(now, before, 'completion_tokens'):.1f} tokens/s out, "
        f"{_rate(now, before, 'prompt_tokens'):.1f} in{sources} | "
        f"first token {_milliseconds(now.ttft_s, before.ttft_s, 0.5)} | "
        f"KV {_residency(device)} | {states.attached} attached, {states.idle} idle"
    )


def page(title: str, now: pb.GetLoadResponse, before: pb.GetLoadResponse) -> list[str]:
    """For a terminal, a fixed number of rows."""
    states, device, host = now.conversations, now.device, now.host
    seconds = now.uptime_s - before.uptime_s
    steps = now.steps - before.steps
    rows = {
        "turns": f"{_turns(now)}, {_rate(now, before, 'finished_turns'):.1f}/s done",
        "conversations": f"{states.running} running, {states.waiting} waiting, "
        f"{states.attached} attached, {states.idle:,} idle",
        "tokens out": f"{_rate(now, before, 'completion_tokens'):,.0f}/s",
        "tokens in": f"{_rate(now, before, 'prompt_tokens'):,.0f}/s{_sources(now, before)}",
        "recomputed": _causes(now, before) or "none",
        "steps": f"{steps / seconds:,.1f}/s"
        + (f", {1000 * (now.step_s - before.step_s) / steps:.1f} ms each" if steps else ""),
        "device KV": f"{_bar(device)} of {device.total_tokens:,} tokens",
        "": _residency(device),
        **({"host KV": f"{_bar(host)} of {host.total_tokens:,} tokens"} if host.total_tokens else {}),
        "queue": _quantiles(now.queue_s, before.queue_s),
        "first token": _quantiles(now.ttft_s, before.ttft_s),
        "between tokens": _quantiles(now.inter_token_s, before.inter_token_s),
        "whole turn": _quantiles(now.total_s, before.total_s),
        "since start": f"turns done: {sum(now.finished_turns.values()):,}, "
        f"streams resumed: {now.reattached_streams:,}, blocks evicted: {now.evicted_blocks:,}",
        "failed": _reasons(now.failed_turns),
        "refused": _reasons(now.refused_turns),
    }
    head = f"{title}, up {_duration(now.uptime_s)}; rates and times over {_duration(seconds)}"
    return [head, "", *(f"{label:{LABEL}} {text}" for label, text in rows.items())]


def _turns(now: pb.GetLoadResponse) -> str:
    suspended = f" ({now.suspended_turns} suspended)" if now.suspended_turns else ""
    return f"{now.running_turns} running, {now.waiting_turns} waiting{suspended}"


def _rate(now: pb.GetLoadResponse, before: pb.GetLoadResponse, name: str) -> float:
    """Per second."""
    grown = _total(getattr(now, name)) - _total(getattr(before, name))
    return grown / (now.uptime_s - before.uptime_s)


def _total(value: float | Mapping[str, int]) -> float:
    return sum(value.values()) if isinstance(value, Mapping) else value


def _sources(now: pb.GetLoadResponse, before: pb.GetLoadResponse) -> str:
    """Where the prompts' tokens came from, if there were any."""
    prompt = now.prompt_tokens - before.prompt_tokens
    if not prompt:
        return ""
    names = {"cached_device_tokens": "reused"}
    names |= {"cached_host_tokens": "from host"} if now.host.total_tokens else {}
    names |= {"recomputed_tokens": "recomputed", "new_tokens": "new"}
    grown = {what: getattr(now, name) - getattr(before, name) for name, what in names.items()}
    return ": " + ", ".join(f"{count / prompt:.0%} {what}" for what, count in grown.items())


def _causes(now: pb.GetLoadResponse, before: pb.GetLoadResponse) -> str:
    """Why some of them were computed again, as shares of those."""
    grown = {
        "evicted": now.evicted_tokens - before.evicted_tokens,
        "restart": now.restart_tokens - before.restart_tokens,
        "rewritten": now.rewritten_tokens - before.rewritten_tokens,
        "cut": now.cut_tokens - before.cut_tokens,
    }
    total = sum(grown.values())
    return ", ".join(f"{count / total:.0%} {why}" for why, count in grown.items() if count)


def _residency(tier: pb.Tier) -> str:
    parts = {"in use": tier.in_use_tokens, "idle": tier.idle_tokens, "free": tier.free_tokens}
    return ", ".join(f"{tokens / tier.total_tokens:.0%} {what}" for what, tokens in parts.items())


def _bar(tier: pb.Tier) -> str:
    in_use = round(BAR * tier.in_use_tokens / tier.total_tokens)
    held = round(BAR * (tier.in_use_tokens + tier.idle_tokens) / tier.total_tokens)
    return "█" * in_use + "▒" * (held - in_use) + "░" * (BAR - held)


def _quantiles(now: pb.Histogram, before: pb.Histogram) -> str:
    median, high = (_milliseconds(now, before, share) for share in (0.5, 0.95))
    return f"{median:>9} median {high:>9} 95th percentile"


def _milliseconds(now: pb.Histogram, before: pb.Histogram, share: float) -> str:
    counts = [after - earlier for after, earlier in zip(now.counts, before.counts, strict=True)]
    seconds = quantile(now.bounds, counts, share)
    return "-" if seconds is None else f"{1000 * seconds:,.0f} ms"


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """As Prometheus estimates it: evenly spread within a bucket, and never above the last bound."""
    wanted = share * sum(counts)
    if not wanted:
        return None
    below, low = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if below + count >= wanted:
            return low + (bound - low) * (wanted - below) / count
        below, low = below + count, bound
    return bounds[-1]


def _reasons(counts: Mapping[str, int]) -> str:
    if not counts:
        return "none"
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
