"""The load generator: a process of its own, so that neither plots nor servers disturb its clock.

It runs at low priority and reports its own CPU share and how late it woke up for turns that were due: with
much of either, the figures are about the generator.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rpc.client import ContinuoClient, ContinuoError, PermissionDenied, Unavailable
from tools.bench.driver import Driver, Manner, Sample, TurnRecord
from tools.bench.population import Population, Recorded, resident_tokens, think_factor
from tools.bench.workload import Exchange, Script

NICE = 2  # two thirds of the weight of a server on the same core
TEMPLATE_TOKENS = 16  # room for what a chat template puts around a message
ERASING = 16  # conversations at once


@dataclass(frozen=True, slots=True)
class Order:
    """One point of a sweep, for the generator's process."""

    address: str
    token: str | None
    tls: str | bool
    pool: Sequence[Script]  # to draw from, or
    starts: Sequence[tuple[float, Script]]  # a trace that has its own arrivals
    rate: float | None  # None: the pool's think times and `size` give it
    size: int | None  # of a closed population
    manner: Manner
    server_pid: int | None  # whose CPU time is to be read
    is_guest: bool  # the server goes on afterwards: nothing is left behind there


@dataclass(slots=True)
class Observed:
    """What a point came to.  `lost` says why the server was, and the rest is what there was until then."""

    records: list[TurnRecord] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    measured_s: float = 0.0
    live_at_start: int = 0
    expected_tokens: float = 0.0  # that live conversations hold, in the steady state
    device_tokens: int = 0
    host_tokens: int = 0
    context_tokens: int = 0
    left_out: int = 0  # scripts whose first turn is too long already
    cut: int = 0  # scripts that end before their last turn
    fill_s: float = 0.0
    generator_cpu_s: float = 0.0
    server_cpu_s: float | None = None
    server: dict[str, str] = field(default_factory=dict)
    lost: str = ""
    measured_from_s: float = 0.0  # by time.monotonic, which all processes share
    steps: list[dict[str, Any]] = field(default_factory=list)  # where their time went, if that was asked for


@dataclass(frozen=True, slots=True)
class Progress:
    what: str
    share: float


class NothingFits(Exception):
    """The server's context is too short for every conversation of the workload."""


