"""Sweeps of the simulated engine, and what a real run measured beside what is foreseen."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.simulation.profiles import Profile, cpu_profile, gpu_profiles
from engine.simulation.simulated_engine import CoreSizes
from engine.step_budget import Pacing
from tools.bench.driver import People
from tools.bench.files import trace
from tools.bench.plan import CONFIGURATIONS, Plan, Point, plan_of
from tools.bench.population import Population, Recorded, think_factor
from tools.bench.report import merged, read
from tools.bench.workload import CHATS, Script, chat_pool
from tools.measure import RESULTS
from tools.simulated_load import Setting, SimulatedLoad

CPU_RESULT = "step_costs_llama-160m"
BLOCK_SIZE = 32
GIGABYTE = 10**9
GPU_STEP_TOKENS, GPU_CONCURRENT, GPU_RUN_AHEAD = 2048, 256, 1
SERVER = EngineConfig(Path())  # what a server is started with unless it is told otherwise
COLUMNS = {
    "turns/s": "turns_per_s",
    "normalised ms mean": "normalised_ms_mean",
    "p90": "normalised_ms_p90",
    "TTFT ms p50": "ttft_ms_p50",
    "device %": "cached_device_share",
    "host %": "cached_host_share",
    "recomputed %": "recomputed_share",
}


def profile_named(name: str) -> Profile:
    """Raises ConfigError."""
    profiles = gpu_profiles(BLOCK_SIZE)
    if name in profiles:
        return profiles[name]
    path = RESULTS / f"{CPU_RESULT}.json" if name == "cpu" else Path(name)
    try:
        return cpu_profile(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name} is no profile: neither one of {', '.join(profiles)}, cpu, nor a file that "
            f"--measure wrote ({error})"
        ) from None


@dataclass(frozen=True, slots=True)
class Sweep:
    """Pensieve's workload, people who chat, at several rates; or a trace, as recorded if it says itself when
    each conversation begins.
    """

    configurations: Sequence[str]  # of CONFIGURATIONS
    rates: Sequence[float]  # turns per second
    device_bytes: float  # of KV, in all
    host_bytes: float
    context_tokens: int
    lengths: str = "sharegpt"
    think_s: float = 60.0
    warmup_s: float = 60.0
    duration_s: float = 120.0
    seed: int = 0
    trace: Path | None = None

    def points(self, profile: Profile) -> Iterator[dict[str, Any]]:
        """Rate by rate, configuration by configuration.  Raises FileError."""
        pool, starts = self._conversations()
        device, host = (
            int(size / profile.kv_bytes_per_token) for size in (self.device_bytes, self.host_bytes)
        )
        for rate in [None] if starts else self.rates:
            for name in self.configurations:
                chosen = setting(profile, CONFIGURATIONS[name], device, host, self.context_tokens)
                people = Recorded(starts) if rate is None else Population(pool, self.seed, rate)
                figures = SimulatedLoad(chosen, people).run(self.warmup_s, self.duration_s)
                yield {"configuration": name, "rate": rate, "figures": figures}

    def _conversations(self) -> tuple[list[Script], list[tuple[float, Script]]]:
        """To draw from, or with the second in which each begins."""
        if self.trace is None:
            scripts = chat_pool(CHATS[self.lengths], self.seed, 1.0, self.think_s)
            return fitting(scripts, self.context_tokens), []
        found = trace(self.trace, 1.0, 1.0)
        if isinstance(found[0], Script):
            return fitting(found, self.context_tokens), []
        begun = [(at_s, script.within(self.context_tokens)) for at_s, script in found]
        return [], [(at_s, script) for at_s, script in begun if script.exchanges]


def setting(
    profile: Profile, flags: Sequence[str], device_tokens: int, host_tokens: int, context_tokens: int
) -> Setting:
    """`flags` are those of `serve` that matter here."""
    is_gpu = profile.num_gpus > 0
    sizes = CoreSizes(
        num_blocks=device_tokens // BLOCK_SIZE,
        num_host_blocks=int(_value(flags, "host_kv_tokens", host_tokens)) // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        policy=str(_value(flags, "policy", SERVER.policy)),
        max_step_tokens=int(
            _value(flags, "max_step_tokens", GPU_STEP_TOKENS if is_gpu else SERVER.max_step_tokens)
        ),
        max_concurrent=int(
            _value(flags, "max_concurrent", GPU_CONCURRENT if is_gpu else SERVER.max_concurrent)
        ),
        run_ahead=GPU_RUN_AHEAD if is_gpu else SERVER.run_ahead,
        pacing=None if is_gpu else Pacing(),
    )
    return Setting(profile, sizes, context_tokens, "--stateless" in flags)


def curve_table(points: Sequence[Mapping[str, Any]]) -> str:
    """A line per point."""
    head = ["turns/s offered", "", *COLUMNS]
    return aligned(
        [head, *([_number(point["rate"]), point["configuration"], *_cells(point)] for point in points)]
    )


def beside(path: Path, profile: Profile) -> dict[str, Any]:
    """Every point of a report of `continuo bench`, measured and foreseen.  ReportError, ConfigError."""
    report = read(path)
    for name in ("cancel_rate", "resume_rate"):
        if report["settings"][name]:
            raise ConfigError(
                f"{path} was measured with a {name} of {report['settings'][name]}, not simulated"
            )
    planned = plan_of(Namespace(**_as_parsed(report["settings"])))
    simulated = []
    measured = merged(report["points"])
    for point in measured:
        at = next(each for each in planned.points if _is_of(each, point))
        chosen = setting(
            profile,
            at.configuration.flags,
            point["device_tokens"],
            point["host_tokens"],
            point["context_tokens"],
        )
        load = SimulatedLoad(chosen, _people(planned, at, point["context_tokens"]))
        figures = load.run(planned.manner.warmup_s, planned.manner.duration_s)
        simulated.append({**_name(point), "figures": figures})
    return {
        "measured_by": {name: report[name] for name in ("command", "date", "commit", "machine")},
        "profile": profile.name,
        "workload": report["workload"],
        "points": [
            {
                **_name(one),
                "measured": {name: one["figures"][name] for name in COLUMNS.values()},
                "simulated": {name: other["figures"][name] for name in COLUMNS.values()},
            }
            for one, other in zip(measured, simulated, strict=True)
        ],
        "table": _beside_table(measured, simulated),
    }


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


# -- private


def _people(planned: Plan, point: Point, context_tokens: int) -> People:
    """As the generator of `continuo bench` makes them."""
    if planned.starts:
        begun = [(at_s, script.within(context_tokens)) for at_s, script in planned.starts]
        return Recorded([(at_s, script) for at_s, script in begun if script.exchanges])
    pool, load = fitting(planned.pool, context_tokens), point.load
    if load.conversations is not None and load.rate is not None:
        factor = think_factor(pool, load.rate, load.conversations)
        pool = [script.paced(factor) for script in pool]
    return Population(pool, planned.manner.seed, load.rate or 1.0, load.conversations)


def fitting(pool: Sequence[Script], context_tokens: int) -> list[Script]:
    return [script for each in pool if (script := each.within(context_tokens)).exchanges]


def _as_parsed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: Path(value) if name in ("model", "json", "plots", "profile") and value else value
        for name, value in settings.items()
    }


def _is_of(planned: Point, point: Mapping[str, Any]) -> bool:
    load = planned.load
    return (planned.configuration.name, load.rate, load.conversations) == (
        point["configuration"],
        point["rate"],
        point["conversations"],
    )


def _name(point: Mapping[str, Any]) -> dict[str, Any]:
    return {name: point[name] for name in ("configuration", "rate", "conversations")}


def _beside_table(measured: Sequence[Mapping[str, Any]], simulated: Sequence[Mapping[str, Any]]) -> str:
    rows = [["turns/s offered", "conversations", "", "", *COLUMNS]]
    for one, other in zip(measured, simulated, strict=True):
        rate, conversations = (_number(one[name]) for name in ("rate", "conversations"))
        rows.append([rate, conversations, one["configuration"], "measured", *_cells(one)])
        rows.append(["", "", "", "simulated", *_cells(other)])
    return aligned(rows)


def _cells(point: Mapping[str, Any]) -> list[str]:
    cells = []
    for title, name in COLUMNS.items():
        value = point["figures"][name]
        factor = 100 if title.endswith("%") else 1
        cells.append(
            "-" if value is None else f"{factor * value:,.2f}" if factor == 1 else f"{100 * value:.0f}"
        )
    return cells


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _value(flags: Sequence[str], name: str, default: Any) -> Any:
    """Of an argument in `flags`, the last one that is given."""
    flag = f"--{name.replace('_', '-')}"
    found = [value for key, value in zip(flags, flags[1:], strict=False) if key == flag]
    return found[-1] if found else default
