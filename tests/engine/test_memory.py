"""What memory is left, by everything that may limit it: trees of files as Linux shows them."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from engine.memory import Room, available, lockable

GiB = 1 << 30
V2_MOUNT = "30 23 0:26 {root} {at} rw,nosuid,nodev - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {root} {at} rw,relatime shared:9 - cgroup cgroup rw,memory"
OTHER_MOUNTS = "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n34 31 0:31 / {at} rw - cgroup cgroup rw,cpuset"


class System:
    """/proc and control groups below a folder."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.groups = folder / "proc", folder / "sys" / "fs" / "cgroup"
        self.limits = dict.fromkeys(
            (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_MEMLOCK), resource.RLIM_INFINITY
        )
        self.status(VmSize="4194304 kB", VmData="1048576 kB", VmLck="0 kB", CapEff="0000000000000000")
        self.write(self.proc / "meminfo", "MemTotal: 99999999 kB\nMemAvailable:   67108864 kB\n")  # 64 GiB

    def write(self, path: Path, text: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def status(self, **lines: str) -> None:
        self.write(self.proc / "self" / "status", "\n".join(f"{k}:\t{v:>10}" for k, v in lines.items()))

    def in_groups(self, own: str, mount: str, root: str = "/") -> None:
        self.write(self.proc / "self" / "cgroup", own)
        mounts = OTHER_MOUNTS.format(at=self.groups / "cpuset"), mount.format(root=root, at=self.groups)
        self.write(self.proc / "self" / "mountinfo", "\n".join(mounts))

    def v2(self, path: str, limit: object, used: int = 0, cache: int = 0, high: object = "max") -> None:
        group = self.groups / path
        self.write(group / "memory.max", limit)
        self.write(group / "memory.high", high)
        self.write(group / "memory.current", used)
        self.write(group / "memory.stat", f"anon 5\nfile 7\ninactive_file {cache}\nactive_file 3")

    def v1(self, path: str, limit: int, used: int = 0, cache: int = 0) -> None:
        group = self.groups / path
        self.write(group / "memory.limit_in_bytes", limit)
        self.write(group / "memory.usage_in_bytes", used)
        self.write(group / "memory.stat", f"inactive_file 1\ntotal_inactive_file {cache}")

    def rlimit(self, which: int) -> tuple[int, int]:
        return self.limits[which], resource.RLIM_INFINITY

    def available(self) -> Room:
        return available(self.proc, self.rlimit)

    def lockable(self) -> Room | None:
        return lockable(self.proc, self.rlimit)


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def test_without_limits_the_machine_decides(system: System) -> None:
    assert system.available() == Room(64 * GiB, "the machine's memory")
    system.in_groups("0::/", V2_MOUNT)
    system.v2("", "max", used=GiB)
    assert system.available() == Room(64 * GiB, "the machine's memory")


def test_a_system_that_does_not_tell_is_guessed(tmp_path: Path) -> None:
    room = available(tmp_path, lambda which: (resource.RLIM_INFINITY,) * 2)
    assert room == Room(4 * GiB, "a guess: this system does not tell what is free")


def test_of_nested_control_groups_the_one_with_least_left_binds(system: System) -> None:
    system.in_groups("0::/kube/pod/engine", V2_MOUNT)
    system.v2("kube/pod/engine", "max", used=GiB)
    system.v2("kube/pod", 8 * GiB, used=3 * GiB, cache=GiB)
    system.v2("kube", 32 * GiB, used=4 * GiB)
    assert system.available() == Room(6 * GiB, "the control group /kube/pod")
    system.v2("kube", 32 * GiB, used=31 * GiB)
    assert system.available() == Room(GiB, "the control group /kube")
    system.v2("kube/pod/engine", 2 * GiB, used=2 * GiB - 5)
    assert system.available() == Room(5, "the control group /kube/pod/engine")


def test_groups_of_other_processes_do_not_count(system: System) -> None:
    system.in_groups("0::/mine", V2_MOUNT)
    system.v2("mine", 8 * GiB)
    system.v2("mine/child", 1)
    system.v2("other", 1)
    assert system.available() == Room(8 * GiB, "the control group /mine")


def test_where_memory_is_slowed_down_counts_as_its_limit(system: System) -> None:
    system.in_groups("0::/", V2_MOUNT)
    system.v2("", 8 * GiB, high=6 * GiB, used=GiB)
    assert system.available() == Room(5 * GiB, "the control group /")


def test_a_group_that_is_over_its_limit_leaves_nothing(system: System) -> None:
    system.in_groups("0::/", V2_MOUNT)
    system.v2("", GiB, used=2 * GiB)
    assert system.available().num_bytes == 0


def test_a_container_sees_its_own_group_as_the_root(system: System) -> None:
    """With a name space of its own the path is /; without, the mount shows only what is below its root."""
    system.v2("", 8 * GiB, used=GiB)
    for own, root in (("0::/", "/"), ("0::/docker/3f", "/docker/3f"), ("0::/../other", "/")):
        system.in_groups(own, V2_MOUNT, root)
        assert system.available() == Room(7 * GiB, "the control group /")


def test_control_groups_of_version_1_count_as_well(system: System) -> None:
    unlimited = (1 << 63) - 4096
    system.in_groups("9:name=systemd:/x\n4:memory:/box/inner\n0::/", V1_MOUNT)
    system.v1("box/inner", unlimited, used=GiB)
    system.v1("box", 4 * GiB, used=2 * GiB, cache=GiB)
    system.v1("", unlimited)
    assert system.available() == Room(3 * GiB, "the control group /box")


def test_limits_of_address_space_and_data_bind_what_is_not_used_of_them(system: System) -> None:
    system.limits[resource.RLIMIT_AS] = 10 * GiB
    assert system.available() == Room(6 * GiB, "RLIMIT_AS (ulimit -v)")
    system.limits[resource.RLIMIT_DATA] = 2 * GiB
    assert system.available() == Room(GiB, "RLIMIT_DATA (ulimit -d)")
    system.limits[resource.RLIMIT_AS] = GiB
    assert system.available().num_bytes == 0


def test_what_may_be_locked_limits_pinned_memory_only(system: System) -> None:
    assert system.lockable() is None
    system.limits[resource.RLIMIT_MEMLOCK] = 8 << 20
    system.status(VmLck="1024 kB", CapEff="0000000000000000")
    assert system.lockable() == Room(7 << 20, "RLIMIT_MEMLOCK (ulimit -l)")
    assert system.available() == Room(64 * GiB, "the machine's memory")


def test_who_may_lock_anything_has_no_such_limit(system: System) -> None:
    system.limits[resource.RLIMIT_MEMLOCK] = 8 << 20
    system.status(VmLck="0 kB", CapEff="000001ffffffffff")  # root, mostly
    assert system.lockable() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_limit_of_this_process_is_found() -> None:
    code = "from engine.memory import available; room = available(); print(room.num_bytes, room.limit)"
    limit = 2 * GiB
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    ).stdout
    num_bytes, _, name = shown.strip().partition(" ")
    assert name == "RLIMIT_AS (ulimit -v)"
    assert limit - GiB < int(num_bytes) < limit
