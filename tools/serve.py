"""`continuo serve`: an engine behind a port, until it is drained."""

import asyncio
import gc
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from engine import AsyncEngine, EngineConfig, load_engine
from engine.devices import with_device
from engine.errors import ConfigError, EngineError
from engine.statistics import summary_line
from rpc.listen import Address, ServerOptions, authenticator, check_exposure, tls_credentials
from rpc.metrics import serving_metrics
from rpc.server import serve
from tools import logs
from tools.hub import HubError, resolve_model

log = logging.getLogger(__name__)

EXPECTED: tuple[type[Exception], ...] = (EngineError, HubError)
USAGE: tuple[type[Exception], ...] = (ConfigError,)
SUMMARY_INTERVAL_S = 10.0
STEP_TOKENS = {"cpu": 512, "cuda": 2048}
"""Unless told.  On a GPU, launching the kernels of a step takes the host milliseconds, whatever its size."""


def engine_config(chosen: Namespace) -> EngineConfig:
    """The engine that these arguments of `serve` ask for, on this machine.  Raises ConfigError."""
    config = EngineConfig(
        model=chosen.model,
        device=chosen.device,
        dtype=chosen.dtype,
        block_size=chosen.block_size,
        device_kv_tokens=chosen.device_kv_tokens,
        device_kv_bytes=chosen.device_kv_memory,
        host_kv_tokens=chosen.host_kv_tokens,
        host_kv_bytes=chosen.host_kv_memory,
        policy=chosen.policy,
        profile=chosen.profile,
        profile_dir=chosen.profile_dir,
        eager_stores=chosen.eager_stores,
        verify_reloads=chosen.verify_reloads,
        step_profile=chosen.step_profile,
        max_concurrent=chosen.max_concurrent,
        max_queue=chosen.max_queue,
        data_dir=chosen.data_dir,
        stateless=chosen.stateless,
        threads=chosen.threads,
        stall_s=chosen.step_timeout,
    )
    config = with_device(config)
    return replace(config, max_step_tokens=chosen.max_step_tokens or STEP_TOKENS[config.device])


def run(chosen: Namespace) -> int:
    logs.configure(chosen.log_level, chosen.log_json)
    options = ServerOptions(
        listen=chosen.listen,
        token_file=chosen.token_file,
        tls_cert=chosen.tls_cert,
        tls_key=chosen.tls_key,
        insecure=chosen.insecure,
        drain_grace_s=chosen.drain_grace,
    )
    address = check_exposure(options)  # what cannot work is told before the model takes its time to load
    authenticator(options, address)
    tls_credentials(options)
    metrics = None if chosen.metrics is None else Address.parse(chosen.metrics)
    hub_id = chosen.model if isinstance(chosen.model, str) else None
    chosen.model = resolve_model(chosen.model, chosen.revision, chosen.offline)
    engine = load_engine(replace(engine_config(chosen), name=hub_id))
    favour_latency()
    *lines, kernels_line = engine.description
    for line in (*lines, access_line(options), kernels_line):
        log.info("%s", line)
    with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
        return runner.run(_serve(engine, options, metrics, until_eof=chosen.until_eof))


def access_line(options: ServerOptions) -> str:
    """Who may call and who may listen in: the banner's line about exposure."""
    if options.token_file is not None:
        who = f"tokens of {options.token_file}"
    else:
        who = "no tokens: every caller is the tenant local"
    return f"{who} | TLS {'on' if options.tls_cert else 'off'}"


def favour_latency() -> None:
    """Settings of this process's interpreter, for short pauses of the event loop beside a busy step thread.

    What is loaded by now stays: the collector need not visit it.  Conversations hold millions of objects
    without cycles, so the young generation may grow large before it is looked at.  A thread that wants the
    interpreter lock gets it after 1 ms, not 5.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    sys.setswitchinterval(0.001)


async def _serve(
    engine: AsyncEngine, options: ServerOptions, metrics: Address | None, until_eof: bool
) -> int:
    def on_ready(address: str) -> None:
        if until_eof:
            _drain_at_eof()
        print(f"listening on {address}", flush=True)

    async with engine, AsyncExitStack() as stack:
        if metrics is not None:
            at = await stack.enter_async_context(serving_metrics(metrics, engine.load))
            log.info("metrics on http://%s/metrics, without authentication", at)
        reporting = asyncio.create_task(_report(engine))
        try:
            return await serve(engine, options, on_ready)
        finally:
            reporting.cancel()


async def _report(engine: AsyncEngine) -> None:
    """One line per interval in which something was computed."""
    while True:
        before = engine.load()
        await asyncio.sleep(SUMMARY_INTERVAL_S)
        if (line := summary_line(engine.load(), before)) is not None:
            log.info("%s", line)


def _drain_at_eof() -> None:
    """Drains when stdin ends, as it does when the process at its other end is gone, however that ended."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(stdin, 4096):
            loop.remove_reader(stdin)
            signal.raise_signal(signal.SIGTERM)

    try:
        stdin = sys.stdin.fileno()
        loop.add_reader(stdin, read)
    except OSError as error:
        raise ConfigError("--until-eof needs a pipe or a terminal on stdin") from error


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for every platform
        return None
    return uvloop.new_event_loop
