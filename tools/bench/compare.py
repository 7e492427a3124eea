"""Configurations held against each other: at equal latency, and pair by pair over repeats."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb
from statistics import median
from typing import Any

from tools.bench.report import Report, load_of, merged, number, title_of

CONFIDENCE = 0.95
PAIRED = ("normalised_ms_mean", "server_cpu_s_per_turn")


def at_equal_latency(report: Report, limit_ms: float) -> str:
    """Turns per second that every configuration reaches before its p90 normalised latency is `limit_ms`."""
    points = merged(report["points"])
    said = [f"turns/s at a normalised latency of {limit_ms:g} ms per token (p90):"]
    for name in _names(report):
        figures = [point["figures"] for point in points if point["configuration"] == name]
        curve = [
            (each["turns_per_s"], each["normalised_ms_p90"]) for each in figures if each["normalised_ms_p90"]
        ]
        said.append(f"  {name}: {_crossing(curve, limit_ms)}")
    return "\n".join(said)


def _crossing(curve: Sequence[tuple[float, float]], limit: float) -> str:
    """Where the curve, from the lowest load to the highest, first goes above `limit`: on a straight line."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y > limit:
            if before is None:
                return f"not reached, {number(x)} turns/s have {number(y)} ms already"
            return number(before[0] + (x - before[0]) * (limit - before[1]) / (y - before[1]))
        before = (x, y)
    return f"{number(before[0])} or more, the highest load stays below" if before else "nothing was measured"


def pair_by_pair(report: Report) -> str:
    """What repeats of two configurations have to each other: within a pair a machine drifts least."""
    said = []
    for load in dict.fromkeys(map(load_of, report["points"])):
        here = [point for point in report["points"] if load_of(point) == load]
        for name, base in combinations(reversed(_names(report)), 2):
            for figure in PAIRED:
                ratios = _ratios(here, name, base, figure)
                if len(ratios) > 1:
                    what = f"{title_of(load)}: {figure} of {name} / {base}"
                    said.append(
                        f"{what}: median {median(ratios):.3f} of {len(ratios)} pairs, {_interval(ratios)}"
                    )
    return "\n".join(said)


def _names(report: Report) -> list[str]:
    return list(dict.fromkeys(point["configuration"] for point in report["points"]))


def _ratios(points: Sequence[Mapping[str, Any]], name: str, base: str, figure: str) -> list[float]:
    values = {(point["configuration"], point["repeat"]): point["figures"][figure] for point in points}
    repeats = sorted({point["repeat"] for point in points})
    found = [(values.get((name, repeat)), values.get((base, repeat))) for repeat in repeats]
    return [own / other for own, other in found if own is not None and other]


def _interval(values: Sequence[float]) -> str:
    """Of the median, from the binomial distribution: so many of the smallest and largest may be left out."""
    ordered, out = sorted(values), -1
    while 2 * sum(comb(len(ordered), n) for n in range(out + 2)) / 2 ** len(ordered) <= 1 - CONFIDENCE:
        out += 1
    if out < 0:
        return f"too few for an interval, from {ordered[0]:.3f} to {ordered[-1]:.3f} in all"
    return f"{CONFIDENCE:.0%} interval {ordered[out]:.3f} to {ordered[-1 - out]:.3f}"
