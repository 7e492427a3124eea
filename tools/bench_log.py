"""What a commit to the token log costs on this machine's disk: one turn at a time, and many at once.

    python -m tools.bench_log [--commits 2000] [--folder .]

A turn waits for its commit before it is reported done: a single commit is latency that every turn pays,
grouped ones are what a busy server pays.  A bare fsync after a 4 KiB append is measured beside them: the
disk's share.  Measure on idle cores: each commit wakes two threads, which other work delays by milliseconds.
"""

import argparse
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from engine.token_log import TokenLog
from engine.types import (
    ConversationId,
    ConversationRecord,
    FinishReason,
    Message,
    SamplingParams,
    Tenant,
    Timing,
    TurnId,
    TurnRecord,
    Usage,
)
from tools.measure import write_result

TOKENS_PER_TURN = 256
GROUP = 16


class _Clock:
    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--commits", type=int, default=2000, help="turns to commit in each measurement")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write: the disk to measure")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".bench_log-") as folder:
        figures = {
            "sqlite": sqlite3.sqlite_version,
            "tokens_per_turn": TOKENS_PER_TURN,
            "one_by_one": _measure(Path(folder) / "one", arguments.commits, group=1),
            f"grouped_by_{GROUP}": _measure(Path(folder) / "grouped", arguments.commits, group=GROUP),
            "bare_fsync_ms": _bare_fsync_ms(Path(folder) / "bare", arguments.commits),
        }
    print(json.dumps(figures))
    print(f"written to {write_result('token_log', figures)}")


def _measure(folder: Path, num_commits: int, group: int) -> dict[str, float]:
    """Commit turns, `group` conversations at a time, each waiting for the whole group."""
    with closing(TokenLog.open(folder, clock=_Clock())) as log:
        names = [ConversationId(f"c-{n}") for n in range(group)]
        for name in names:
            log.create(ConversationRecord(name, Tenant("bench"), "none", None, SamplingParams())).result()
        transactions_before = log.num_commits
        rounds = num_commits // group

        def commit(number: int) -> None:
            pending = [log.commit_turn(name, _turn(number), number) for name in names]
            for future in pending:
                future.result()

        times_ms = _times_ms(commit, rounds)
        return {
            "turns_per_s": round(1e3 * rounds * group / sum(times_ms), 1),
            "ms_p50": round(statistics.median(times_ms), 4),
            "ms_p99": round(statistics.quantiles(times_ms, n=100)[98], 4),
            "turns_per_transaction": round(rounds * group / (log.num_commits - transactions_before), 2),
        }


def _bare_fsync_ms(path: Path, times: int) -> float:
    with path.open("wb", buffering=0) as file:

        def append(_: int) -> None:
            file.write(bytes(4096))
            os.fsync(file.fileno())

        return round(statistics.median(_times_ms(append, times)), 4)


def _times_ms(act: Callable[[int], None], times: int) -> list[float]:
    measured = []
    for number in range(times):
        start = time.perf_counter()
        act(number)
        measured.append(1e3 * (time.perf_counter() - start))
    return measured


def _turn(number: int) -> TurnRecord:
    half = TOKENS_PER_TURN // 2
    return TurnRecord(
        turn_id=TurnId(f"t-{number}"),
        number=number,
        first_token=number * TOKENS_PER_TURN,
        prompt_ids=tuple(range(half)),
        reply_ids=tuple(range(half)),
        messages=(Message("user", "word " * half),),
        reply_text="word " * half,
        finish_reason=FinishReason.STOP_TOKEN,
        matched_stop=None,
        usage=Usage(),
        timing=Timing(),
        created_at=0.0,
        done_seq=number,
        digest=bytes(32),
    )


if __name__ == "__main__":
    main()
