"""What a run of the suite found: a line for each section, a table at the end, the README's part of it."""

import json
from pathlib import Path
from typing import Any

from tools.gpu_suite.sections import FAILED, GOOD, LATE, MISSED, SECTIONS, SKIPPED

NOT_YET = (
    "Not measured yet: `tools/gpu_suite.sh` measures it on a machine with a GPU, "
    "and `--dry-run` does without one all of it that can be done."
)
_MOST_FAILURES = 12
Case = dict[str, Any]


def line(name: str, section: dict[str, Any]) -> str:
    """One section, as soon as it is over."""
    counts: dict[str, int] = {}
    for case in section["cases"]:
        counts[case["status"]] = counts.get(case["status"], 0) + 1
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{name}: {said or 'nothing'} in {section['seconds']} s"


def table(report: dict[str, Any], most_characters: int) -> str:
    """Failures first: they must not be cut off."""
    parts = [*_failures(report), *_left_out(report), *_speeds(report), *_others(report)]
    said = "\n".join(parts)
    return said if len(said) <= most_characters - 400 else said[: most_characters - 400] + "\n..."


def _failures(report: dict[str, Any]) -> list[str]:
    """What failed alike is told once."""
    alike: dict[str, list[tuple[str, Case]]] = {}
    for name, section in report["sections"].items():
        for case in section["cases"]:
            if case["status"] in (FAILED, LATE):
                alike.setdefault(case.get("error", [LATE])[-1], []).append((name, case))
    said = []
    for cases in list(alike.values())[:_MOST_FAILURES]:
        name, case = cases[0]
        others = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        said.append(f"{case['status'].upper()} {name}: {case['case']}{others}")
        said += [f"    {text}" for text in case.get("error", [])[-3:]]
    if len(alike) > _MOST_FAILURES:
        said.append(f"... and {len(alike) - _MOST_FAILURES} other failures")
    return said


def _left_out(report: dict[str, Any]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for section in report["sections"].values():
        for case in section["cases"]:
            if case["status"] == SKIPPED:
                reasons.setdefault(case["reason"], []).append(case["case"])
    return [f"left out ({reason}): {len(cases)}, first {cases[0]}" for reason, cases in reasons.items()]


def _speeds(report: dict[str, Any]) -> list[str]:
    timed = [case for case in _cases(report, "speeds") if "us" in case]
    if not timed:
        return []
    header = ("", "us", "floor", "ratio", "accept", "good", "", "others")
    rows = [header, *(_speed(case) for case in timed)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return [
        "  ".join(
            text.ljust(width) if i in (0, 6, 7) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _speed(case: Case) -> tuple[str, ...]:
    return (
        case["case"],
        f"{case['us']:.1f}",
        f"{case['floor_us']:.1f}",
        f"{case['ratio']:.2f}",
        *(f"{case[name]:.1f}" if case[name] else "-" for name in ("accept_us", "good_us")),
        _verdict(case, "accept_us"),
        ", ".join(
            f"{name} {us:.1f}" for name, us in case.get("rivals_us", {}).items() if isinstance(us, float)
        ),
    )


def _verdict(case: Case, accept: str) -> str:
    if not case.get(accept):
        return ""
    return "MISSED" if case["status"] == MISSED else "good" if case["is_good"] else "accepted"


def _others(report: dict[str, Any]) -> list[str]:
    said = []
    sizes = report["sections"].get("transfers", {}).get("figures", {}).get("gbps", {})
    for way, rates in sizes.items():
        said.append(f"{way}, GB/s: " + ", ".join(f"{size} {rate}" for size, rate in rates.items()))
    for name in ("transfers", "throughput", "conversations"):
        for case in _cases(report, name):
            text = summary(case)
            if text:
                said.append(f"{case['case']}: {text}")
    return said


def summary(case: Case) -> str:
    """Figures of a case that the table of speeds and the list of copies do not show."""
    words = {
        "tokens_per_s": "{:,.0f} tokens/s",
        "step_ms": "{:.2f} ms a step",
        "gap_ms": "{:.3f} ms between steps (median)",
        "turns_per_s": "{:.2f} turns/s",
        "ttft_ms_p50": "first token {:.0f} ms",
        "ttft_ms_p90": "(p90 {:.0f})",
    }
    said = [form.format(case[key]) for key, form in words.items() if case.get(key) is not None]
    if "accept_gbps" in case or "both" in case["case"]:
        said.append(f"{case['gbps']} GB/s" if "gbps" in case else "")
    if "tokens" in case:
        said.append(", ".join(f"{name} {count:,}" for name, count in case["tokens"].items()))
    verdict = _verdict(case, "accept_gbps") or _verdict(case, "accept_ms")
    return ", ".join(text for text in (*said, verdict) if text)


def _cases(report: dict[str, Any], section: str) -> list[Case]:
    return [
        case
        for case in report["sections"].get(section, {}).get("cases", [])
        if case["status"] in (*GOOD, MISSED)
    ]


def newest(results: Path) -> dict[str, Any] | None:
    """Of the runs of all sections on a GPU."""
    reports = [json.loads(path.read_text()) for path in results.glob("gpu_suite_*.json")]
    whole = [
        each for each in reports if not each["is_dry_run"] and each["sections"].keys() == SECTIONS.keys()
    ]
    return max(whole, key=lambda each: each["date"], default=None)


def readme_table(report: dict[str, Any] | None) -> str:
    if report is None:
        return NOT_YET
    lines = ["| kernel | measured | floor | accept | good | others |", "|---|---|---|---|---|---|"]
    for case in _cases(report, "speeds"):
        if "us" in case:
            name, us, floor, _, accept, good, verdict, others = _speed(case)
            marked = f"**{us} us**" if verdict == "MISSED" else f"{us} us"
            lines.append(f"| {name} | {marked} | {floor} | {accept} | {good} | {others} |")
    lines += ["", "| engine | measured |", "|---|---|"]
    for section in ("transfers", "throughput", "conversations"):
        lines += [
            f"| {case['case']} | {text} |" for case in _cases(report, section) if (text := summary(case))
        ]
    cases = [case for section in report["sections"].values() for case in section["cases"]]
    good = sum(case["status"] in GOOD for case in cases)
    found = report["environment"]
    where = (
        f"On an {found['gpu']['name']} with torch {found['torch']} and triton {found['triton']}, "
        f"{report['date'][:10]}, commit {report['commit']}: {good} of {len(cases)} checks passed. "
        "Times in bold are above what is accepted; the floor is what bytes or products alone would take."
    )
    return "\n".join([*lines, "", where])
