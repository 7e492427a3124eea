"""The GPU suite, as far as it goes without one: cases, processes that die, comparisons, launches, reports."""

import json
import os
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cuda.copies import RunCopier
from tests.cuda.virtual_device import VirtualDevice
from tests.tools.conftest import ROOT
from tools.gpu_suite import __main__ as suite
from tools.gpu_suite import report, sections, speeds, targets, throughput, transfers
from tools.gpu_suite.accuracy import Wrong, compare, poisoned, require_equal
from tools.gpu_suite.inputs import paged_steps
from tools.gpu_suite.sections import Context, Skip
from tools.gpu_suite.timing import Time

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs triton, which is for Linux on x86-64"
)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("speeds", True, time.monotonic() + 60, tmp_path / "records.jsonl")


def last(context: Context) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(context.records.read_text().splitlines()[-1])
    return record


# -- cases


def test_a_case_is_written_down_with_what_became_of_it(context: Context) -> None:
    context.case("fine", lambda: {"us": 3})
    assert last(context) == {"case": "fine", "status": "passed", "us": 3, "seconds": last(context)["seconds"]}

    def wrong() -> dict[str, Any]:
        raise Wrong("off by one")

    context.case("wrong", wrong)
    assert last(context)["status"] == "failed" and "off by one" in last(context)["error"][-1]

    def left_out() -> dict[str, Any]:
        raise Skip("no such copier")

    context.case("left out", left_out)
    assert (last(context)["status"], last(context)["reason"]) == ("skipped", "no such copier")


def test_a_package_that_is_missing_leaves_a_case_out_and_a_module_of_ours_fails_it(context: Context) -> None:
    def imports(name: str) -> dict[str, Any]:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    context.case("theirs", lambda: imports("flashinfer.decode"))
    assert (last(context)["status"], last(context)["reason"]) == ("skipped", "needs flashinfer.decode")
    context.case("ours", lambda: imports("kernels.gpu.nothing"))
    assert last(context)["status"] == "failed"


def test_no_case_begins_after_its_time_and_none_runs_twice(context: Context) -> None:
    def never() -> dict[str, Any]:
        raise AssertionError("it ran")

    context.done = frozenset({"before"})
    context.case("before", never)
    assert not context.records.exists()
    context.deadline = time.monotonic() - 1
    context.case("late", never)
    assert last(context) == {"case": "late", "status": "no time"}


