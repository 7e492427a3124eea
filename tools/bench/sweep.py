"""Runs a plan: for every point a server, unless one runs already, and a generator, each in its process."""

import asyncio
import multiprocessing
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from rpc.client import Unauthenticated, Unavailable
from tools.bench import steps
from tools.bench.generator import Observed, Order, Progress, generate
from tools.bench.plan import Plan, Point
from tools.connection import UsageError, credentials, nobody_answers
from tools.server_process import ServerFailed, ServerProcess

LAST_WORDS_S = 5.0  # that a server which is gone may take to end


class GeneratorFailed(Exception):
    """The generator's process ended without a result."""


async def sweep(
    plan: Plan,
    chosen: Namespace,
    on_progress: Callable[[Point, Progress], None],
    on_point: Callable[[Point, Observed], None],
) -> None:
    """Point by point.  Raises ServerFailed where a server is lost, after `on_point` with what there was."""
    for point in plan.points:
        observed = await _measured(plan, point, chosen, partial(on_progress, point))
        on_point(point, observed)
        if observed.lost:
            raise ServerFailed(observed.lost)


async def _measured(
    plan: Plan, point: Point, chosen: Namespace, on_progress: Callable[[Progress], None]
) -> Observed:
    token, tls = credentials(chosen)
    async with AsyncExitStack() as stack:
        server, address, profile = None, chosen.server, None
        if address is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            on_progress(Progress("starting the server", 0.0))
            flags = list(point.configuration.flags)
            if chosen.step_profile:
                profile = folder / "steps.jsonl"
                flags += ["--step-profile", str(profile)]
            server = await ServerProcess.start(*_arguments(chosen.model, flags, folder / "data"))
            await stack.enter_async_context(server)
            stack.push_async_callback(server.kill)  # nobody needs what it holds
            address = server.address
        order = Order(
            address=address,
            token=token,
            tls=str(tls) if isinstance(tls, Path) else tls,
            pool=plan.pool,
            starts=plan.starts,
            rate=point.load.rate,
            size=point.load.conversations,
            manner=replace(plan.manner, seed=plan.manner.seed + point.repeat),
            server_pid=server.pid if server else None,
            is_guest=server is None,
        )
        try:
            observed = await _generated(order, on_progress)
        except Unavailable as error:
            raise ServerFailed(nobody_answers(error, address)) from None
        except Unauthenticated as error:
            raise UsageError(f"{error}; --token-file FILE sends the token in FILE") from None
        if server is not None and observed.lost:
            observed.lost = await _last_words(server, observed.lost)
        if profile is not None and observed.measured_s:
            begin_s = observed.measured_from_s
            observed.steps = steps.read(profile, begin_s, begin_s + observed.measured_s)
        return observed


def _arguments(model: Path | str | None, flags: Sequence[str], data_dir: Path) -> list[str]:
    name = model.absolute() if isinstance(model, Path) else model
    return [*([str(name)] if name else []), *flags, "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)]


async def _last_words(server: ServerProcess, lost: str) -> str:
    """Of the server, if it has ended; else why the connection was lost."""
    for _ in range(int(LAST_WORDS_S / 0.1)):
        try:
            server.check()
        except ServerFailed as error:
            return str(error)
        await asyncio.sleep(0.1)
    return lost


async def _generated(order: Order, on_progress: Callable[[Progress], None]) -> Observed:
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=generate, args=(order, there), daemon=True)
    process.start()
    there.close()
    try:
        while isinstance(message := await asyncio.to_thread(_receive, here), Progress):
            on_progress(message)
    finally:
        process.terminate()  # however this ends; it has nothing more to say
        await asyncio.to_thread(process.join)
        here.close()
    if isinstance(message, Exception):
        raise message
    return message


def _receive(pipe: Connection) -> Progress | Observed | Exception:
    try:
        message: Progress | Observed | Exception = pipe.recv()
    except EOFError:
        return GeneratorFailed("the load generator has ended without a result; its error stands above")
    return message
