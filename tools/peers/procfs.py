"""What processes use, from /proc: CPU time, memory, and who else was computing meanwhile."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """The process and everything that it has started, however deep."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := _stat(int(folder.name)):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, pending = [], [pid]
    while pending:
        found.append(pending.pop())
        pending += children.get(found[-1], [])
    return found


def cpu_s(pids: Sequence[int]) -> float:
    """User and system seconds of those of `pids` that are alive."""
    stats = (_stat(pid) for pid in pids)
    return sum((int(fields[11]) + int(fields[12])) * _TICK_S for fields in stats if fields)


def busy_s() -> float:
    """Seconds, over all cores, that were not idle; what the host took away counts as well."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) * _TICK_S


def memory_bytes(pids: list[int]) -> int:
    """What the processes hold, pages that they share with each other counted once.

    Of a single process, all its resident pages, though another server may map the same file.
    """
    kind = "Pss:" if len(pids) > 1 else "Rss:"
    return sum(_rollup(pid, kind) for pid in pids)


def _rollup(pid: int, kind: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (the state) on; none of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


class Watch:
    """From now on: what others than this process and `pids` compute."""

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self._pids = [os.getpid(), *pids]
        self._at = time.perf_counter()
        self._own, self._all = cpu_s(self._pids), busy_s()

    def own_cpu_s(self) -> float:
        """CPU seconds of this process and `pids`."""
        return cpu_s(self._pids) - self._own

    def foreign_cores(self, *started: int) -> float:
        """How many cores others have kept busy on average; `started` are ours that began meanwhile."""
        wall = time.perf_counter() - self._at
        own = self.own_cpu_s() + cpu_s(started)
        return max(0.0, (busy_s() - self._all - own) / wall)
