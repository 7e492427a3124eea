"""The GPU suite, as far as it goes without one: cases, processes that die, comparisons, launches, reports."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pip
import pytest
import torch

from tests.tools.conftest import ROOT
from tools.gpu_suite import __main__ as suite
from tools.gpu_suite import report, sections, speeds, targets
from tools.gpu_suite.accuracy import Wrong, compare, poisoned, require_equal
from tools.gpu_suite.inputs import paged_steps
from tools.gpu_suite.sections import Context, Skip

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


def test_wheels_that_lie_beside_it_are_there_while_it_runs(tmp_path: Path) -> None:
    (tmp_path / "tools" / "gpu_suite").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    shutil.copy(ROOT / "tools" / "gpu_suite.sh", tmp_path / "tools")
    code = "import sys, unusual\nprint(unusual.__file__, *sys.argv[1:])\nsys.exit(3)\n"
    (tmp_path / "tools" / "gpu_suite" / "__main__.py").write_text(code)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", tmp_path / ".venv")
    with ZipFile(tmp_path / "wheels" / "unusual-1-py3-none-any.whl", "w") as wheel:
        about = "unusual-1.dist-info"
        wheel.writestr("unusual.py", "")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: unusual\nVersion: 1\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", f"unusual.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n")
    environment = os.environ | {"PYTHONPATH": str(Path(pip.__file__).parents[1])}
    command = [tmp_path / "tools" / "gpu_suite.sh", "--only", "speeds"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    unpacked, *arguments = ended.stdout.split()
    assert arguments == ["--only", "speeds"] and not Path(unpacked).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"tools", "wheels", ".venv"}


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
