"""Everything that needs a GPU, one command, one report.

    python -m tools.gpu_suite [--dry-run] [--out FILE] [--only SECTION ...]

`tools/gpu_suite.sh` calls this with the Python that is there.  The report is written whatever fails; a dry
run writes one only to --out.  Exit code 0 if all that could run did as it is to; 2: no GPU.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.gpu_suite import report
from tools.gpu_suite.environment import environment, lines
from tools.gpu_suite.sections import BEGUN, FAILED, GOOD, SECTIONS
from tools.measure import RESULTS

_MOST_S = 575.0  # for all sections with a GPU, whatever each of them may take
_GRACE_S = 12.0  # for a section that is over its time in the middle of a case
_LEAST_S = 10.0  # worth going on with
_ATTEMPTS = 4  # processes for one section
_MOST_CHARACTERS = 11_500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="all that needs no GPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the report goes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    chosen = parser.parse_args()
    begun, found = time.monotonic(), environment()
    out = Output()
    out.say(*lines(found))
    if found["gpu"] is None and not chosen.dry_run:
        out.say("error: this needs a CUDA device; --dry-run does all that does not")
        return 2
    whole: dict[str, Any] = {
        "command": " ".join(["tools/gpu_suite.sh", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": found["commit"],
        "is_dry_run": chosen.dry_run,
        "environment": found,
        "sections": {},
    }
    path = chosen.out
    if path is None and not chosen.dry_run:
        name = re.sub(r"\W+", "-", found["gpu"]["name"].lower()).strip("-")
        part = [] if set(chosen.only) == set(SECTIONS) else chosen.only
        path = RESULTS / f"{'_'.join(['gpu_suite', name, *part])}.json"
    for name in chosen.only:
        seconds: float = SECTIONS[name][chosen.dry_run]
        if not chosen.dry_run:
            seconds = max(1.0, min(seconds, _MOST_S - (time.monotonic() - begun)))
        section = run_section(name, seconds, chosen.dry_run)
        whole["sections"][name] = section
        whole["seconds"] = round(time.monotonic() - begun, 1)
        out.say(report.line(name, section))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(whole, indent=1) + "\n")
    out.say("", report.table(whole, out.left), f"{whole['seconds']} s; report: {path or 'not kept'}")
    cases = [case for section in whole["sections"].values() for case in section["cases"]]
    good = sum(case["status"] in GOOD for case in cases)
    out.say(f"{'dry run: ' if chosen.dry_run else ''}{good} of {len(cases)}")
    return 0 if good == len(cases) and cases else 1


class Output:
    """Not more than a page or two, for those who see only so much of it."""

    left = _MOST_CHARACTERS

    def say(self, *parts: str) -> None:
        for part in parts:
            self.left -= len(part) + 1
            print(part, flush=True)


def run_section(name: str, seconds: float, is_dry: bool) -> dict[str, Any]:
    """All cases of it, in as many processes as it takes, and the figures of the last."""
    begun = time.monotonic()
    deadline = begun + seconds
    cases: dict[str, dict[str, Any]] = {}
    figures: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for attempt in range(_ATTEMPTS):
            left = deadline - time.monotonic()
            if figures is not None or (attempt and left < _LEAST_S):
                break
            records = Path(scratch) / f"{attempt}.jsonl"
            how_it_ended = _worker(name, records, left, is_dry, list(cases))
            written = [json.loads(line) for line in _lines(records)]
            for record in written:
                if "case" in record:
                    cases[record["case"]] = record
                else:
                    figures = record["figures"]
            cut_off = [case for case in cases.values() if case["status"] == BEGUN]
            for case in cut_off:
                case |= {"status": FAILED, "error": how_it_ended}
            if figures is None and not written:  # it cannot even begin
                cases["(start)"] = {"case": "(start)", "status": FAILED, "error": how_it_ended}
                break
    if figures is None and all(case["status"] in GOOD for case in cases.values()):
        cases["(end)"] = {"case": "(end)", "status": FAILED, "error": how_it_ended}
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "figures": figures or {},
        "cases": list(cases.values()),
    }


def _worker(name: str, records: Path, seconds: float, is_dry: bool, done: list[str]) -> list[str]:
    """Runs one, and says how it ended."""
    command = [sys.executable, "-m", "tools.gpu_suite.worker", name, "--records", str(records)]
    command += ["--seconds", str(seconds), *["--dry-run"][: int(is_dry)], "--done", *done]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=seconds + _GRACE_S)
        how = f"the process ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # also what it started
        said, _ = process.communicate()
        how = f"killed: not over after {seconds + _GRACE_S:.0f} s"
    return [how, *(line[:200] for line in said.strip().splitlines()[-4:])]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
