"""From runs to medians, ratios and targets, and the tables that show them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.measure import median
from tools.peers.engines import NAMES, PEERS

DISTURBED_CORES = 0.15  # that others kept busy during a run
TITLES = {
    "continuo": "Continuo",
    "stateless": "Continuo --stateless",
    "vllm": "vLLM prefix cache",
    "llama.cpp": "llama.cpp",
}
Summary = dict[str, dict[str, dict[str, Any]]]  # workload -> engine -> figures


def disturbed(run: dict[str, Any]) -> bool:
    return bool(run["foreign_cores"] > DISTURBED_CORES)


def summary(runs: Sequence[dict[str, Any]]) -> Summary:
    """Medians over the undisturbed runs of each workload and engine, or over all if none was undisturbed.

    `kept` of `runs` were undisturbed.  Failed runs have no part in it.
    """
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if "failure" not in run:
            grouped.setdefault((run["workload"], run["engine"]), []).append(run)
    medians: Summary = {}
    for (workload, engine), group in grouped.items():
        kept = [run for run in group if not disturbed(run)]
        chosen = [run["figures"] for run in kept or group]
        figures = {name: _median([each[name] for each in chosen]) for name in chosen[0]}
        medians.setdefault(workload, {})[engine] = {**figures, "runs": len(group), "kept": len(kept)}
    return medians


def _median(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [median(each) for each in zip(*values, strict=True)]
    return median(values)


# -- targets


@dataclass(frozen=True, slots=True)
class Target:
    """A figure of Continuo, mostly over the better peer's, and what it has to be."""

    workload: str
    what: str
    limits: dict[str, float]  # by shape; a shape that is not in it has no target
    at_least: bool
    value: Callable[[dict[str, dict[str, Any]]], float]  # of the workload's figures by engine


def _peers(figures: dict[str, dict[str, Any]], name: str) -> list[float]:
    return [figures[peer][name] for peer in PEERS]


def _rate(figures: dict[str, dict[str, Any]]) -> float:
    return float(figures["continuo"]["tokens_per_s"] / max(_peers(figures, "tokens_per_s")))


def _last_ttft(figures: dict[str, dict[str, Any]]) -> float:
    ours, *theirs = (figures[name]["ttft_ms_by_turn"][-1] for name in ("continuo", *PEERS))
    return float(ours / min(theirs))


def _ttft(figures: dict[str, dict[str, Any]]) -> float:
    return float(figures["continuo"]["ttft_ms_mean"] / min(_peers(figures, "ttft_ms_mean")))


def _own(name: str) -> Callable[[dict[str, dict[str, Any]]], float]:
    return lambda figures: float(figures["continuo"][name])


def _evenness(figures: dict[str, dict[str, Any]]) -> float:
    return float(figures["continuo"]["itl_ms_p99"] / figures["continuo"]["itl_ms_mean"])


def _both(value: float) -> dict[str, float]:
    return {"llama-160m": value, "qwen2.5-0.5b": value}


TARGETS = (
    Target("one", "tokens/s over the better peer", {"llama-160m": 1.0, "qwen2.5-0.5b": 0.95}, True, _rate),
    Target("one", "TTFT of the last turn over the lowest of the peers", _both(0.95), False, _last_ttft),
    Target("many", "tokens/s over the better peer", {"llama-160m": 1.2, "qwen2.5-0.5b": 1.1}, True, _rate),
    Target("many", "mean TTFT over the lower of the peers", _both(0.7), False, _ttft),
    Target("many", "ITL p99 over its mean", _both(2.0), False, _evenness),
    Target(
        "decode 8x2048",
        "tokens/s over the better peer",
        {"llama-160m": 1.25, "qwen2.5-0.5b": 1.15},
        True,
        _rate,
    ),
    Target("decode 32x2048", "tokens/s over the better peer", {"llama-160m": 1.3}, True, _rate),
    Target(
        "decode 1x512",
        "share of what DRAM allows",
        {"llama-160m": 0.75, "qwen2.5-0.5b": 0.8},
        True,
        _own("share_of_bandwidth"),
    ),
    Target("prefill 512", "tokens/s over the better peer", _both(0.9), True, _rate),
    Target("prefill 2048", "tokens/s over the better peer", _both(0.9), True, _rate),
    Target("start", "seconds from spawn to the first token", _both(5.0), False, _own("start_s")),
    Target("memory", "GB besides weights and KV", _both(0.6), False, _own("besides_gb")),
)


def judged(shape: str, medians: Summary) -> list[dict[str, Any]]:
    """Every target of the shape whose figures were measured: its value, limit, and whether it is reached."""
    rows = []
    for target in TARGETS:
        limit = target.limits.get(shape)
        try:
            value = target.value(medians[target.workload])
        except KeyError:  # not measured, or not for all engines that it takes
            continue
        if limit is not None:
            reached = value >= limit if target.at_least else value <= limit
            rows.append(
                {
                    "workload": target.workload,
                    "what": target.what,
                    "value": round(value, 3),
                    "target": f"{'>=' if target.at_least else '<='} {limit:g}",
                    "reached": reached,
                }
            )
    return rows


# -- tables


def engines_table(medians: Summary) -> list[list[str]]:
    """A header, and a row for each workload: title, then a cell for each engine."""
    rows = [["", *(TITLES[name] for name in NAMES)]]
    for workload, figures in medians.items():
        row = [title(workload)]
        row += [cell(workload, figures[name]) if name in figures else "" for name in NAMES]
        rows.append(row)
    return rows


def title(workload: str) -> str:
    kind, _, size = workload.partition(" ")
    if kind == "decode":
        batch, context = size.split("x")
        return f"decode, batch {batch} at {context} tokens"
    return {
        "one": "1 conversation, 8 turns of 200 + 64",
        "many": "16 conversations, 6 turns of 100 + 64",
        "prefill": f"prefill of {size}",
        "start": "spawn to first token",
        "memory": "memory, all caches filled",
    }[kind]


def cell(workload: str, figures: dict[str, Any]) -> str:
    if workload == "start":
        return f"{figures['start_s']:.1f} s"
    if workload == "memory":
        return f"{figures['gb']:.2f} GB"
    text = f"{figures['tokens_per_s']:,.0f} tok/s"
    if workload in ("one", "many"):
        text += f", TTFT {figures['ttft_ms_mean']:.0f} ms"
        text += f", ITL {figures['itl_ms_mean']:.1f}/{figures['itl_ms_p99']:.0f} ms"
    if "share_of_bandwidth" in figures:
        text += f", {figures['share_of_bandwidth']:.0%} of what DRAM allows"
    if figures["kept"] < figures["runs"]:
        text += f" ({figures['kept']} of {figures['runs']} runs undisturbed)"
    return text


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def targets_table(judgements: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["", "", "is", "target", ""]]
    for each in judgements:
        mark = "reached" if each["reached"] else "MISSED"
        rows.append([each["workload"], each["what"], f"{each['value']:g}", each["target"], mark])
    return rows
