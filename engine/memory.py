"""How much memory this process may still take, and what sets the limit: the machine, a control group, or a
resource limit.
"""

import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc")
LOCKS_ANYTHING = 1 << 14  # CAP_IPC_LOCK
Rlimit = Callable[[int], tuple[int, int]]  # as resource.getrlimit


@dataclass(frozen=True, slots=True)
class Room:
    num_bytes: int
    limit: str  # what sets it, for people


def available(proc: Path = PROC, rlimit: Rlimit = resource.getrlimit) -> Room:
    """The least of what is left by the machine, by every control group from this process's own up to the
    root, and by the limits of address space and data; 4 GiB where the system does not tell.
    """
    rooms = [*_machine(proc), *_control_groups(proc)]
    rooms += _resource_limit(proc, rlimit(resource.RLIMIT_AS)[0], "VmSize", "RLIMIT_AS (ulimit -v)")
    rooms += _resource_limit(proc, rlimit(resource.RLIMIT_DATA)[0], "VmData", "RLIMIT_DATA (ulimit -d)")
    return min(rooms, key=_size, default=Room(4 << 30, "a guess: this system does not tell what is free"))


def lockable(proc: Path = PROC, rlimit: Rlimit = resource.getrlimit) -> Room | None:
    """How much of it may be pinned, as it is for copies by a GPU; None: all."""
    if int(_status(proc).get("CapEff", "0"), 16) & LOCKS_ANYTHING:
        return None
    soft, _ = rlimit(resource.RLIMIT_MEMLOCK)
    return next(iter(_resource_limit(proc, soft, "VmLck", "RLIMIT_MEMLOCK (ulimit -l)")), None)


def _size(room: Room) -> int:
    return room.num_bytes


def _machine(proc: Path) -> Iterator[Room]:
    match = re.search(r"^MemAvailable: +(\d+) kB$", _read(proc / "meminfo"), re.MULTILINE)
    if match:
        yield Room(int(match[1]) * 1024, "the machine's memory")


def _resource_limit(proc: Path, limit: int, used: str, name: str) -> list[Room]:
    if limit == resource.RLIM_INFINITY:
        return []
    taken = int(_status(proc).get(used, "0 kB").removesuffix(" kB")) * 1024
    return [Room(max(0, limit - taken), name)]


def _control_groups(proc: Path) -> Iterator[Room]:
    """Version 1 and version 2: a machine may have both, with memory in either."""
    own = dict(re.findall(r"^\d+:([^:\n]*):(.*)$", _read(proc / "self/cgroup"), re.MULTILINE))
    for line in _read(proc / "self/mountinfo").splitlines():
        mount, _, rest = line.partition(" - ")
        kind, _, options = rest.split(maxsplit=2)
        root, mount_point = mount.split()[3:5]
        if kind == "cgroup2":
            path, left = own.get(""), _left_of_v2
        elif kind == "cgroup" and "memory" in options.split(","):
            path = next((own[names] for names in own if "memory" in names.split(",")), None)
            left = _left_of_v1
        else:
            continue
        inside = PurePosixPath(path or "/")
        inside = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
        for group in (inside, *inside.parents):
            num_bytes = left(Path(mount_point) / group)
            if num_bytes is not None:
                yield Room(num_bytes, f"the control group {PurePosixPath('/') / group}")


def _left_of_v2(group: Path) -> int | None:
    limits = (_read(group / name).strip() for name in ("memory.max", "memory.high"))
    limit = min((int(text) for text in limits if text.isdecimal()), default=None)
    return None if limit is None else _left(group, limit, "memory.current", "inactive_file")


def _left_of_v1(group: Path) -> int | None:
    """Where there is no limit, the file says a number that is larger than any memory."""
    text = _read(group / "memory.limit_in_bytes").strip()
    if not text.isdecimal():
        return None
    return _left(group, int(text), "memory.usage_in_bytes", "total_inactive_file")


def _left(group: Path, limit: int, usage: str, cache: str) -> int | None:
    """Page cache counts as free: the kernel gives it up."""
    used = _read(group / usage).strip()
    stat = dict(re.findall(r"^(\w+) (\d+)$", _read(group / "memory.stat"), re.MULTILINE))
    return max(0, limit - int(used) + int(stat.get(cache, 0))) if used.isdecimal() else None


def _status(proc: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+):\s+(.*)$", _read(proc / "self/status"), re.MULTILINE))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
