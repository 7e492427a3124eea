"""From starting the process to the first token that a client receives.

    python -m tools.bench_start [MODEL] [--name NAME] [--repeats 5]

Without MODEL the bundled demo model.  Files are in the page cache: it is a restart that is measured.
"""

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from rpc.client import ContinuoClient
from tools.measure import median, server_arguments, write_result
from tools.server_process import ServerProcess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--name", default="demo", help="what to call the model in the result's file name")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    runs = [asyncio.run(_first_token_s(chosen.model)) for _ in range(chosen.repeats)]
    figures: dict[str, Any] = {
        "model": chosen.name,
        "first_token_s": round(median(runs), 2),
        "runs": [round(run, 2) for run in runs],
    }
    print(figures)
    print(write_result(f"start_{chosen.name}", figures))


async def _first_token_s(model: Path | None) -> float:
    begun = time.perf_counter()
    server = await ServerProcess.start(*server_arguments(model))
    async with server, ContinuoClient(server.address) as client:
        async for delta in client.generate(token_ids=[1, 2, 3], max_tokens=2, ignore_eos=True):
            if delta.token_ids:
                return time.perf_counter() - begun
    raise RuntimeError("the server sent no token")


if __name__ == "__main__":
    main()
