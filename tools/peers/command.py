"""The command line of the comparison: see the package."""

import argparse
import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import uvloop

from tools.measure import model_of_shape, write_result
from tools.peers import report, setup
from tools.peers.engines import NAMES, EngineFailed
from tools.peers.session import DEFAULT_WORKLOADS, ONCE, Session
from tools.peers.work import measure_of
from tools.random_model import SHAPES


def main() -> int:
    """The exit code: 0, 2 wrong usage, 1 if anything failed, though the rest was measured."""
    chosen = _parser().parse_args()
    if chosen.command == "setup":
        return _setup(chosen.folder)
    if missing := setup.missing(chosen.peers, chosen.engines):
        print(f"error: {missing} is not there: python -m tools.peers setup {chosen.peers}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers end with us either way
    with model_of_shape(chosen.shape, chosen.model) as model:
        return _run(chosen, model.absolute())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.peers", description="Measures beside other engines."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("setup", help="install vLLM and build llama-server")
    make.add_argument("folder", type=Path)
    run = commands.add_parser("run", help="measure all engines, in turn")
    run.add_argument("shape", choices=sorted(SHAPES))
    run.add_argument("--peers", type=Path, required=True, help="the folder that setup has made")
    run.add_argument("--model", type=Path, help="a folder that tools.random_model has written before")
    run.add_argument(
        "--workloads",
        nargs="+",
        type=_workload,
        help="one, many, 'decode BxC', 'prefill N', start, memory (all that have a target)",
    )
    run.add_argument("--engines", nargs="+", choices=NAMES, default=list(NAMES))
    run.add_argument("--repeats", type=int, default=3)
    run.add_argument("--json", type=Path, help="where the result goes (tools/results/peers_SHAPE.json)")
    return parser


def _workload(text: str) -> str:
    if text not in ONCE:
        try:
            measure_of(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _setup(folder: Path) -> int:
    try:
        setup.make(folder)
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[0]} failed; what went before is kept: run this again", file=sys.stderr)
        return 1
    return 0


def result_name(shape: str, *, is_whole: bool) -> str:
    """A run of some engines or workloads, or one that failed, does not take the place of a whole one."""
    return f"peers_{shape}" if is_whole else f"peers_{shape}_part"


def _run(chosen: argparse.Namespace, model: Path) -> int:
    session = Session(
        shape=chosen.shape,
        model=model,
        peers=chosen.peers.absolute(),
        engines=[name for name in NAMES if name in chosen.engines],
        workloads=chosen.workloads or DEFAULT_WORKLOADS[chosen.shape],
        repeats=chosen.repeats,
    )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(session.measure())
    except KeyboardInterrupt:
        session.failures.append("interrupted: what is missing was not measured")
    except EngineFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = session.result()
    command = " ".join(
        ["python -m tools.peers", *(f"'{word}'" if " " in word else word for word in sys.argv[1:])]
    )
    is_whole = not (session.failures or chosen.workloads) and set(chosen.engines) == set(NAMES)
    name = result_name(chosen.shape, is_whole=is_whole)
    path = write_result(name, {"command": command, **result}, chosen.json)
    print(report.aligned(report.engines_table(result["medians"])))
    print(report.aligned(report.targets_table(result["targets"])))
    for failure in session.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    print(path)
    return 1 if session.failures else 0
