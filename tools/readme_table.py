"""The numbers in the README, made from tools/results.

    python -m tools.readme_table          prints them
    python -m tools.readme_table --write  puts them between the README's markers

A test compares the README with them, so that no number there is anything but a measured one.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from tools.bench import compare
from tools.gpu_suite import report as gpu_suite
from tools.peers.report import engines_table

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).resolve().parents[1] / "README.md"
SHAPES = ("llama-160m", "qwen2.5-0.5b")
RESULT_OF = {  # module -> one of the results that it made
    "bench_history": "history",
    "bench_decode": "decode_llama-160m",
    "bench_wire": "wire",
    "bench_start": "start_demo",
    "bench_log": "token_log",
    "bench_operations": "operations",
    "bench_sampling": "sampling",
    "bench_cache": "cache",
    "bench_text": "text",
    "demo_model.evaluate": "demo_model",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        README.write_text(with_numbers(README.read_text()))
    else:
        print(set_up(), scoreboard(), table(), cpu(), gpu(), tiers(), sep="\n\n")


def with_numbers(readme: str) -> str:
    """`readme` with what stands between its markers made anew."""
    for name, text in (
        ("set-up", set_up()),
        ("scoreboard", scoreboard()),
        ("measured", table()),
        ("cpu", cpu()),
        ("gpu", gpu()),
        ("tiers", tiers()),
    ):
        begin, end = f"<!-- {name}: python -m tools.readme_table --write -->", f"<!-- /{name} -->"
        head, _, rest = readme.partition(begin)
        _, _, tail = rest.partition(end)
        readme = f"{head}{begin}\n{text}\n{end}{tail}"
    return readme


def set_up() -> str:
    setup = _load("setup")
    return (
        "Both need Linux on x86-64 and Python 3.11. The first sets itself up in `.venv`: "
        f"{setup['server_s']:.0f} s with quick downloads, {setup['server_mb']:,} MB, most of it torch. The "
        f"second adds what tests need: {setup['tests_s']:.0f} s more, {setup['tests_mb']:,} MB in all. "
        "Nothing is written outside the checkout."
    )


def scoreboard() -> str:
    demo = _load("demo")
    asked = demo["recall_asked"]
    rows = [
        ("tokens computed", f"{demo['computed_tokens']:,}", f"{demo['stateless_computed_tokens']:,}"),
        ("first token of the first turn", *_ms(demo, "ttft_first_ms")),
        ("first token of the last turn", *_ms(demo, "ttft_last_ms")),
        ("answers equal", f"{demo['equal_turns']}/{demo['compared_turns']}", "the yardstick"),
        ("facts right", f"{demo['recall_correct']}/{asked}", f"{demo['stateless_recall_correct']}/{asked}"),
    ]
    lines = ["| | Continuo | re-reading every turn |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + f"\n\n{demo['turns']} turns in {demo['seconds']} s. {_where(demo)}"


def _ms(demo: dict[str, Any], name: str) -> tuple[str, str]:
    return f"{demo[name]:.0f} ms", f"{demo[f'stateless_{name}']:.0f} ms"


def table() -> str:
    rows = ["| what | measured | by |", "|---|---|---|"]
    rows += [f"| {what} | {figure} | `{by}` |" for what, figure, by in _rows()]
    where: dict[str, list[str]] = {}
    for module, name in RESULT_OF.items():
        machine = _load(name)["machine"]
        where.setdefault(f"{machine['cores']} cores of an {machine['cpu']}", []).append(f"`{module}`")
    places = "; ".join(f"{', '.join(modules)} on {place}" for place, modules in where.items())
    last = (
        "`by`: a module of `tools`, run with `python -m`. Measured on virtual machines shared with others: "
    )
    return "\n".join([*rows, "", f"{last}{places}."])


def cpu() -> str:
    """Continuo beside vLLM and llama.cpp, for every shape that was measured."""
    parts, commands = [], []
    for shape in SHAPES:
        if not (RESULTS / f"peers_{shape}.json").exists():
            continue
        result = _load(f"peers_{shape}")
        header, *rows = engines_table(result["medians"])
        runs = max(each["runs"] for row in result["medians"].values() for each in row.values())
        lines = [f"| {shape} | {' | '.join(header[1:])} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        versions = "; ".join(result["versions"].values())
        parts += [
            "\n".join(lines),
            f"Medians of {runs} interleaved runs at commit {result['commit']}, beside {versions}. "
            f"{_where(result)}{_alone(shape)}",
        ]
        commands.append(f"    {result['command']}")
    return "\n\n".join([*parts, "\n".join(["    python -m tools.peers setup DIR", *commands])])


def _alone(shape: str) -> str:
    """What was measured of Continuo alone since then."""
    if not (RESULTS / f"continuo_alone_{shape}.json").exists():
        return ""
    result = _load(f"continuo_alone_{shape}")
    memory, start = (result["medians"][workload]["continuo"] for workload in ("memory", "start"))
    return (
        f" Continuo alone at {result['commit']}, which lets go of the file it read its weights from: "
        f"{memory['gb']:.2f} GB, {memory['besides_gb']:.2f} of them neither weights nor KV; first token "
        f"{start['start_s']:.1f} s after its start."
    )


def gpu() -> str:
    """What the newest run of the GPU suite found."""
    return gpu_suite.readme_table(gpu_suite.newest(RESULTS))


def tiers() -> str:
    """The curve of `continuo bench`: what a second tier is worth."""
    report, low = _load("bench_tiers"), _load("bench_low_load")
    names = compare.names(report)
    titles = {"stateless": "re-reading every turn", "device": "one tier", "two-tier": "two tiers"}
    lines = [
        f"| turns/s offered | {' | '.join(titles[name] for name in names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    by_rate: dict[float, dict[str, dict[str, Any]]] = {}
    for point in report["points"]:
        by_rate.setdefault(point["rate"], {})[point["configuration"]] = point["figures"]
    for rate, figures in by_rate.items():
        cells = (
            f"{each['turns_per_s']:.2f}, {each['normalised_ms_p90']:.0f} ms, "
            f"{1 - each['recomputed_share']:.0%} found"
            for each in (figures[name] for name in names)
        )
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    limit = report["settings"]["at_normalised_ms"]
    at = {name: compare.turns_at(report, name, limit) for name in names}
    reached = ", ".join(f"{titles[name]} {at[name]:.2f}" for name in names)
    ratios = compare.ratios_of(low["points"], "two-tier", "device", "normalised_ms_mean")
    set_size = median(point["figures"]["working_set_device_tiers"] for point in report["points"])
    said = (
        "A cell is turns per second done, normalised latency per token (p90), and the share of histories",
        f"that was found. Turns per second at a p90 of {limit:g} ms: {reached}. The histories of",
        f"{report['points'][0]['conversations']} live conversations came to {set_size:.1f} device tiers.",
        f"Where all fit one tier ({low['points'][0]['conversations']} conversations, low load), a second",
        f"changes latency by a factor of {median(ratios):.3f} (median of {len(ratios)} pairs,",
        f"{compare.interval(ratios)}). {_where(report)}",
    )
    commands = ("python -m tools.random_model llama-160m llama-160m", report["command"], low["command"])
    shown = "\n".join(f"    {command}" for command in commands)
    return "\n".join(lines) + f"\n\n{' '.join(said)}\n\n{shown}"


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"Measured on {machine['cores']} cores of an {machine['cpu']} ({', '.join(machine['isa'])}), "
        f"{machine['memory_gib']} GiB, a virtual machine shared with others, on {result['date']}."
    )


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def _rows() -> list[tuple[str, str, str]]:
    history, wire, log = _load("history"), _load("wire"), _load("token_log")
    kept, again = history["ttft_kept_ms"], history["ttft_reread_ms"]
    rows = [
        (
            "time to first token, 32 new tokens after 128 → 2,048 tokens of history (llama-160m)",
            f"kept: {kept['128']} → {kept['2048']} ms; read again: {again['128']} → {again['2048']} ms",
            "bench_history",
        ),
        (
            "slope of it, per 1,000 tokens of history",
            f"kept: {history['slope_kept_ms_per_1k']} ms; read again: {history['slope_reread_ms_per_1k']} ms",
            "bench_history",
        ),
    ]
    for shape in SHAPES:
        decode = _load(f"decode_{shape}")
        rows.append(
            (
                f"decoding one conversation at {decode['context']} tokens, {shape}",
                f"{decode['step_ms']} ms per token, {decode['share_of_bandwidth']:.0%} of what "
                f"{decode['dram_read_gbps']} GB/s of DRAM allow",
                "bench_decode",
            )
        )
    start, qwen = _load("start_demo"), _load("start_qwen2.5-0.5b")
    operations, text, cache = _load("operations"), _load("text"), _load("cache")
    sampling = _load("sampling")["kinds"]["all"]
    return [
        *rows,
        (
            "through gRPC, against the same batch in process (8 streams)",
            f"{wire['grpc_over_in_process']:.0%} of the tokens/s; event loop late by "
            f"{wire['loop_lag_p99_ms']} ms at p99",
            "bench_wire",
        ),
        (
            "from starting the process to the first token at a client",
            f"{start['first_token_s']} s (demo model), {qwen['first_token_s']} s (qwen2.5-0.5b)",
            "bench_start",
        ),
        (
            "committing a turn to the token log",
            f"{log['one_by_one']['ms_p50']:.1f} ms alone, "
            f"{log['grouped_by_16']['ms_p50']:.1f} ms for 16 at once",
            "bench_log",
        ),
        (
            "fork, rewind of a conversation of 2,000 tokens, answered when on disk",
            f"{operations['ms_p50']['fork']:.1f} ms, {operations['ms_p50']['rewind']:.1f} ms; no KV copied, "
            f"at most {max(operations['most_recomputed'].values())} tokens computed again",
            "bench_operations",
        ),
        (
            "choosing tokens for 64 conversations, penalties, filters and logprobs on (llama-160m)",
            f"{sampling['sampling_ms']} ms, {sampling['share']:.1%} of a step",
            "bench_sampling",
        ),
        (
            f"planning a step of {cache['running']} turns beside {cache['conversations']:,} idle ones",
            f"{cache['plan_ms']:.2f} ms; {cache['choose_us']:.0f} µs for each block that leaves a tier; "
            f"{cache['bytes_per_conversation']:,} bytes a conversation, {cache['bytes_per_block']} a block",
            "bench_cache",
        ),
        (
            f"rendering and checking a turn behind {text['messages']} messages, slowest of "
            f"{len(text['templates'])} templates",
            f"{max(one['turn']['wall_ms'] for one in text['templates'].values()):.1f} ms",
            "bench_text",
        ),
        (
            "the demo model, asked for facts told 2 to 12 turns ago (new dialogues)",
            _recall(_load("demo_model")),
            "demo_model.evaluate",
        ),
    ]


def _recall(demo: dict[str, Any]) -> str:
    def share(condition: str, kind: str) -> str:
        return f"{demo['questions'][condition][kind]['share']:.1%}"

    return (
        f"{share('new dialogues', 'recall')} right ({share('unseen values', 'recall name')} of names, "
        f"{share('unseen values', 'recall number')} of numbers never seen in training); "
        f"never told: {share('new dialogues', 'not_told')} say so"
    )


if __name__ == "__main__":
    main()
