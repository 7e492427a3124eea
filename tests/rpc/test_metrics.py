"""What Prometheus reads, as its own parser understands it."""

import asyncio
import re
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import rpc.metrics
from engine.errors import ConfigError
from rpc.listen import Address
from rpc.metrics import serving_metrics
from tests.loads import a_load

ANY_PORT = Address("127.0.0.1", 0)


async def scrape(address):
    """name{labels} -> value, read as Prometheus does, on a thread of its own."""

    def read():
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            return answer.read().decode()

    families = text_string_to_metric_families(await asyncio.to_thread(read))
    return {
        sample.name.removeprefix("continuo:")
        + "".join(f" {k}={v}" for k, v in sample.labels.items()): sample.value
        for family in families
        for sample in family.samples
    }


async def test_every_number_of_the_load_is_there_under_its_name() -> None:
    async with serving_metrics(ANY_PORT, a_load) as address:
        found = await scrape(address)
    histograms = ("_bucket", "_sum", "_count")
    assert {name: value for name, value in found.items() if not name.split()[0].endswith(histograms)} == {
        "uptime_seconds": 100.0,
        "num_requests_running": 3,
        "num_requests_waiting": 5,
        "num_requests_suspended": 1,
        "kv_cache_usage_perc": 0.25,
        "kv_cache_device_tokens state=in_use": 250,
        "kv_cache_device_tokens state=idle": 500,
        "kv_cache_device_tokens state=free": 250,
        "kv_cache_host_tokens state=in_use": 40,
        "kv_cache_host_tokens state=idle": 3000,
        "kv_cache_host_tokens state=free": 960,
        "conversations state=running": 2,
        "conversations state=waiting": 4,
        "conversations state=attached": 12,
        "conversations state=idle": 2034,
        "accepted_requests_total": 70,
        "request_success_total finished_reason=stop_token": 40,
        "request_success_total finished_reason=length": 20,
        "request_failure_total reason=TURN_CANCELLED": 5,
        "request_refused_total reason=QUEUE_FULL": 9,
        "reattached_streams_total": 7,
        "suspensions_total": 6,
        "prompt_tokens_total": 8000,
        "cached_tokens_total tier=device": 6000,
        "cached_tokens_total tier=host": 350,
        "recomputed_tokens_total cause=evicted": 260,
        "recomputed_tokens_total cause=restart": 110,
        "recomputed_tokens_total cause=rewritten": 67,
        "recomputed_tokens_total cause=cut": 13,
        "new_tokens_total": 1200,
        "never_computed_tokens_total": 180,
        "generation_tokens_total": 3500,
        "computed_tokens_total": 5500,
        "steps_total": 400,
        "step_seconds_total": 16.0,
        "reload_seconds_total": 0.75,
        "recompute_seconds_total": 1.5,
        "evicted_blocks_total": 11,
        "copied_blocks_total to=host": 31,
        "copied_blocks_total to=device": 23,
        "failed_copies_total": 2,
    }


async def test_buckets_of_a_histogram_hold_the_ones_before() -> None:
    async with serving_metrics(ANY_PORT, a_load) as address:
        found = await scrape(address)
    expected = {
        "request_queue_time_seconds": ((60, 60, 60, 60), 0.3),
        "time_to_first_token_seconds": ((0, 60, 60, 60), 3.1),
        "inter_token_latency_seconds": ((3000, 3400, 3430, 3430), 70.5),
        "e2e_request_latency_seconds": ((0, 0, 50, 60), 90.25),
    }
    for name, (cumulative, total) in expected.items():
        bounds = ("0.01", "0.1", "1.0", "+Inf")
        assert tuple(found[f"{name}_bucket le={bound}"] for bound in bounds) == cumulative, name
        assert (found[f"{name}_count"], found[f"{name}_sum"]) == (cumulative[-1], total), name


async def test_the_readme_names_every_metric_and_no_other() -> None:
    readme = Path(rpc.metrics.__file__).with_name("README.md").read_text()
    (table,) = re.findall(r"^\| `continuo:.*?\n\n", readme, re.MULTILINE | re.DOTALL)
    rows = [row.split("|")[1] for row in table.splitlines()[2:] if row]
    async with serving_metrics(ANY_PORT, a_load) as address:
        found = await scrape(address)
    served = {re.sub(r"_(bucket|sum|count)$", "", name.split()[0]) for name in found}
    assert served == set(re.findall(r"`(\w+)`", "".join(rows)))


async def test_each_scrape_takes_a_new_snapshot_on_the_event_loop() -> None:
    threads, steps = set(), iter((1, 2))

    def load():
        threads.add(threading.get_ident())
        return a_load(steps=next(steps))

    async with serving_metrics(ANY_PORT, load) as address:
        assert [(await scrape(address))["steps_total"] for _ in range(2)] == [1, 2]
    assert threads == {threading.get_ident()}


async def test_a_snapshot_that_fails_is_an_error_and_the_next_one_is_served(capfd) -> None:
    async def broken_then_fine():
        with pytest.raises(urllib.error.HTTPError, match="500"):
            await scrape(address)
        return await scrape(address)

    loads = iter((lambda: 1 // 0, a_load))
    async with serving_metrics(ANY_PORT, lambda: next(loads)()) as address:
        assert (await broken_then_fine())["steps_total"] == 400
    assert "ZeroDivisionError" in capfd.readouterr().err


async def test_a_taken_port_is_told_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"cannot serve metrics on {address}: Address already in use"):
            async with serving_metrics(address, a_load):
                pass


async def test_nobody_listens_any_more_when_it_is_over() -> None:
    async with serving_metrics(ANY_PORT, a_load) as address:
        await scrape(address)
    with pytest.raises(urllib.error.URLError, match="refused"):
        await scrape(address)