def generate(order: Order, pipe: Connection) -> None:
    """The process: sends `Progress` while it goes, at last what was observed or an exception to raise."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this ends it
    os.nice(NICE)
    try:
        with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            pipe.send(runner.run(observe(order, lambda what, share: pipe.send(Progress(what, share)))))
    except (ContinuoError, NothingFits) as error:
        pipe.send(error)


async def observe(order: Order, on_progress: Callable[[str, float], None]) -> Observed:
    """Raises ContinuoError if the server refuses to be measured at all, and NothingFits."""
    observed = Observed()
    tls = Path(order.tls) if isinstance(order.tls, str) else order.tls
    async with ContinuoClient(order.address, token=order.token, tls=tls, retry=False) as client:
        info = await client.model_info()
        observed.context_tokens = info.limits.context_tokens
        observed.server = {
            name: getattr(info, name) for name in ("name", "version", "architecture", "dtype", "device")
        }
        can_sample = await _take_sizes(client, observed)
        people = await _people(client, order, observed)
        driver = Driver(client, people, order.manner, info.vocab_size)
        observed.records, observed.samples = driver.records, driver.samples
        try:
            await _measure(driver, order, observed, can_sample, on_progress)
            if order.is_guest:
                await _erase(client, driver.ids)
        except Unavailable as error:
            observed.lost = str(error)
    return observed


async def _measure(
    driver: Driver,
    order: Order,
    observed: Observed,
    can_sample: bool,
    on_progress: Callable[[str, float], None],
) -> None:
    begun = time.monotonic()
    await driver.fill(lambda done, of: on_progress(f"filling, {done} of {of} conversations", done / of))
    observed.live_at_start, observed.fill_s = len(driver.live), time.monotonic() - begun
    warmup_s, duration_s = order.manner.warmup_s, order.manner.duration_s
    readings: list[tuple[float, float, float | None]] = []

    async def read_at_start() -> None:
        await asyncio.sleep(warmup_s)
        observed.measured_from_s = time.monotonic()
        readings.append((driver.now_s, time.process_time(), cpu_seconds(order.server_pid)))

    async def tell() -> None:
        while True:
            at = driver.now_s
            what = "warming up" if at < warmup_s else "measuring"
            on_progress(f"{what}, {len(driver.records)} turns", min(1.0, at / (warmup_s + duration_s)))
            await asyncio.sleep(0.5)

    watching = [asyncio.create_task(read_at_start()), asyncio.create_task(tell())]
    try:
        await driver.run(can_sample)
    finally:
        for since_s, own_s, server_s in readings:  # one, unless it did not come that far
            observed.measured_s = min(driver.now_s - since_s, duration_s)
            observed.generator_cpu_s = time.process_time() - own_s
            now_s = cpu_seconds(order.server_pid)
            observed.server_cpu_s = None if now_s is None or server_s is None else now_s - server_s
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def _take_sizes(client: ContinuoClient, observed: Observed) -> bool:
    """Whether the server lets itself be watched."""
    try:
        load = await client.load()
    except PermissionDenied:
        return False
    observed.device_tokens, observed.host_tokens = load.device.total_tokens, load.host.total_tokens
    return True


async def _people(client: ContinuoClient, order: Order, observed: Observed) -> Population | Recorded:
    """The conversations, cut to the server's context; think times stretched to meet rate and number."""
    if order.starts:
        fitting = [(at_s, script.within(observed.context_tokens)) for at_s, script in order.starts]
        _note_cuts(observed, [script for _, script in order.starts], [script for _, script in fitting])
        return Recorded([(at_s, script) for at_s, script in fitting if script.exchanges])
    whole = [await _counted(client, script) for script in order.pool]
    pool = [script.within(observed.context_tokens) for script in whole]
    _note_cuts(observed, whole, pool)
    pool = [script for script in pool if script.exchanges]
    if order.size is not None and order.rate is not None:
        if not any(script.life_s for script in pool):
            raise NothingFits(
                "no conversation that fits has a second turn; a rate cannot be met by thinking longer"
            )
        factor = think_factor(pool, order.rate, order.size)
        pool = [script.paced(factor) for script in pool]
    people = Population(pool, order.manner.seed, order.rate or 1.0, order.size)
    observed.expected_tokens = resident_tokens(pool, people.size)
    return people


def _note_cuts(observed: Observed, whole: Sequence[Script], fitting: Sequence[Script]) -> None:
    observed.left_out = sum(not script.exchanges for script in fitting)
    observed.cut = sum(
        0 < len(after.exchanges) < len(before.exchanges) for before, after in zip(whole, fitting, strict=True)
    )
    if observed.left_out == len(fitting):
        raise NothingFits(
            f"no conversation of the workload fits the server's context of {observed.context_tokens} tokens; "
            "give it a larger --device-kv-tokens, or take a smaller --scale"
        )


async def _counted(client: ContinuoClient, script: Script) -> Script:
    """With the lengths of its texts, by the server's tokenizer."""

    async def counted(exchange: Exchange) -> Exchange:
        said, answered = await asyncio.gather(
            client.tokenize(exchange.text), client.tokenize(exchange.reply_text)
        )
        return replace(exchange, new_tokens=len(said) + TEMPLATE_TOKENS, reply_tokens=max(1, len(answered)))

    if not script.exchanges[0].text:
        return script
    return replace(script, exchanges=tuple([await counted(each) for each in script.exchanges]))


async def _erase(client: ContinuoClient, ids: Sequence[str]) -> None:
    waiting = iter(ids)

    async def erase_some() -> None:
        for id in waiting:
            with suppress(ContinuoError):
                await client.delete(id)

    await asyncio.gather(*(erase_some() for _ in range(ERASING)))


def cpu_seconds(pid: int | None) -> float | None:
    """User and system time of a process and all its threads; None where it cannot be read."""
    try:
        fields: list[Any] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for every platform
        return None
    return uvloop.new_event_loop
