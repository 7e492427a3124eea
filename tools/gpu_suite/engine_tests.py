"""The engine's tests on CUDA: those of tests/gpu and of what copies its KV, run by pytest without plugins.
In a dry run the former have a virtual device, and the latter are skipped.
"""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools.gpu_suite.sections import FAILED, PASSED, SKIPPED, Context

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "gpu"
_OF_COPIES = "device", "copies", "calibration", "transfer"  # modules of tests/cuda; some tests need a GPU


def run(context: Context) -> dict[str, Any]:
    return _tests(context, "gpu")


def dry_run(context: Context) -> dict[str, Any]:
    return _tests(context, "virtual")


def _tests(context: Context, device: str) -> dict[str, Any]:
    if "tests" in context.done:  # pytest itself did not end; its tests run in one process
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.xml"
        of_copies = [str(ROOT / "tests" / "cuda" / f"test_{name}.py") for name in _OF_COPIES]
        command = [sys.executable, "-m", "pytest", "-c", str(TESTS / "suite.ini"), *of_copies, str(TESTS)]
        command += ["-m", "gpu", "--on", device, "-q", "--tb=short", f"--junitxml={results}"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            said, _ = process.communicate(timeout=max(1.0, context.left_s - 5.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it tells where it was
            try:
                said, _ = process.communicate(timeout=10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
            context.write({"case": "tests", "status": FAILED, "error": ["interrupted", *_last(said)]})
        records = _read(results)
        for record in records:
            context.write(record)
        if not records:
            context.write({"case": "tests", "status": FAILED, "error": _last(said)})
    return {"tests": len(records)}


def _last(said: str) -> list[str]:
    return [line[:200] for line in said.strip().splitlines()[-6:]]


def _read(path: Path) -> list[dict[str, Any]]:
    """A record for each test that ended."""
    if not path.exists():
        return []
    records = []
    for test in ElementTree.parse(path).iter("testcase"):
        record: dict[str, Any] = {"case": test.get("name"), "status": PASSED}
        for outcome in test:
            if outcome.tag == "skipped":
                record |= {"status": SKIPPED, "reason": outcome.get("message", "")}
            elif outcome.tag in ("failure", "error"):
                record |= {"status": FAILED, "error": _last(outcome.text or outcome.get("message", ""))}
        records.append(record | {"seconds": float(test.get("time", 0))})
    return records
