"""Plays the demo as a newcomer sees it and keeps the figures of its last line.

python -m tools.bench_demo
"""

import json
import subprocess
import sys

from tools.measure import write_result


def main() -> int:
    played = subprocess.run([sys.executable, "-m", "tools.demo"], stdout=subprocess.PIPE, text=True)
    print(played.stdout)
    if played.returncode == 0:
        print(write_result("demo", json.loads(played.stdout.splitlines()[-1])))
    return played.returncode


if __name__ == "__main__":
    sys.exit(main())
