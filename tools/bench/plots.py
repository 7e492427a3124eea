"""Plots of a report, as PNG files.  They need matplotlib; without it, a sentence says how to get it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernels.marks import PARTS
from tools.bench.report import Report, load_of, merged, steps_of, title_of
from tools.bench.steps import TITLES

HOW = "no plots: they need matplotlib; install it with: pip install '.[bench]'"


def draw_all(report: Report, folder: Path) -> str:
    """What was drawn, or why nothing was."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return HOW
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[Any, Report], None]] = {
        "throughput": _throughput,
        "ttft": _ttft,
    }
    drawn = [_drawn(folder / f"{name}.png", draw, report) for name, draw in drawings.items()]
    drawn += [
        _drawn(folder / f"hits_{number}_{point['configuration']}.png", _hits, point)
        for number, point in enumerate(report["points"], start=1)
        if point["series"]
    ]
    drawn += [
        _drawn(folder / f"steps_{number}.png", _steps, titled)
        for number, titled in enumerate(steps_of(report).items(), start=1)
    ]
    return f"plots: {', '.join(map(str, drawn))}"


def _drawn(path: Path, draw: Callable[[Any, Any], None], what: Any) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    draw(axes, what)
    axes.grid(alpha=0.3)
    if axes.get_legend() is None:
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _throughput(axes: Any, report: Report) -> None:
    """A curve per configuration: the mean as a line, the 90th percentile dashed in the same colour."""
    points = merged(report["points"])
    for configuration in dict.fromkeys(point["configuration"] for point in points):
        figures = [
            point["figures"]
            for point in points
            if point["configuration"] == configuration and point["figures"]["normalised_ms_mean"] is not None
        ]
        x = [each["turns_per_s"] for each in figures]
        (line,) = axes.plot(
            x, [each["normalised_ms_mean"] for each in figures], "o-", label=f"{configuration}, mean"
        )
        p90 = [each["normalised_ms_p90"] for each in figures]
        axes.plot(x, p90, "s--", color=line.get_color(), label=f"{configuration}, p90")
    axes.set(
        xlabel="turns per second",
        ylabel="normalised latency, ms per token",
        title=report["workload"],
        ylim=(0, None),
    )


def _ttft(axes: Any, report: Report) -> None:
    """Every answered turn is a dot."""
    points = report["points"]
    for configuration in dict.fromkeys(point["configuration"] for point in points):
        turns = [point["turns"] for point in points if point["configuration"] == configuration]
        histories = [tokens for each in turns for tokens in each["history_tokens"]]
        axes.scatter(
            histories, [ms for each in turns for ms in each["ttft_ms"]], s=8, alpha=0.5, label=configuration
        )
    axes.set(
        xlabel="tokens of history", ylabel="time to first token, ms", title=report["workload"], ylim=(0, None)
    )


def _hits(axes: Any, point: dict[str, Any]) -> None:
    """Where the tokens of histories came from, second by second."""
    series = point["series"]
    names = {
        "device": "cached_device_tokens",
        "host": "cached_host_tokens",
        "recomputed": "recomputed_tokens",
    }
    axes.stackplot(series["at_s"], *(series[name] for name in names.values()), labels=list(names), step="pre")
    axes.set(
        xlabel="seconds",
        ylabel="tokens of history per second",
        title=f"{point['configuration']}: {title_of(load_of(point))}",
    )


def _steps(axes: Any, titled: tuple[str, list[dict[str, Any]]]) -> None:
    """A bar per group of steps, its parts one after the other as shares of the group's time."""
    title, groups = titled
    each_ms = [1e3 * group["seconds"] / group["steps"] for group in groups]
    names = [
        f"{group['kind']} {group['segments']}\n{group['steps']:,} x {ms:.2f} ms"
        for group, ms in zip(groups, each_ms, strict=True)
    ]
    left = [0.0] * len(groups)
    for part in PARTS:
        shares = [100 * group[part] / group["seconds"] for group in groups]
        axes.barh(names, shares, left=left, label=TITLES.get(part, part))
        left = [before + share for before, share in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(PARTS), columnspacing=1.0)
    axes.set(xlabel="% of the time of the steps", title=f"steps of {title}", xlim=(0, 100))