DYING = """
import os
def dry_run(context):
    context.case("first", dict)
    context.case("second", lambda: os._exit(7))
    context.case("third", lambda: {"left": 1})
    return {"all": True}
"""
HANGING = """
import time
from importlib.util import find_spec
def dry_run(context):
    context.case("first", dict)
    context.case("second", lambda: time.sleep(600))
"""
BROKEN = "import nothing_of_the_kind"


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a section of the given code, in processes of its own."""

    def run(code: str, seconds: float) -> dict[str, Any]:
        (tmp_path / "made_up.py").write_text(code)
        (tmp_path / "sitecustomize.py").write_text(
            "from tools.gpu_suite import sections\nsections.MODULES['speeds'] = 'made_up'\n"
        )
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
        return suite.run_section("speeds", seconds, is_dry=True)

    return run


def statuses(section: dict[str, Any]) -> dict[str, str]:
    return {case["case"]: case["status"] for case in section["cases"]}


def test_what_ends_the_process_costs_one_case(section) -> None:
    found = section(DYING, 60)
    assert statuses(found) == {"first": "passed", "second": "failed", "third": "passed"}
    assert found["figures"] == {"all": True}
    assert "ended with 7" in found["cases"][1]["error"][0]


def test_what_hangs_is_killed_and_told(section, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_GRACE_S", 0.0)
    found = section(HANGING, 8)
    assert statuses(found) == {"first": "passed", "second": "failed"}
    assert "killed" in found["cases"][1]["error"][0]


def test_a_section_that_cannot_begin_fails(section) -> None:
    found = section(BROKEN, 30)
    assert statuses(found) == {"(start)": "failed"}
    assert any("nothing_of_the_kind" in line for line in found["cases"][0]["error"])


# -- what sections are made of


def test_comparisons_find_errors_beyond_rounding_and_nan() -> None:
    x = torch.randn(50, 64).bfloat16()

    def ref(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x) * 3

    compare(ref(x), ref, x)
    with pytest.raises(Wrong, match="off by"):
        compare(ref(x) * 1.02, ref, x)
    spoiled = ref(x)
    spoiled[3, 3] = torch.nan
    with pytest.raises(Wrong, match="NaN"):
        compare(spoiled, ref, x)
    one_off = ref(x)
    one_off[7, 5] += 0.5
    with pytest.raises(Wrong, match="off by"):
        compare(one_off, ref, x)
    with pytest.raises(Wrong, match="1 of 3200 elements differ"):
        require_equal(one_off, ref(x), "rows")


def test_memory_handed_out_under_poison_is_full_of_it() -> None:
    with poisoned():
        assert torch.empty(1000).isnan().all()
        assert (torch.empty(1000, dtype=torch.int32) > 2**30).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_steps_to_be_timed_share_no_block_and_read_as_much_as_they_say() -> None:
    steps = paged_steps((1, 1), (99, 40), (4, 2, 16), 32, torch.device("cpu"), 200_000)
    tables = [step.meta.block_tables for step in steps]
    used = torch.cat([table[table >= 0] for table in tables])
    assert len(used.unique()) == len(used) == len(steps) * 6
    assert len(steps) * 141 * 2 * 2 * 16 * 2 >= 200_000
    assert all(step.kv is steps[0].kv for step in steps)


def test_the_table_of_targets_is_the_one_that_was_set() -> None:
    by_name = {target.name: target for target in targets.ATTENTION}
    assert len(by_name) == 13
    decode = by_name["decode 32 x 4k, 32/8 x 128"]
    num_bytes, _ = speeds.work_of(decode)
    assert num_bytes == pytest.approx(537e6, rel=0.01) and (decode.accept_us, decode.good_us) == (160, 140)
    prefill = by_name["prefill 1 x 8k, 32/8 x 128"]
    _, flops = speeds.work_of(prefill)
    assert flops == pytest.approx(0.55e12, rel=0.01)
    assert flops / prefill.accept_us / 1e6 == pytest.approx(350, rel=0.01)
    extend = by_name["extend 16 x 64 behind 8k, 32/8 x 128"]
    num_bytes, flops = speeds.work_of(extend)
    assert num_bytes == pytest.approx(541e6, rel=0.01) and flops == pytest.approx(138e9, rel=0.01)


@needs_triton
def test_launches_are_recorded_in_place_of_being_made() -> None:
    from kernels.rms_norm import rms_norm
    from tools.gpu_suite.compiling import recorded

    x = torch.ones(3, 64)
    with recorded() as launches:
        rms_norm(x, torch.ones(64), 1e-6)
    assert len(launches) == 1 and launches[0].constants["COLUMNS"] == 64
    assert torch.equal(rms_norm(x, torch.ones(64), 0.0), x)  # as before


@needs_triton
@pytest.mark.parametrize("target", targets.ATTENTION, ids=lambda target: target.name)
def test_every_step_that_is_timed_can_be_launched(target: targets.Attention) -> None:
    from tools.gpu_suite.compiling import recorded

    with recorded() as launches:
        speeds.launch_once(target)
    kernels = {launch.kernel.__name__ for launch in launches}
    assert len(kernels) >= 2  # what plans, and what attends


@needs_triton
def test_a_kernel_that_does_not_compile_fails_its_case(context: Context) -> None:
    from dataclasses import replace

    from kernels.rms_norm import rms_norm
    from tools.gpu_suite.compiling import compile_all, recorded

    with recorded() as launches:
        rms_norm(torch.ones(3, 64), torch.ones(64), 1e-6)
    wrong = replace(launches[0], constants=launches[0].constants | {"WIDTH": 63}, name="of 63 columns")
    context.case("compiles", lambda: compile_all([wrong], lambda: 60))
    assert last(context)["status"] == "failed"
    assert any("of 63 columns" in line for line in last(context)["error"])


# -- what a GPU is needed for, over stand-ins for it


def tiny(new: int, cached: int) -> targets.Attention:
    return targets.Attention("tiny", (new,) * 2, (cached,) * 2, (4, 2, 16), accept_us=5.0, good_us=4.0)


@pytest.mark.parametrize(("us", "status"), [(4.5, "passed"), (6.0, "missed")])
def test_what_is_timed_is_judged(
    context: Context, monkeypatch: pytest.MonkeyPatch, us: float, status: str
) -> None:
    def once(works: list[Any]) -> Time:
        works[-1]()
        return Time(us, 0.01, True)

    monkeypatch.setattr(speeds, "time_works", once)
    monkeypatch.setattr(speeds, "BEYOND_L2", 1e5)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cpu = torch.device("cpu")
    decode = speeds.time_attention(tiny(1, 40), {"matmul_tflops": 700.0}, cpu, context)
    assert (decode["status"], decode["is_good"]) == (status, False)
    assert decode["rivals_us"]["sdpa"] == us and "needs flashinfer" in decode["rivals_us"]["flashinfer"]
    assert "sdpa" not in speeds.time_attention(tiny(8, 40), {}, cpu, context)["rivals_us"]
    rope = targets.RowWise("rope", "rope_kv_write", 40, 16, accept_us=5.0, good_us=4.0)
    assert speeds.time_row_wise(rope, cpu)["status"] == status
    for kernel in ("add_rms_norm", "silu_mul"):
        assert speeds.time_row_wise(targets.RowWise(kernel, kernel, 4, 32), cpu)["accept_us"] is None


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> transfers.Link:
    """Between the host and itself."""
    monkeypatch.setattr("engine.cuda.device.TorchDevice", lambda _: VirtualDevice())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(transfers, "TOTAL", 4 << 20)
    monkeypatch.setattr(transfers, "_REPEATS", 2)
    monkeypatch.setattr(VirtualDevice, "seconds_between", lambda *_: 1e-3)
    return transfers.Link()


def test_copies_of_all_sizes_are_timed_and_arrive(
    link: transfers.Link, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "Link", lambda: link)
    monkeypatch.setattr(transfers, "COPIERS", {"runs": RunCopier})
    monkeypatch.setattr(transfers, "SWAP_IN", (8, 64 << 10))
    assert transfers.run(context)["gbps"]["runs in"]["64 KiB"] == pytest.approx(4.2, abs=0.1)
    cases = {record["case"]: record for record in context.written}
    assert cases["runs both at once, 256 KiB"]["gbps"] == pytest.approx(8.4, abs=0.1)
    assert cases["swap-in of 256 pages of one layer, 8B shape"]["status"] == "missed"
    assert {record["status"] for record in cases.values()} == {"passed", "missed"}
    half = slice(0, transfers.TOTAL)
    link.gbps("runs", transfers.scattered(1 << 20, 64), transfers.IN)  # all of it
    assert link.near[half].sort().values.equal(link.far[half].sort().values)


class At:
    """An event on a clock of milliseconds."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def elapsed_time(self, later: "At") -> float:
        return later.ms - self.ms


