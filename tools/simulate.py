"""The engine's scheduler and cache under virtual time, without a model.

    python -m tools.simulate                                    # curves of H200 profiles
    python -m tools.simulate --beside bench.json                # what `continuo bench` measured, foreseen
    python -m tools.simulate --measure MODEL                    # the CPU profile, from a few real steps
    python -m tools.simulate --operations 100000 --seed 7 ...   # random operations, checked

Curves show throughput against normalised latency, for several configurations, under Pensieve's workload:
Poisson arrivals of conversations, exponential think times, lengths of published data sets (its section 6.1).
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.simulation.random_operations import OperationSettings, RandomOperations, SimulationFailed
from tools.arguments import count, model_folder, positive, some_seconds
from tools.bench.files import FileError
from tools.bench.plan import CONFIGURATIONS
from tools.bench.report import ReportError
from tools.bench.workload import CHATS
from tools.measure import model_of_shape, write_result
from tools.random_model import SHAPES
from tools.simulated_curves import (
    GIGABYTE,
    Sweep,
    beside,
    curve_table,
    profile_named,
)

RATES = {"h200-8b": (5.0, 10.0, 20.0, 30.0, 40.0, 50.0), "h200-70b": (2.0, 5.0, 10.0, 15.0, 20.0)}


def main() -> None:
    chosen = _parser().parse_args()
    try:
        sys.exit(_run(chosen))
    except (ConfigError, FileError, ReportError) as error:
        print(f"tools.simulate: {error}", file=sys.stderr)
        sys.exit(2)


def _run(chosen: argparse.Namespace) -> int:
    if chosen.operations is not None:
        names = [field.name for field in fields(OperationSettings)]
        return _operate(OperationSettings(**{name: getattr(chosen, name) for name in names}))
    if chosen.measure is not None:
        return _measure(chosen)
    if chosen.beside is not None:
        report = beside(chosen.beside, profile_named(chosen.profile[0] if chosen.profile else "cpu"))
        print(report["table"])
    else:
        report = {"curves": [_curves(name, chosen) for name in chosen.profile or RATES]}
    if chosen.result is not None:
        print(write_result(chosen.result, report))
    return 0


def _measure(chosen: argparse.Namespace) -> int:
    from tools.step_costs import measure

    folder = None if chosen.measure in SHAPES else Path(chosen.measure)
    with model_of_shape(chosen.measure, folder) as model:
        name = Path(chosen.measure).name
        figures = {"model": name, **measure(model, chosen.dtype, chosen.threads, chosen.repeats)}
    print(json.dumps(figures, indent=2), write_result(f"step_costs_{name}", figures), sep="\n")
    return 0


def _curves(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Of one profile."""
    profile = profile_named(name)
    sweep = Sweep(
        configurations=chosen.compare,
        rates=chosen.rates or RATES.get(name, (1.0,)),
        device_bytes=chosen.device_kv * GIGABYTE * max(1, profile.num_gpus),
        host_bytes=chosen.host_kv * GIGABYTE * max(1, profile.num_gpus),
        context_tokens=chosen.context,
        lengths=chosen.lengths,
        think_s=chosen.think_time,
        warmup_s=chosen.warmup,
        duration_s=chosen.duration,
        seed=chosen.seed,
        trace=chosen.trace,
    )
    points = []
    for point in sweep.points(profile):
        points.append(point)
        told = f"{point['configuration']} at {point['rate'] or 'recorded'} turns/s"
        print(f"{told}: simulated in {point['figures']['wall_s']:.0f} s", file=sys.stderr)
    what = sweep.trace.name if sweep.trace else f"{sweep.lengths}, think time {sweep.think_s:g} s"
    print(f"{profile.name}, {what}\n\n{curve_table(points)}\n")
    return {
        "profile": profile.name,
        "costs": asdict(profile.costs),
        "sweep": asdict(sweep) | {"trace": sweep.trace and sweep.trace.name},
        "points": points,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--result", metavar="NAME", help="also write tools/results/NAME.json")
    parser.add_argument("--seed", type=count, default=0)
    load = parser.add_argument_group("curves")
    load.add_argument(
        "--profile", nargs="+", metavar="P", help="h200-8b, h200-8b-mha, h200-70b, cpu or a file"
    )
    load.add_argument("--compare", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    load.add_argument("--rates", nargs="+", type=some_seconds, metavar="R", help="turns per second offered")
    load.add_argument("--lengths", choices=CHATS, default="sharegpt")
    load.add_argument("--trace", type=Path, metavar="FILE", help="conversations of a trace instead")
    load.add_argument("--think-time", type=some_seconds, default=60.0, metavar="S", help="mean")
    load.add_argument("--warmup", type=some_seconds, default=60.0, metavar="S")
    load.add_argument("--duration", type=some_seconds, default=120.0, metavar="S", help="of virtual time")
    load.add_argument("--device-kv", type=some_seconds, default=40.0, metavar="GB", help="for each GPU")
    load.add_argument("--host-kv", type=some_seconds, default=220.0, metavar="GB", help="for each GPU")
    load.add_argument("--context", type=positive, default=16_384, metavar="N")
    real = parser.add_argument_group("beside a measurement")
    real.add_argument("--beside", type=Path, metavar="FILE", help="what `continuo bench --json` wrote")
    costs = parser.add_argument_group("measuring a CPU profile")
    costs.add_argument("--measure", type=_model, metavar="MODEL", help="a folder, or a shape")
    costs.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    costs.add_argument("--threads", type=positive, default=2)
    costs.add_argument("--repeats", type=positive, default=10)
    operations = parser.add_argument_group("random operations")
    defaults = OperationSettings()
    for field in fields(OperationSettings):
        flag, default = f"--{field.name.replace('_', '-')}", getattr(defaults, field.name)
        if field.name == "policy":
            operations.add_argument(flag, choices=("retention", "lru", "lru-tail"), default=default)
        elif field.name == "operations":
            operations.add_argument(flag, type=positive, metavar="N", help="instead of curves")
        elif field.name != "seed":
            operations.add_argument(
                flag, type=count if field.name in ("run_ahead", "host_blocks") else positive, default=default
            )
    return parser


def _model(text: str) -> str:
    return text if text in SHAPES else str(model_folder(text))


def _operate(settings: OperationSettings) -> int:
    begun = time.perf_counter()
    simulation = RandomOperations(settings)
    try:
        simulation.run()
    except SimulationFailed as failed:
        print(failed, file=sys.stderr)
        return 1
    seconds = time.perf_counter() - begun
    print(f"{settings.operations:,} operations in {seconds:.1f} s, every reply as a stateless run's")
    for name, number in sorted(simulation.counts.items()):
        print(f"{number:>12,}  {name.removeprefix('num_').replace('_', ' ')}")
    return 0


if __name__ == "__main__":
    main()
