"""The engine's scheduler and cache under virtual time, without a model.

    python -m tools.simulate --operations 100000 --seed 7 [--policy lru] [--run-ahead 1] [--blocks 9] ...

Random operations on an engine that is far too small for them; ends with exit code 1 and the command that
shows it again if a reply differs from that of a fresh stateless run, or a block is lost.
"""

import argparse
import sys
import time
from dataclasses import fields

from engine.simulation.random_operations import OperationSettings, RandomOperations, SimulationFailed
from tools.arguments import count, positive


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    _add_operation_options(parser)
    chosen = vars(parser.parse_args())
    sys.exit(_operate(OperationSettings(**chosen)))


def _add_operation_options(parser: argparse.ArgumentParser) -> None:
    defaults = OperationSettings()
    for field in fields(OperationSettings):
        flag, default = f"--{field.name.replace('_', '-')}", getattr(defaults, field.name)
        if field.name == "policy":
            parser.add_argument(flag, choices=("retention", "lru", "lru-tail"), default=default)
        else:
            may_be_none = field.name in ("seed", "run_ahead", "host_blocks")
            parser.add_argument(flag, type=count if may_be_none else positive, default=default)


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
