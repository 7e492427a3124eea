"""How much memory this process may still take: the machine's, or its cgroup's if that is less."""

from pathlib import Path


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes; 4 GiB where the system does not tell."""
    candidates = [value for value in (_mem_available(proc), _cgroup_left(cgroup)) if value is not None]
    return min(candidates, default=4 << 30)


def _mem_available(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_left(cgroup: Path) -> int | None:
    """Of cgroup v2, as containers see it at the root; page cache counts as free because the kernel gives it
    up.
    """
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