def test_the_gap_between_steps_is_from_the_end_of_one_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    figures = throughput.gaps([(At(10 * n), At(10 * n + 7)) for n in range(9)])  # type: ignore[misc]
    assert figures == {"replays": 9, "busy_ms": 7.0, "gap_ms": 3.0, "gap_ms_p90": 3.0}
    assert throughput.gaps([]) == {"replays": 0}


# -- reports


def made_report(**more: Any) -> dict[str, Any]:
    slow = {"case": "decode", "status": "missed", "us": 200.0, "floor_us": 100.0, "ratio": 2.0}
    slow |= {
        "accept_us": 160.0,
        "good_us": 140.0,
        "is_good": False,
        "rivals_us": {"sdpa": 171.5, "varlen": "no"},
    }
    quick = {**slow, "case": "norm", "status": "passed", "us": 150.0, "rivals_us": {}}
    gap = {"case": "0.5B: decoding 64 at 512", "status": "passed", "tokens_per_s": 60000.0, "step_ms": 1.05}
    gap |= {"gap_ms": 0.12, "accept_ms": 0.3, "is_good": False}
    broken = {"case": "attention", "status": "failed", "error": ["Traceback", "Wrong: off by 3.0"]}
    gpu = {"name": "NVIDIA H200"}
    return {
        "date": "2026-01-02 03:04:05",
        "commit": "abc1234",
        "is_dry_run": False,
        "environment": {"gpu": gpu, "torch": "2.11.0", "triton": "3.6.0"},
        "sections": {name: {"seconds": 0, "figures": {}, "cases": []} for name in sections.SECTIONS}
        | {
            "correctness": {"seconds": 1, "figures": {}, "cases": [broken, {**broken, "case": "other"}]},
            "speeds": {"seconds": 1, "figures": {}, "cases": [slow, quick]},
            "throughput": {"seconds": 1, "figures": {}, "cases": [gap]},
        },
    } | more


