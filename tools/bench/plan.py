"""From arguments to a plan: what is said, at which loads, to which servers.

What cannot work is told here, before any server starts.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.driver import Manner
from tools.bench.files import dialogues, trace
from tools.bench.metrics import Limits
from tools.bench.workload import CHATS, Script, agent_pool, chat_pool, mean_think_s
from tools.connection import UsageError

THINK_S = 60.0
# Arguments of `serve` that a server of one's own is started with, if they were given.
SERVER_ARGUMENTS = (
    *(
        "revision",
        "offline",
        "device",
        "dtype",
        "threads",
        "block_size",
        "device_kv_tokens",
        "device_kv_memory",
    ),
    *("host_kv_tokens", "host_kv_memory", "policy", "profile", "verify_reloads", "stateless"),
    *("max_step_tokens", "max_concurrent", "max_queue"),
)
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "stateless": ("--stateless", "--host-kv-tokens", "0"),
    "device": ("--host-kv-tokens", "0"),
    "two-tier": (),
    "lru": ("--policy", "lru"),
    "lru-tail": ("--policy", "lru-tail"),
}
HOST_ARGUMENTS = ("host_kv_tokens", "host_kv_memory")


@dataclass(frozen=True, slots=True)
class Configuration:
    name: str
    flags: tuple[str, ...]  # of `serve`; none for a server that runs already


@dataclass(frozen=True, slots=True)
class Load:
    rate: float | None  # turns per second
    conversations: int | None  # of a closed population

    def __str__(self) -> str:
        parts = [] if self.rate is None else [f"{self.rate:g} turns/s"]
        parts += [] if self.conversations is None else [f"{self.conversations} conversations"]
        return ", ".join(parts) or "as recorded"


@dataclass(frozen=True, slots=True)
class Point:
    configuration: Configuration
    load: Load
    repeat: int  # from 0


@dataclass(frozen=True, slots=True)
class Plan:
    """`pool` or `starts` is empty.  `points` in the order in which they are measured."""

    workload: str  # for people
    pool: Sequence[Script]
    starts: Sequence[tuple[float, Script]]
    points: Sequence[Point]
    manner: Manner
    limits: Limits


def plan_of(chosen: Namespace) -> Plan:
    """Raises UsageError, and FileError for what a workload file holds."""
    workload, pool, starts = _workload(chosen)
    loads = _loads(chosen, is_recorded=bool(starts))
    configurations = _configurations(chosen)
    return Plan(
        workload=workload,
        pool=pool,
        starts=starts,
        points=[
            Point(configuration, load, repeat)
            for repeat in range(chosen.repeats)
            for load in loads
            # Every other time backwards, so that nobody always comes first.
            for configuration in (configurations if repeat % 2 == 0 else reversed(configurations))
        ],
        manner=Manner(chosen.seed, chosen.warmup, chosen.duration, chosen.cancel_rate, chosen.resume_rate),
        limits=Limits(chosen.slo_ttft_ms, chosen.slo_tpot_ms),
    )


def _workload(chosen: Namespace) -> tuple[str, Sequence[Script], Sequence[tuple[float, Script]]]:
    kind, *files = chosen.workload
    _check_workload(chosen, kind, files)
    scale, seed = chosen.scale or 1.0, chosen.seed
    think_s = chosen.think_time
    if kind == "chat":
        name = chosen.lengths or "sharegpt"
        return f"chat ({name})", chat_pool(CHATS[name], seed, scale, think_s or THINK_S), []
    if kind == "dialogues":
        return f"dialogues of {files[0]}", dialogues(Path(files[0]), seed, think_s or THINK_S), []
    if kind == "agent":
        return kind, _thinking(agent_pool(seed, scale), think_s), []
    found = trace(Path(files[0]), scale, chosen.time_scale or 1.0)
    if isinstance(found[0], Script):
        return f"trace {files[0]}", _thinking(found, think_s), []
    if think_s is not None:
        raise UsageError(
            f"{files[0]} says itself when each turn comes; use --time-scale instead of --think-time"
        )
    return f"trace {files[0]}", [], found


def _check_workload(chosen: Namespace, kind: str, files: Sequence[str]) -> None:
    kinds = ("chat", "agent", "dialogues", "trace")
    if kind not in kinds:
        raise UsageError(f"--workload {kind} is not known; there are {', '.join(kinds)}")
    if len(files) != (kind in ("dialogues", "trace")):
        wanted = f"{kind} FILE" if kind in ("dialogues", "trace") else f"{kind}, which reads no file"
        raise UsageError(f"--workload {' '.join((kind, *files))} does not work; write --workload {wanted}")
    only = {
        "lengths": ("chat",),
        "time_scale": ("trace",),
        "scale": ("chat", "agent", "trace"),
    }
    for name, where in only.items():
        if getattr(chosen, name) is not None and kind not in where:
            raise UsageError(
                f"--{name.replace('_', '-')} goes with --workload {' or '.join(where)}, not with {kind}"
            )


def _thinking(pool: Any, think_s: float | None) -> Sequence[Script]:
    """With think times stretched to this mean."""
    own_s = mean_think_s(pool)
    return pool if think_s is None or not own_s else [script.paced(think_s / own_s) for script in pool]


def _loads(chosen: Namespace, is_recorded: bool) -> list[Load]:
    if is_recorded:
        if chosen.rates or chosen.conversations:
            raise UsageError(
                "this trace has its own arrivals; use --time-scale instead of --rates or --conversations"
            )
        return [Load(None, None)]
    if chosen.rates and chosen.conversations and chosen.think_time is not None:
        raise UsageError(
            "--rates, --conversations and --think-time are one too many: any two of them give the third "
            "(conversations = rate x think time x the share of turns that have one)"
        )
    rates = chosen.rates or ([None] if chosen.conversations else [1.0])
    return [Load(rate, size) for size in chosen.conversations or [None] for rate in rates]


def _configurations(chosen: Namespace) -> list[Configuration]:
    given = {name: getattr(chosen, name) for name in SERVER_ARGUMENTS if name in chosen}
    if chosen.server is not None:
        if chosen.step_profile:
            raise UsageError(
                "--step-profile is for a server that is started here; start yours with `continuo serve "
                "--step-profile FILE`"
            )
        if given or chosen.compare:
            names = ", ".join(
                f"--{name.replace('_', '-')}" for name in (*given, *(["compare"] if chosen.compare else []))
            )
            raise UsageError(
                f"{names}: these are for a server that is started here; --server is running already"
            )
        return [Configuration("server", ())]
    if not chosen.compare:
        return [Configuration("server", _flags(given))]
    return [_configuration(name, given) for name in dict.fromkeys(chosen.compare)]


def _configuration(name: str, given: dict[str, Any]) -> Configuration:
    own = CONFIGURATIONS[name]
    if "stateless" in given:
        raise UsageError("--stateless is a configuration of --compare; write --compare stateless ...")
    has_host = any(given.get(argument) for argument in HOST_ARGUMENTS)
    if name not in ("stateless", "device") and not has_host:
        raise UsageError(
            f"--compare {name} needs a host tier; give --host-kv-tokens N or --host-kv-memory SIZE"
        )
    replaced = {flag.removeprefix("--").replace("-", "_") for flag in own if flag.startswith("--")}
    if "host_kv_tokens" in replaced:
        replaced.add("host_kv_memory")
    return Configuration(name, (*_flags({key: given[key] for key in given if key not in replaced}), *own))


def _flags(given: dict[str, Any]) -> tuple[str, ...]:
    """As `serve` takes them, wherever it is started."""
    flags: list[str] = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        text = str(value.absolute() if isinstance(value, Path) else value)
        flags += [flag] if value is True else [flag, text]
    return tuple(flags)
