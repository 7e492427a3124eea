"""Measured costs in a file, and what they hold for: this model, computed so, on this machine."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from engine.cache.costs import MeasuredCosts
from engine.errors import ConfigError

FORMAT = 1
REMEDY = "measure again with `continuo profile`"


@dataclass(frozen=True, slots=True)
class Subject:
    """What costs depend on: measured for one subject, they say nothing about another."""

    model: str  # fingerprint
    device: str
    dtype: str
    threads: int
    block_size: int
    machine: str  # its processor, and its GPU if that computes
    kernels: str
    version: str  # of this program

    @property
    def file_name(self) -> str:
        """One per model, machine and way to compute.  A later version measures anew into the same file."""
        machine = hashlib.sha256(self.machine.encode()).hexdigest()[:8]
        return f"{self.model}-{self.device}-{self.dtype}-{self.threads}-{self.block_size}-{machine}.json"


@dataclass(frozen=True, slots=True)
class Profile:
    subject: Subject
    measured_at: int  # seconds since 1970
    load_average: float  # of the machine, before
    costs: MeasuredCosts

    def age(self, now: float) -> str:
        """For people."""
        days = max(0, int(now - self.measured_at)) // 86400
        return "today" if days == 0 else f"{days} day{'s' * (days > 1)} ago"


def write_profile(profile: Profile, path: Path) -> None:
    """Whole or not at all.  Raises ConfigError."""
    content = json.loads(json.dumps({"format": FORMAT, **asdict(profile)}))  # keys as they will be read
    content["sha256"] = _digest(content)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ConfigError(f"the profile cannot be written to {path}: {error.strerror}") from error


def read_profile(path: Path, subject: Subject) -> Profile:
    """Raises ConfigError, which names the file and says what is wrong with it."""
    try:
        profile = _parsed(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the profile {path} cannot be read: {error.strerror}; {REMEDY}") from error
    except ValueError as error:
        raise ConfigError(f"the profile {path} is of no use: {error}; {REMEDY}") from error
    for field in fields(Subject):
        theirs, ours = getattr(profile.subject, field.name), getattr(subject, field.name)
        if theirs != ours:
            what = field.name.replace("_", " ")
            raise ConfigError(f"the profile {path} is of {what} {theirs}, and this is {ours}; {REMEDY}")
    return profile


def _parsed(data: bytes) -> Profile:
    """Raises ValueError."""
    try:
        content = json.loads(data)
    except ValueError:
        raise ValueError("it is damaged") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("it is no profile of continuo")
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']}, and this program reads {FORMAT}")
    if content.pop("sha256", None) != _digest(content):
        raise ValueError("it is damaged: its content and its checksum differ")
    try:
        costs = content["costs"]
        profile = Profile(
            Subject(**content["subject"]),
            int(content["measured_at"]),
            float(content["load_average"]),
            MeasuredCosts(
                _seconds(costs["compute_s"]),
                _seconds(costs["load_s"]),
                _seconds(costs["store_s"]),
                float(costs["spread"]),
            ),
        )
        profile.costs.table()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged: {error!r}") from error
    return profile


def _seconds(measured: Mapping[str, Any]) -> dict[int, float]:
    seconds = {int(key): float(value) for key, value in measured.items()}
    if not seconds or not all(0 < value < math.inf for value in seconds.values()):
        raise ValueError(f"it holds impossible costs: {seconds}")
    return seconds


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What names this machine to a profile."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, os.uname().machine)
