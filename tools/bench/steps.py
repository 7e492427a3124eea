"""What the time of a server's steps went to, from the file of `continuo serve --step-profile`.

Steps are told apart by what they carry (decoding rows alone, or prompts as well, or copies alone) and by the
number of their segments, as both decide what a step costs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels.marks import PARTS

TITLES = {"rest": "norms, rest"}
DEFINITIONS = {
    "steps": "those that ended within the measured time; a step begins where the one before it ended",
    "decoding, prompts, copies": "steps whose segments are single tokens, those with longer ones (beginnings "
    "of turns, and what is computed again), and those that copy KV between the tiers and compute nothing",
    "linears, attention, norms and rest, sampling": "what the step thread computed, by kernel; rest is also "
    "embedding, rotation, and activation",
    "copies": "KV between the tiers, as far as the step thread waited for it",
    "host": "plans, input tensors, results, and what the event loop did while there was something to compute",
    "idle": "there was nothing to compute",
}
COUNTS = ("steps", "tokens", "seconds", *PARTS)
Line = Mapping[str, float]


def read(path: Path, begin_s: float, end_s: float) -> list[dict[str, Any]]:
    """Groups of the steps that ended in this time by the clock, `time.monotonic` of this machine: what they
    are of, `segments` as a range, and sums of COUNTS.
    """
    written, _, _ = path.read_text().rpartition("\n")  # the server may be writing the next line
    lines = (json.loads(line) for line in written.splitlines())
    return grouped([line for line in lines if begin_s < line["end_s"] <= end_s])


def grouped(lines: Sequence[Line]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for line in sorted(lines, key=lambda line: (_kind(line), line["segments"])):
        key = _kind(line), _range(int(line["segments"]))
        _add(groups.setdefault(key, _empty(*key)), {**line, "steps": 1})
    return list(groups.values())


def merged(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups of several points, those of the same name as one, and at the end all of them together."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for group in (group for point in points for group in point.get("steps") or ()):
        key = group["kind"], group["segments"]
        _add(groups.setdefault(key, _empty(*key)), group)
    everything = _empty("all", "")
    for group in groups.values():
        _add(everything, group)
    return [*groups.values(), everything] if groups else []


def cells(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A table: milliseconds per step, and each part's share of them."""
    head = [
        "steps of",
        "segments",
        "steps",
        "tokens/step",
        "ms/step",
        *(TITLES.get(part, part) for part in PARTS),
    ]
    return [head, *(_row(group) for group in groups)]


def _row(group: Mapping[str, Any]) -> list[str]:
    steps, seconds = group["steps"], group["seconds"]
    return [
        *(group["kind"], group["segments"], f"{steps:,}", f"{group['tokens'] / steps:.1f}"),
        f"{1e3 * seconds / steps:.2f}",
        *(f"{1e3 * group[part] / steps:.2f} {group[part] / seconds:4.0%}" for part in PARTS),
    ]


def _kind(line: Line) -> str:
    if not line["segments"]:
        return "copies"
    return "decoding" if line["decode_rows"] == line["segments"] else "prompts"


def _range(segments: int) -> str:
    """1, 2-3, 4-7, 8-15, ..."""
    least = 1 << max(0, segments.bit_length() - 1)
    return str(segments) if segments < 2 else f"{least}-{2 * least - 1}"


def _empty(kind: str, segments: str) -> dict[str, Any]:
    return {"kind": kind, "segments": segments, **dict.fromkeys(COUNTS, 0)}


def _add(group: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name in COUNTS:
        group[name] += more[name]