def test_the_table_tells_failures_once_and_fits_what_is_shown() -> None:
    text = report.table(made_report(), 5000)
    assert "FAILED correctness: attention and 1 more" in text and "Wrong: off by 3.0" in text
    assert "MISSED" in text and "accepted" in text and "sdpa 171.5" in text and "varlen" not in text
    assert "60,000 tokens/s" in text and "0.120 ms between steps (median)" in text
    assert len(report.table(made_report(), 700)) <= 700


def test_the_readme_shows_the_newest_whole_run_or_says_that_there_is_none(tmp_path: Path) -> None:
    assert report.readme_table(report.newest(tmp_path)) == report.NOT_YET
    (tmp_path / "gpu_suite_dry.json").write_text(json.dumps(made_report(is_dry_run=True)))
    assert report.newest(tmp_path) is None
    part = {"speeds": made_report()["sections"]["speeds"]}
    (tmp_path / "gpu_suite_part.json").write_text(json.dumps(made_report(sections=part)))
    assert report.newest(tmp_path) is None
    (tmp_path / "gpu_suite_old.json").write_text(json.dumps(made_report(date="2025-01-01 00:00:00")))
    (tmp_path / "gpu_suite_new.json").write_text(json.dumps(made_report()))
    found = report.newest(tmp_path)
    assert found is not None and found["date"].startswith("2026")
    text = report.readme_table(found)
    assert "| decode | **200.0 us** | 100.0 | 160.0 | 140.0 | sdpa 171.5 |" in text
    assert "| norm | 150.0 us |" in text and "2 of 5 checks passed" in text and "commit abc1234" in text


def test_without_a_gpu_it_says_what_can_be_done() -> None:
    ended = subprocess.run(
        [ROOT / "tools" / "gpu_suite.sh"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and "--dry-run" in ended.stdout.splitlines()[-1]
    assert "torch" in ended.stdout and "commit" in ended.stdout  # versions, before all else


@pytest.mark.timeout(400)
@needs_triton
def test_a_dry_run_of_some_sections_is_whole(tmp_path: Path) -> None:
    assert_dry_run_is_whole(tmp_path, "throughput", "conversations")


@pytest.mark.heavy
@pytest.mark.timeout(900)
@needs_triton
def test_a_dry_run_is_whole(tmp_path: Path) -> None:
    assert_dry_run_is_whole(tmp_path, *sections.SECTIONS)


def assert_dry_run_is_whole(tmp_path: Path, *names: str) -> None:
    out = tmp_path / "report.json"
    command = [ROOT / "tools" / "gpu_suite.sh", "--dry-run", "--out", out, "--only", *names]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(ended.stdout) <= 12_000
    found = json.loads(out.read_text())
    cases = [case for section in found["sections"].values() for case in section["cases"]]
    assert list(found["sections"]) == list(names) and all(
        section["cases"] for section in found["sections"].values()
    )
    assert ended.stdout.splitlines()[-1] == f"dry run: {len(cases)} of {len(cases)}"
    assert {case["status"] for case in cases} <= {"passed", "skipped"}
