"""One section in a process of its own.

python -m tools.gpu_suite.worker SECTION --records FILE --seconds N [--dry-run] [--done CASE ...]

Exit code 3: the device is lost to this process, others may go on with what is left.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

from tools.gpu_suite.sections import MODULES, Context, DeviceLost

LOST = 3


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=MODULES)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--done", nargs="*", default=[])
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.seconds
    context = Context(chosen.section, chosen.dry_run, deadline, chosen.records, frozenset(chosen.done))
    section = importlib.import_module(MODULES[chosen.section])
    try:
        figures = section.dry_run(context) if chosen.dry_run else section.run(context)
    except DeviceLost:
        return LOST
    context.write({"figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
