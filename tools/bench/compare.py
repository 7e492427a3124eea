"""Configurations held against each other: at equal latency, and pair by pair over repeats."""

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from math import comb
from statistics import median
from typing import Any

from tools.bench.report import Report, load_of, merged, number, title_of

CONFIDENCE = 0.95
PAIRED = ("normalised_ms_mean", "server_cpu_s_per_turn")


def at_equal_latency(report: Report, limit_ms: float) -> str:
    """Turns per second that every configuration reaches before its p90 normalised latency is `limit_ms`."""
    said = [f"turns/s at a normalised latency of {limit_ms:g} ms per token (p90):"]
    for name in names(report):
        curve, crossing = curve_of(report, name), turns_at(report, name, limit_ms)
        if crossing is not None:
            told = number(crossing)
        elif not curve:
            told = "nothing was measured"
        elif curve[0][1] > limit_ms:
            told = f"not reached, {number(curve[0][0])} turns/s have {number(curve[0][1])} ms already"
        else:
            told = f"{number(curve[-1][0])} or more, the highest load stays below"
        said.append(f"  {name}: {told}")
    return "\n".join(said)


def curve_of(report: Report, name: str) -> list[tuple[float, float]]:
    """Turns per second and p90 normalised latency in ms, from the lowest load to the highest."""
    figures = [point["figures"] for point in merged(report["points"]) if point["configuration"] == name]
    return [(each["turns_per_s"], each["normalised_ms_p90"]) for each in figures if each["normalised_ms_p90"]]


def turns_at(report: Report, name: str, limit_ms: float) -> float | None:
    """Where the curve first goes above `limit_ms`, on a straight line; None if that is nowhere inside it."""
    curve = curve_of(report, name)
    for (x, y), (next_x, next_y) in pairwise(curve):
        if y <= limit_ms < next_y:
            return x + (next_x - x) * (limit_ms - y) / (next_y - y)
        if y > limit_ms:
            break
    return None


def pair_by_pair(report: Report) -> str:
    """What repeats of two configurations have to each other: within a pair a machine drifts least."""
    said = []
    for load in dict.fromkeys(map(load_of, report["points"])):
        here = [point for point in report["points"] if load_of(point) == load]
        for name, base in combinations(reversed(names(report)), 2):
            for figure in PAIRED:
                ratios = ratios_of(here, name, base, figure)
                if len(ratios) > 1:
                    what = f"{title_of(load)}: {figure} of {name} / {base}"
                    said.append(
                        f"{what}: median {median(ratios):.3f} of {len(ratios)} pairs, {interval(ratios)}"
                    )
    return "\n".join(said)


def names(report: Report) -> list[str]:
    return list(dict.fromkeys(point["configuration"] for point in report["points"]))


def ratios_of(points: Sequence[Mapping[str, Any]], name: str, base: str, figure: str) -> list[float]:
    """Of a figure of configuration `name` to that of `base`, for each repeat that has both."""
    values = {(point["configuration"], point["repeat"]): point["figures"][figure] for point in points}
    repeats = sorted({point["repeat"] for point in points})
    found = [(values.get((name, repeat)), values.get((base, repeat))) for repeat in repeats]
    return [own / other for own, other in found if own is not None and other]


def interval(values: Sequence[float]) -> str:
    """Of the median, from the binomial distribution: so many of the smallest and largest may be left out."""
    ordered, out = sorted(values), -1
    while 2 * sum(comb(len(ordered), n) for n in range(out + 2)) / 2 ** len(ordered) <= 1 - CONFIDENCE:
        out += 1
    if out < 0:
        return f"too few for an interval, from {ordered[0]:.3f} to {ordered[-1]:.3f} in all"
    return f"{CONFIDENCE:.0%} interval {ordered[out]:.3f} to {ordered[-1 - out]:.3f}"
