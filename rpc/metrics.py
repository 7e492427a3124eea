"""Metrics for Prometheus, made of the same snapshot that `GetLoad` gives: nothing is counted twice.

Names follow vLLM's where both count the same.  Counts alone leave the server: no id and no text.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from itertools import accumulate

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.errors import ConfigError
from engine.load import Histogram, Load, Tier
from rpc.listen import Address

SNAPSHOT_S = 5.0  # a scrape waits so long for the event loop


@asynccontextmanager
async def serving_metrics(address: Address, load: Callable[[], Load]) -> AsyncIterator[Address]:
    """While inside, http://ADDRESS/metrics tells anybody who asks; gives the real address.  ConfigError.

    Requests are answered on threads of their own; `load` is called on this event loop.
    """
    loop = asyncio.get_running_loop()

    async def take() -> Load:
        return load()

    registry = CollectorRegistry()
    registry.register(
        LoadCollector(lambda: asyncio.run_coroutine_threadsafe(take(), loop).result(SNAPSHOT_S))
    )
    try:
        server, _ = start_http_server(address.port, address.host.strip("[]"), registry)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {address}: {error.strerror or error}") from error
    try:
        yield Address(address.host, server.server_port)
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


class LoadCollector(Collector):
    """Takes a snapshot for each scrape."""

    def __init__(self, take: Callable[[], Load]) -> None:
        self._take = take

    def collect(self) -> Iterable[Metric]:
        return metrics(self._take())


def metrics(load: Load) -> list[Metric]:
    device, host = load.device, load.host
    endings = {reason.lower(): count for reason, count in load.finished_turns.items()}
    cached = {"device": load.cached_device_tokens, "host": load.cached_host_tokens}
    copied = {"host": load.stored_blocks, "device": load.loaded_blocks}
    again = {
        "evicted": load.evicted_tokens,
        "restart": load.restart_tokens,
        "rewritten": load.rewritten_tokens,
        "cut": load.cut_tokens,
    }
    usage = device.in_use_tokens / device.total_tokens
    return [
        _gauge("uptime_seconds", "Since the engine was loaded.", load.uptime_s),
        _gauge("num_requests_running", "Turns that are computed now.", load.running_turns),
        _gauge("num_requests_waiting", "Turns that wait, or are suspended.", load.waiting_turns),
        _gauge("num_requests_suspended", "Those of them that had begun to run.", load.suspended_turns),
        _gauge("kv_cache_usage_perc", "Used by running turns; 1 = all of it.", usage),
        _gauges("kv_cache_device_tokens", "KV memory, by what it holds.", "state", _residency(device)),
        _gauges("kv_cache_host_tokens", "The same of host memory.", "state", _residency(host)),
        _gauges("conversations", "Those in memory, by what they do.", "state", asdict(load.conversations)),
        _counter("accepted_requests", "Turns that were accepted.", load.accepted_turns),
        _counters("request_success", "Turns that were committed.", "finished_reason", endings),
        _counters("request_failure", "Turns that were accepted in vain.", "reason", load.failed_turns),
        _counters("request_refused", "Turns that were not accepted.", "reason", load.refused_turns),
        _counter("reattached_streams", "Streams that resumed a conversation.", load.reattached_streams),
        _counter("suspensions", "Running turns whose memory others needed.", load.suspensions),
        _counter(
            "prompt_tokens",
            "History and new of replies, and appends.",
            load.prompt_tokens,
        ),
        _counters("cached_tokens", "Prompt tokens whose KV was in memory.", "tier", cached),
        _counters("recomputed_tokens", "Prompt tokens that were computed again, by why.", "cause", again),
        _counter("new_tokens", "Prompt tokens that were never computed before.", load.new_tokens),
        _counter("never_computed_tokens", "Those of them that were history.", load.never_computed_tokens),
        _counter("generation_tokens", "Tokens of replies.", load.completion_tokens),
        _counter("computed_tokens", "Positions that went through the model.", load.computed_tokens),
        _counter("steps", "Forward passes.", load.steps),
        _counter("step_seconds", "Time in forward passes.", load.step_s),
        _counter("reload_seconds", "Copies from the host, of turns up to their first token.", load.reload_s),
        _counter("recompute_seconds", "The same of recomputed tokens.", load.recompute_s),
        _counter("evicted_blocks", "KV blocks given up to make room.", load.evicted_blocks),
        _counters("copied_blocks", "KV blocks copied between the tiers.", "to", copied),
        _counter("failed_copies", "KV blocks whose copy failed.", load.failed_copies),
        _histogram("request_queue_time_seconds", "Acceptance to first step.", load.queue_s),
        _histogram("time_to_first_token_seconds", "Acceptance to first token.", load.ttft_s),
        _histogram("inter_token_latency_seconds", "Between two tokens of a reply.", load.inter_token_s),
        _histogram("e2e_request_latency_seconds", "Acceptance to last token.", load.total_s),
    ]


def _residency(tier: Tier) -> dict[str, float]:
    return {"in_use": tier.in_use_tokens, "idle": tier.idle_tokens, "free": tier.free_tokens}


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"continuo:{name}", what, value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"continuo:{name}", what, value)


def _gauges(name: str, what: str, label: str, values: Mapping[str, float]) -> Metric:
    return _filled(GaugeMetricFamily(f"continuo:{name}", what, labels=[label]), values)


def _counters(name: str, what: str, label: str, values: Mapping[str, float]) -> Metric:
    return _filled(CounterMetricFamily(f"continuo:{name}", what, labels=[label]), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]) -> Metric:
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, what: str, observed: Histogram) -> Metric:
    """Prometheus counts cumulatively: each bucket holds the ones before."""
    bounds = [*map(str, observed.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(observed.counts), strict=True))
    return HistogramMetricFamily(f"continuo:{name}", what, buckets, observed.sum)
