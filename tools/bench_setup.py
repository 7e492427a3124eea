"""Set-up in a fresh clone of HEAD, as a newcomer's first command does it: seconds and megabytes.

    python -m tools.bench_setup

Packages come through pip as this machine has it set up, so downloads may be quicker or slower than elsewhere.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.measure import write_result

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        venv = Path(folder) / ".venv"
        figures = {
            "server_s": _timed(folder, "./tools/setup.sh"),
            "server_mb": _megabytes(venv),
            "tests_s": _timed(folder, "./tools/setup.sh", "--dev"),
            "tests_mb": _megabytes(venv),
        }
    print(write_result("setup", figures))
    return 0


def _timed(folder: str, *command: str) -> float:
    begun = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL)
    return round(time.perf_counter() - begun, 1)


def _megabytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) // 10**6


if __name__ == "__main__":
    sys.exit(main())
