"""`continuo bench`: multi-turn load over the gRPC stream, for several configurations side by side.

workload    what is said: pools of scripts, after published statistics
files       the same from dialogues and traces
population  who talks when: Poisson arrivals or a fixed number, from the steady state on
driver      holds the conversations, notes when what came
generator   the process in which it does
metrics     definitions and arithmetic
steps       where the time of the server's steps went
plan        what the arguments ask for
sweep       point by point, configurations taking turns at every load
report      table and JSON; plots draws, progress tells how far it is
"""

import asyncio
from argparse import Namespace

from rpc.client import ContinuoError
from tools.bench import compare, plots, report
from tools.bench.files import FileError
from tools.bench.generator import NothingFits, Observed
from tools.bench.plan import Plan, Point, plan_of
from tools.bench.progress import Progressing
from tools.bench.sweep import GeneratorFailed, sweep
from tools.connection import UsageError
from tools.server_process import ServerFailed

EXPECTED: tuple[type[Exception], ...] = (
    UsageError,
    FileError,
    ServerFailed,
    GeneratorFailed,
    ContinuoError,
    NothingFits,
    report.ReportError,
)
USAGE: tuple[type[Exception], ...] = (UsageError, FileError)


def run(chosen: Namespace) -> int:
    if chosen.from_file is not None:
        _show(report.read(chosen.from_file), chosen)
        return 0
    planned = plan_of(chosen)
    _check_outputs(chosen)
    told = report.new_report(planned, chosen)
    try:
        asyncio.run(_sweep(planned, chosen, told))
    finally:  # also of a sweep that was interrupted, or lost its server
        if told["points"]:
            _show(told, chosen)
    return 0


def _check_outputs(chosen: Namespace) -> None:
    """It would be a pity to find out at the end."""
    try:
        if chosen.json is not None:
            chosen.json.touch()
        if chosen.plots is not None:
            chosen.plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"nothing can be written to {error.filename}: {error.strerror}") from None


async def _sweep(planned: Plan, chosen: Namespace, told: report.Report) -> None:
    def on_point(point: Point, observed: Observed) -> None:
        entry = report.add_point(told, planned, point, observed)
        progress.done(point, report.one_line(entry))
        if chosen.json is not None:
            report.write(told, chosen.json)

    with Progressing(len(planned.points)) as progress:
        await sweep(planned, chosen, progress.at, on_point)


def _show(told: report.Report, chosen: Namespace) -> None:
    parts = [report.table(told), report.steps_table(told), compare.pair_by_pair(told)]
    if chosen.at_normalised_ms is not None:
        parts.append(compare.at_equal_latency(told, chosen.at_normalised_ms))
    parts += ["\n".join(report.notes(told)), report.definitions(told)]
    print("\n\n".join(filter(None, parts)))
    if chosen.plots is not None:
        print(plots.draw_all(told, chosen.plots))
