"""Ranks that lend memory, simulated beside instances that do not, and beside one instance over all GPUs.

    python -m tools.simulate_ranks --result simulated_ranks          # all comparisons, in some minutes
    python -m tools.simulate_ranks --only short network              # some of them
    python -m tools.simulate_ranks --setup h200-8b --network nvlink --instances 8 --traces 2 5 mooncake
    python -m tools.simulate_ranks --data DIR                        # the real traces are there

All requests of a run are there at its beginning and go to instances in turn; throughput is of generated
tokens, until the last request ends.  Real traces are read from DIR, or where CONTINUO_TEST_DATA says.
"""

import argparse
import csv
import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.simulation.cluster import MAX_LENT_SHARE, SYSTEMS, Cluster, ClusterSettings, Figures
from engine.simulation.cluster_profiles import SETUPS
from engine.simulation.cluster_rank import Scheduling
from engine.simulation.cluster_workload import TRACES, Request, drawn_requests
from engine.simulation.network import networks
from tools.arguments import count
from tools.measure import RESULTS, write_result
from tools.simulated_curves import aligned

SHORT, LONG = tuple(TRACES)[:3], tuple(TRACES)[3:]
REAL = {
    "mooncake": "mooncake_conversation.jsonl.gz",
    "coding": "agentic_coding_sessions.jsonl.gz",
    "azure": "azure_llm_2023_conv.csv.gz",
}
LIMIT_S = 10_000.0  # of virtual time: a run that takes longer tells how many requests were left
PAPER = {
    "v1 over isolated": (1.03, 2.4),
    "v2 over isolated, traces 0-2": (1.35, 1.73),
    "v2 over single, traces 3-8": (1.4, 3.4),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One cluster and one workload, for several systems."""

    comparison: str
    trace: str
    num_instances: int = 16
    setup: str = "a100-7b"
    network: str = "infiniband"
    systems: tuple[str, ...] = tuple(SYSTEMS)
    requests_each: int = 16  # for each instance
    seeds: tuple[int, ...] = (1, 2)
    prefills: bool = True
    moved_tokens: int = 16  # for each step
    max_lent_share: float = MAX_LENT_SHARE
    settles: bool = True

    def run(self, system: str, requests: Sequence[Request], seed: int) -> Figures:
        setup = SETUPS[self.setup]
        network = networks(setup.nvlink, setup.infiniband)[self.network]
        scheduling = Scheduling(prefills=self.prefills, moved_tokens_per_step=self.moved_tokens)
        settings = ClusterSettings(
            setup,
            network,
            self.num_instances,
            system,
            scheduling,
            self.max_lent_share,
            self.settles,
            seed,
        )
        return Cluster(settings).run(requests, LIMIT_S)


@dataclass(slots=True)
class Outcome:
    case: Case
    figures: dict[str, list[Figures]] = field(default_factory=dict)  # by system, of each seed

    def tokens_per_s(self, system: str) -> float | None:
        runs = self.figures.get(system)
        return statistics.mean(run.tokens_per_s for run in runs) if runs else None

    def over(self, system: str, other: str) -> float | None:
        """Of throughputs; None where one of them did not serve all requests."""
        mine, theirs = self.tokens_per_s(system), self.tokens_per_s(other)
        whole = all(
            not run.refused and not run.unfinished
            for name in (system, other)
            for run in self.figures.get(name, ())
        )
        return mine / theirs if whole and mine and theirs else None


def comparisons() -> dict[str, list[Case]]:
    """What is run unless something else is asked for."""
    lending = ("isolated", "v1", "v2")
    few: Any = {"requests_each": 2, "seeds": (1,)}  # long ones take long to simulate
    cases = [
        *(Case("short", trace, n) for trace in SHORT for n in (2, 4, 8, 16, 32)),
        *(Case("long", trace, 32, **few) for trace in LONG),
        *(Case("decoding", trace, 32, prefills=False) for trace in SHORT),
        *(Case("decoding", trace, 32, prefills=False, **few) for trace in LONG),
        *(Case("models", "2", 16, setup) for setup in ("a100-13b", "h200-8b")),
        *(Case("models", "2", 8, setup) for setup in ("a100-70b", "h200-70b")),
    ]
    cases += [Case("moved", "2", moved_tokens=n, systems=("v2",), prefills=False) for n in (4, 16, 32, 64)]
    cases += [Case("cap", "2", max_lent_share=share, systems=("v1", "v2")) for share in (0.1, 0.25, 0.5, 1.0)]
    cases += [
        Case("settling", "2", 16, systems=("v1",), settles=on, requests_each=64, seeds=(1, 2, 3))
        for on in (True, False)
    ]
    cases += [Case("real", name, 16, systems=lending + ("single",), seeds=(1,)) for name in REAL]
    for name in networks(SETUPS["a100-7b"].nvlink, SETUPS["a100-7b"].infiniband):
        cases += [
            Case("network", "2", 16, network=name, seeds=(1,)),
            Case("network", "4", 16, network=name, **few),
        ]
    named: dict[str, list[Case]] = {}
    for case in cases:
        named.setdefault(case.comparison, []).append(case)
    return named


def requests_of(case: Case, seed: int, data: Path | None) -> list[Request] | str:
    """Or why there are none."""
    number = case.requests_each * case.num_instances
    if case.trace in TRACES:
        return drawn_requests(case.trace, number, seed)
    if data is None or not (path := data / "traces" / REAL[case.trace]).exists():
        return "no data: name its folder with --data or CONTINUO_TEST_DATA"
    lengths = (each for each in _lengths(case.trace, path) if min(each) > 0)
    return [Request(n, *each) for n, each in zip(range(number), lengths, strict=False)]


def _lengths(name: str, path: Path) -> Iterator[tuple[int, int]]:
    """Prompt and reply of each request, in order.  Nothing is kept from one to the next."""
    with gzip.open(path, "rt") as lines:
        if name == "azure":
            for row in csv.DictReader(lines):
                yield int(row["ContextTokens"]), int(row["GeneratedTokens"])
        for line in lines:
            found = json.loads(line)
            if name == "mooncake":
                yield found["input_length"], found["output_length"]
            else:
                yield from ((each["in"], each["out"]) for each in found["requests"] if "in" in each)


def outcomes(cases: Sequence[Case], data: Path | None) -> Iterator[Outcome | str]:
    for case in cases:
        outcome = Outcome(case)
        reason = None
        for seed in case.seeds:
            requests = requests_of(case, seed, data)
            if isinstance(requests, str):
                reason = f"{case.comparison}, {case.trace}: {requests}"
                break
            for system in case.systems:
                outcome.figures.setdefault(system, []).append(case.run(system, requests, seed))
        yield reason or outcome


def table(found: Sequence[Outcome]) -> str:
    head = ["", "trace", "instances", "what", *(f"{name} tok/s" for name in SYSTEMS)]
    head += ["v1/isolated", "v2/isolated", "v1/single", "v2/single", "refused", "remote v1", "v2"]
    rows = [head]
    for each in found:
        case = each.case
        refused = [run.refused for run in each.figures.get("isolated", ())]
        rows.append(
            [
                case.comparison,
                case.trace,
                str(case.num_instances),
                _special(case),
                *(_cell(each.tokens_per_s(name), "{:,.0f}") for name in SYSTEMS),
                *(_cell(each.over(a, b)) for b in ("isolated", "single") for a in ("v1", "v2")),
                f"{sum(refused)}/{sum(run.requests for run in each.figures['isolated'])}" if refused else "-",
                *(_remote(each, name) for name in ("v1", "v2")),
            ]
        )
    return aligned(rows)


def _special(case: Case) -> str:
    usual = Case("", "")
    told = {
        "setup": case.setup,
        "network": case.network,
        "moved_tokens": f"{case.moved_tokens} tokens a step",
        "max_lent_share": f"{100 * case.max_lent_share:.0f} % lent",
        "settles": "debts settled" if case.settles else "debts not settled",
    }
    shown = [text for name, text in told.items() if getattr(case, name) != getattr(usual, name)]
    asked = {"moved": "moved_tokens", "cap": "max_lent_share", "settling": "settles", "network": "network"}
    if case.comparison in asked:
        shown = [told[asked[case.comparison]]]
    return ", ".join(shown)


def _cell(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _remote(outcome: Outcome, system: str) -> str:
    runs = outcome.figures.get(system)
    return f"{100 * statistics.mean(run.remote_share for run in runs):.0f} %" if runs else "-"


def report(found: Sequence[Outcome], skipped: Sequence[str], wall_s: float) -> dict[str, Any]:
    points = [
        {
            **asdict(each.case),
            "figures": {name: [asdict(r) for r in runs] for name, runs in each.figures.items()},
        }
        for each in found
    ]
    traces = {**TRACES, **REAL}
    return {
        "wall_s": round(wall_s),
        "paper": PAPER,
        "traces": traces,
        "skipped": list(skipped),
        "points": points,
    }


def draw(found: Sequence[Outcome], path: Path) -> str:
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "no plot: it needs matplotlib; install it with: pip install '.[bench]'"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for trace, colour in zip(SHORT, ("tab:green", "tab:blue", "tab:red"), strict=True):
        chosen = [each for each in found if each.case.comparison == "short" and each.case.trace == trace]
        for system, style in (("v1", "s--"), ("v2", "o-")):
            points = [(each.case.num_instances, each.over(system, "isolated")) for each in chosen]
            left.plot(
                *zip(*points, strict=True), style, color=colour, label=f"{system}, {TRACES[trace]}"
            ) if points else None
    left.axhspan(*PAPER["v2 over isolated, traces 0-2"], alpha=0.12, label="Infinite-LLM's paper, traces 0-2")
    left.set(
        xlabel="instances", ylabel="throughput over isolated instances", title="short traces", xscale="log"
    )
    left.set_xticks((2, 4, 8, 16, 32), ("2", "4", "8", "16", "32"))
    left.minorticks_off()
    for comparison, colour in (("long", "tab:blue"), ("decoding", "tab:red")):
        chosen = [each for each in found if each.case.comparison == comparison and each.case.trace in LONG]
        for system, style in (("v1", "s--"), ("v2", "o-")):
            points = [(each.case.trace, each.over(system, "single")) for each in chosen]
            what = "prompts computed" if comparison == "long" else "prompts there"
            right.plot(
                *zip(*points, strict=True), style, color=colour, label=f"{system}, {what}"
            ) if points else None
    right.axhspan(*PAPER["v2 over single, traces 3-8"], alpha=0.12, label="Infinite-LLM's paper")
    right.set(
        xlabel="trace", ylabel="throughput over one instance on all GPUs", title="long traces, 32 instances"
    )
    for axes in (left, right):
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"plot: {path}"


def main() -> None:
    chosen = _parser().parse_args()
    begun = time.perf_counter()
    found: list[Outcome] = []
    skipped: list[str] = []
    try:
        for each in outcomes(_cases(chosen), chosen.data):
            if isinstance(each, str):
                skipped.append(each)
                continue
            found.append(each)
            case, spent_s = each.case, time.perf_counter() - begun
            told = f"{case.comparison}, trace {case.trace}, {case.num_instances} instances"
            print(f"{spent_s:4.0f} s  {told}", file=sys.stderr)
    except KeyboardInterrupt:
        skipped.append("the rest: interrupted")
    print(table(found), *skipped, sep="\n")
    if chosen.result is not None:
        print(write_result(chosen.result, report(found, skipped, time.perf_counter() - begun)))
        print(draw(found, RESULTS / f"{chosen.result}.png"))


def _cases(chosen: argparse.Namespace) -> list[Case]:
    if chosen.traces is None:
        return [case for name in chosen.only for case in comparisons()[name]]
    return [
        Case(
            "asked",
            trace,
            chosen.instances,
            chosen.setup,
            chosen.network,
            requests_each=chosen.requests,
            seeds=tuple(range(1, chosen.seeds + 1)),
            prefills=not chosen.no_prefill,
        )
        for trace in chosen.traces
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.simulate_ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = list(comparisons())
    add("--only", nargs="+", choices=names, default=names, help="comparisons; default: all")
    add("--traces", nargs="+", choices=[*TRACES, *REAL], help="one comparison, of these")
    add("--instances", type=count, default=16)
    add("--setup", choices=SETUPS, default="a100-7b")
    setup = SETUPS["a100-7b"]
    add("--network", choices=networks(setup.nvlink, setup.infiniband), default="infiniband")
    add("--requests", type=count, default=16, help="for each instance")
    add("--seeds", type=count, default=2, help="how many")
    add("--no-prefill", action="store_true", help="prompts are computed elsewhere and cost nothing")
    named = os.environ.get("CONTINUO_TEST_DATA")
    add("--data", type=Path, default=Path(named) if named else None, metavar="DIR")
    add("--result", metavar="NAME", help="keep everything in tools/results/NAME.json, and a plot beside it")
    return parser


if __name__ == "__main__":
    main()
