"""What is told of a sweep: a table on the screen, and JSON from which table and plots can be drawn again."""

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from kernels import __version__
from tools.bench import steps
from tools.bench.generator import Observed
from tools.bench.metrics import DEFINITIONS, rows, series, summary
from tools.bench.plan import Plan, Point
from tools.measure import commit, machine, package_version

Report = dict[str, Any]
PACKAGES = ("grpcio", "protobuf", "torch", "tokenizers", "uvloop", "numpy")


class ReportError(Exception):
    """A file that holds no report of `continuo bench`."""


def new_report(plan: Plan, chosen: Namespace) -> Report:
    """Without points yet."""
    return {
        "tool": "continuo bench",
        "command": " ".join(["continuo", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(),
        "version": __version__,
        "machine": machine(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "workload": plan.workload,
        "settings": {key: _plain(value) for key, value in sorted(vars(chosen).items())},
        "definitions": DEFINITIONS | (steps.DEFINITIONS if chosen.step_profile else {}),
        "points": [],
    }


def add_point(report: Report, plan: Plan, point: Point, observed: Observed) -> dict[str, Any]:
    """The point as the report holds it, with `figures` by name, `series` by second, `turns` by property."""
    entry = {
        "configuration": point.configuration.name,
        "server_arguments": list(point.configuration.flags),
        "rate": point.load.rate,
        "conversations": point.load.conversations,
        "repeat": point.repeat,
        "seed": plan.manner.seed + point.repeat,
        "server": observed.server,
        "device_tokens": observed.device_tokens,
        "host_tokens": observed.host_tokens,
        "context_tokens": observed.context_tokens,
        "expected_working_set_tokens": round(observed.expected_tokens),
        "conversations_left_out": observed.left_out,
        "conversations_cut": observed.cut,
        "fill_s": round(observed.fill_s, 2),
        "lost": observed.lost,
        "load_average": round(os.getloadavg()[0], 2),
        "figures": summary(observed, plan.manner.warmup_s, plan.limits),
        "series": series(observed.samples),
        "turns": rows(observed.records),
        "steps": observed.steps,
    }
    report["points"].append(entry)
    return entry


def write(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report) + "\n")


def read(path: Path) -> Report:
    """Raises ReportError."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    if not isinstance(report, dict) or report.get("tool") != "continuo bench" or not report.get("points"):
        raise ReportError(f"{path} is no report of continuo bench with points; --json FILE writes one")
    return report


def merged(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By load, the lowest first; points that differ in their repeat alone become one, of medians."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for point in sorted(points, key=lambda point: [each or 0 for each in load_of(point)]):
        groups.setdefault((*load_of(point), point["configuration"]), []).append(point)
    return [
        {**group[0], "figures": _medians([point["figures"] for point in group])} for group in groups.values()
    ]


COLUMNS: dict[str, tuple[str, ...]] = {
    "turns/s": ("turns_per_s",),
    "tokens/s": ("output_tokens_per_s",),
    "TTFT ms p50/p90/p99": ("ttft_ms_p50", "ttft_ms_p90", "ttft_ms_p99"),
    "at the server: queue/TTFT ms p50": ("server_queue_ms_p50", "server_ttft_ms_p50"),
    "reload/recompute/prefill ms mean": (
        "server_reload_ms_mean",
        "server_recompute_ms_mean",
        "server_prefill_ms_mean",
    ),
    "TTST ms p50": ("ttst_ms_p50",),
    "ITL ms p50/p99": ("itl_ms_p50", "itl_ms_p99"),
    "TPOT ms p50/p90": ("tpot_ms_p50", "tpot_ms_p90"),
    "E2E s p50/p90": ("e2e_ms_p50", "e2e_ms_p90"),
    "normalised ms mean/p90": ("normalised_ms_mean", "normalised_ms_p90"),
    "goodput": ("goodput_turns_per_s",),
    "slope ms/1K": ("ttft_slope_ms_per_1k",),
    "device/host/recomputed %": ("cached_device_share", "cached_host_share", "recomputed_share"),
    "resume ms p50/p90": ("resume_ms_p50", "resume_ms_p90"),
    "set/device": ("working_set_device_tiers",),
    "CPU s/turn": ("server_cpu_s_per_turn",),
}
IN_SECONDS, IN_PERCENT = "E2E s", "%"


def table(report: Report) -> str:
    """A block per load, a column per configuration."""
    blocks = []
    points = merged(report["points"])
    for load in dict.fromkeys(map(load_of, points)):
        here = [point for point in points if load_of(point) == load]
        cells = [["", *(point["configuration"] for point in here)]]
        for title, names in COLUMNS.items():
            values = [_cell(title, [point["figures"][name] for name in names]) for point in here]
            if any(value != "-" for value in values):
                cells.append([title, *values])
        cells.append(["failed or refused", *(_counts(point["figures"]["failures"]) for point in here)])
        cells.append(["cancelled", *(f"{point['figures']['cancelled_turns']:g}" for point in here)])
        cells.append(
            ["unfinished at the end", *(f"{point['figures']['unfinished_turns']:g}" for point in here)]
        )
        cells.append(["turns measured", *(f"{point['figures']['turns']:g}" for point in here)])
        blocks.append(f"{title_of(load)}\n{_aligned(cells)}")
    return "\n\n".join(blocks)


def steps_table(report: Report) -> str:
    """Where the time of steps went, a block per load and configuration; empty if nobody asked."""
    blocks = []
    for title, groups in steps_of(report).items():
        blocks.append(
            f"steps of {title}: milliseconds of a step and their shares\n{_aligned(steps.cells(groups))}"
        )
    return "\n\n".join(blocks)


def steps_of(report: Report) -> dict[str, list[dict[str, Any]]]:
    """The groups of steps of each load and configuration, over all repeats."""
    points: dict[str, list[Mapping[str, Any]]] = {}
    for point in report["points"]:
        points.setdefault(f"{point['configuration']}, {title_of(load_of(point))}", []).append(point)
    return {title: groups for title, each in points.items() if (groups := steps.merged(each))}


def notes(report: Report) -> list[str]:
    """What one should know before believing the table."""
    points, said = report["points"], []
    repeats = 1 + max(point["repeat"] for point in points)
    at = f"{report['date']}, commit {report['commit']}"
    said.append(f"workload: {report['workload']}, seed {report['settings']['seed']}; {at}")
    if repeats > 1:
        said.append(f"figures are medians of {repeats} repeats")
    share = max(point["figures"]["generator_cpu_share"] or 0.0 for point in points)
    late = max(point["figures"]["generator_late_ms_p99"] or 0.0 for point in points)
    said.append(
        f"load generator: at most {share:.0%} of a core, late by {late:.1f} ms at the 99th percentile"
    )
    cut, out = points[0]["conversations_cut"], points[0]["conversations_left_out"]
    if cut or out:
        context = points[0]["context_tokens"]
        said.append(f"context of {context:,} tokens: of the scripts, {cut} were cut short, {out} left out")
    said += [
        f"{point['configuration']}: the server was lost: {point['lost']}" for point in points if point["lost"]
    ]
    return said


def definitions(report: Report) -> str:
    return "\n".join(f"{name}: {meaning}" for name, meaning in report["definitions"].items())


def one_line(point: Mapping[str, Any]) -> str:
    """A point that is done, in short."""
    figures = point["figures"]
    middle, p90 = (number(figures[f"normalised_ms_{at}"]) for at in ("mean", "p90"))
    tokens, tiers = (number(figures[f"working_set_{unit}"]) for unit in ("tokens", "device_tiers"))
    expected = number(point["expected_working_set_tokens"])
    parts = [
        f"{figures['turns']} turns",
        f"{number(figures['turns_per_s'])} turns/s",
        f"normalised {middle} ms mean, {p90} p90",
        f"working set {tokens} tokens = {tiers} device tiers ({expected} expected)",
    ]
    return ", ".join(parts)


def load_of(point: Mapping[str, Any]) -> tuple[float | None, int | None]:
    return point["rate"], point["conversations"]


def title_of(load: tuple[float | None, int | None]) -> str:
    rate, conversations = load
    parts = [] if rate is None else [f"{rate:g} turns/s offered"]
    parts += [] if conversations is None else [f"{conversations} conversations"]
    return ", ".join(parts) or "as recorded"


def _medians(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in figures[0]:
        values = [each[name] for each in figures if each[name] is not None]
        if values and isinstance(values[0], Mapping):
            result[name] = {key: sum(each.get(key, 0) for each in values) for each in values for key in each}
        else:
            result[name] = median(values) if values else None
    return result


def _cell(title: str, values: Sequence[float | None]) -> str:
    if all(value is None for value in values):
        return "-"
    factor = 0.001 if title.startswith(IN_SECONDS) else 100 if title.endswith(IN_PERCENT) else 1
    return " / ".join(number(None if value is None else factor * value) for value in values)


def number(value: float | None) -> str:
    """With three digits or more."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "0"


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
