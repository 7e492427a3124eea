"""Steps in groups, and the table and plot of them, from lines that were made by hand."""

import json

import pytest

from kernels.marks import PARTS
from tools.bench import report, steps


def a_line(end_s=1.0, tokens=1, segments=1, decode_rows=None, **parts):
    decode_rows = segments if decode_rows is None else decode_rows
    parts = {**dict.fromkeys(PARTS, 0.0), "linears": 0.003, "host": 0.001, **parts}
    counts = {"tokens": tokens, "segments": segments, "decode_rows": decode_rows}
    return {"step": 1, "end_s": end_s, **counts, "seconds": sum(parts.values()), **parts}


def test_steps_are_grouped_by_what_they_carry_and_how_many() -> None:
    lines = [
        *(a_line(), a_line(tokens=2, segments=2), a_line(tokens=3, segments=3), a_line(tokens=8, segments=8)),
        *(a_line(tokens=100, decode_rows=0), a_line(tokens=102, segments=3, decode_rows=2)),
        a_line(tokens=0, segments=0, linears=0.0, copies=0.5),
    ]
    groups = steps.grouped(lines)
    assert [(group["kind"], group["segments"], group["steps"]) for group in groups] == [
        ("copies", "0", 1),
        *(("decoding", "1", 1), ("decoding", "2-3", 2), ("decoding", "8-15", 1)),
        *(("prompts", "1", 1), ("prompts", "2-3", 1)),
    ]
    assert groups[2]["tokens"] == 5 and groups[2]["linears"] == pytest.approx(0.006)
    assert groups[0]["copies"] == 0.5 and groups[0]["seconds"] == pytest.approx(0.501)


def test_only_whole_lines_of_the_measured_time_are_read(tmp_path) -> None:
    path = tmp_path / "steps"
    lines = [json.dumps(a_line(end_s)) for end_s in (10.0, 10.5, 12.0, 12.5)]
    path.write_text("\n".join(lines) + '\n{"step": 9, "end_')
    (group,) = steps.read(path, 10.0, 12.0)
    assert group["steps"] == 2
    path.write_text("")
    assert steps.read(path, 10.0, 12.0) == []


def test_the_table_has_all_repeats_of_a_load_and_at_its_end_their_sum() -> None:
    def point(repeat, *lines):
        load = {"configuration": "device", "rate": None, "conversations": 4, "repeat": repeat}
        return {**load, "steps": steps.grouped(lines)}

    told = {"points": [point(0, a_line(), a_line(tokens=9, decode_rows=0)), point(1, a_line(idle=0.012))]}
    title, head, *rows = report.steps_table(told).splitlines()
    assert title == "steps of device, 4 conversations: milliseconds of a step and their shares"
    counts = "steps of segments steps tokens/step ms/step"
    assert " ".join(head.split()) == f"{counts} linears attention norms, rest sampling copies host idle"
    assert [row.split() for row in rows] == [
        "decoding 1 2 1.0 10.00 3.00 30% 0.00 0% 0.00 0% 0.00 0% 0.00 0% 1.00 10% 6.00 60%".split(),
        "prompts 1 1 9.0 4.00 3.00 75% 0.00 0% 0.00 0% 0.00 0% 0.00 0% 1.00 25% 0.00 0%".split(),
        "all 3 3.7 8.00 3.00 38% 0.00 0% 0.00 0% 0.00 0% 0.00 0% 1.00 12% 4.00 50%".split(),
    ]
    without = [{key: value for key, value in each.items() if key != "steps"} for each in told["points"]]
    assert report.steps_table({"points": without}) == ""  # reports of before there were any
