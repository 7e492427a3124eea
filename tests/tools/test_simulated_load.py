"""Clients of the simulated engine, its sweeps, and what a real run measured beside what is foreseen."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.simulation.profiles import gpu_profiles
from engine.simulation.simulated_engine import CoreSizes
from engine.simulation.step_costs import StepCosts
from tools.bench.population import Population, Recorded
from tools.bench.workload import CHATS, Exchange, Script, chat_pool
from tools.simulated_curves import Sweep, beside, curve_table, profile_named
from tools.simulated_load import Setting, SimulatedLoad
from tools.step_costs import CASES, COPIED, fitted

EIGHT = gpu_profiles()["h200-8b"]


def load(*scripts: tuple[float, Script], stateless: bool = False, host_blocks: int = 0) -> SimulatedLoad:
    sizes = CoreSizes(64, host_blocks, max_step_tokens=512, run_ahead=0)
    return SimulatedLoad(Setting(EIGHT, sizes, 2000, stateless), Recorded(scripts))


def script(*exchanges: tuple[int, int, float]) -> Script:
    return Script(tuple(Exchange(*each) for each in exchanges))


def test_a_lone_turn_takes_what_its_steps_cost() -> None:
    figures = load((1.0, script((100, 11, 0.0)))).run(0.0, 10.0)
    costs = EIGHT.costs
    floor_ms = 1000 * (costs.fixed_s + costs.weights_s)
    assert figures["turns"] == 1 and figures["steps"] == 11
    assert figures["ttft_ms_mean"] == pytest.approx(floor_ms, rel=0.02)
    assert figures["normalised_ms_mean"] == pytest.approx(floor_ms, rel=0.02)


def test_a_turn_is_said_a_think_time_after_the_reply_before() -> None:
    talk = script((10, 5, 0.0), (10, 5, 3.0), (10, 5, 4.0))
    assert load((1.0, talk)).run(0.0, 8.0)["turns"] == 2
    assert load((1.0, talk)).run(0.0, 8.5)["turns"] == 3


def test_turns_before_the_warm_up_has_ended_do_not_count() -> None:
    talks = [(float(at), script((10, 5, 0.0))) for at in range(10)]
    assert load(*talks).run(5.5, 3.0)["turns"] == 3


def test_the_history_is_found_on_the_device_unless_it_is_given_up() -> None:
    talk = script((100, 50, 0.0), (20, 10, 1.0))
    kept = load((0.0, talk)).run(0.0, 10.0)
    assert (kept["history_tokens"], kept["cached_device_share"]) == (149, 1.0)
    again = load((0.0, talk), stateless=True).run(0.0, 10.0)
    assert (again["history_tokens"], again["recomputed_share"]) == (149, 1.0)


def test_histories_of_those_that_are_there_at_the_beginning_are_known() -> None:
    pool = chat_pool(CHATS["sharegpt"], 0, 0.2, 60.0)
    sizes = CoreSizes(4000, 0)
    played = SimulatedLoad(Setting(EIGHT, sizes, 4000), Population(pool, 0, 2.0)).run(0.0, 60.0)
    assert played["recomputed_tokens"] == 0 and played["cached_device_share"] > 0.95
    assert 90 < played["turns"] < 160


def test_figures_are_a_function_of_the_seed() -> None:
    sweep = Sweep(["two-tier"], [4.0], 1e9, 4e9, 4000, warmup_s=5.0, duration_s=20.0)

    def played(sweep: Sweep) -> list[object]:
        return [
            {name: value for name, value in point["figures"].items() if "wall" not in name}
            for point in sweep.points(EIGHT)
        ]

    assert played(sweep) == played(sweep)
    assert played(sweep) != played(replace(sweep, seed=1))


def test_a_sweep_has_every_configuration_at_every_rate() -> None:
    sweep = Sweep(["stateless", "lru"], [1.0, 2.0], 2e9, 2e9, 4000, warmup_s=5.0, duration_s=20.0)
    points = list(sweep.points(EIGHT))
    assert [(each["rate"], each["configuration"]) for each in points] == [
        *((1.0, "stateless"), (1.0, "lru")),
        *((2.0, "stateless"), (2.0, "lru")),
    ]
    assert len(curve_table(points).splitlines()) == 5


def test_a_trace_is_played_as_it_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    first = {"timestamp": 1000, "input_length": 1024, "output_length": 10, "hash_ids": [1, 2]}
    later = {"timestamp": 5000, "input_length": 1100, "output_length": 10, "hash_ids": [1, 2, 3]}
    path.write_text(f"{json.dumps(first)}\n{json.dumps(later)}\n")
    sweep = Sweep(["two-tier"], [], 4e9, 4e9, 4000, warmup_s=0.5, duration_s=9.5, trace=path)
    (point,) = sweep.points(EIGHT)
    figures = point["figures"]
    assert point["rate"] is None and figures["turns"] == 2
    assert figures["history_tokens"] == 1033 and figures["cached_device_share"] == 1.0
    assert curve_table([point]).splitlines()[1].split()[0] == "-"


def test_fitted_constants_are_those_that_the_steps_were_made_with() -> None:
    known = StepCosts(0.002, 0.006, 2.5e-4, 1.5e-4, 1e-6, 8e-8, 1e-4, 2e-4, 3e-5, 12, False)
    found = fitted(
        [known.compute_s(case.plan()) for case in CASES],
        [known.copies_s(0, count)[1] for count in COPIED],
        [count * known.store_s for count in COPIED],
        12,
    )
    for field in fields(StepCosts):
        assert getattr(found, field.name) == pytest.approx(getattr(known, field.name), rel=0.05), field.name


def test_a_measured_run_is_foreseen_point_by_point(tmp_path: Path) -> None:
    settings = {
        **dict.fromkeys(("scale", "lengths", "time_scale", "slo_ttft_ms", "slo_tpot_ms", "server")),
        **{"workload": ["chat"], "seed": 0, "think_time": 10.0, "rates": [1.0, 2.0], "conversations": None},
        **{"compare": ["stateless", "two-tier"], "host_kv_tokens": 65536, "repeats": 1},
        **{"warmup": 5.0, "duration": 20.0, "cancel_rate": 0.0, "resume_rate": 0.0},
    }
    figures = dict.fromkeys(
        ("turns_per_s", "normalised_ms_mean", "normalised_ms_p90", "ttft_ms_p50", "cached_device_share"), 1.0
    ) | {"cached_host_share": 0.0, "recomputed_share": 0.0}
    points = [
        {
            **{"configuration": name, "rate": rate, "conversations": None, "repeat": 0, "figures": figures},
            **{
                "device_tokens": 4096,
                "host_tokens": 0 if name == "stateless" else 65536,
                "context_tokens": 4064,
            },
        }
        for rate in (1.0, 2.0)
        for name in ("stateless", "two-tier")
    ]
    about = {"tool": "continuo bench", "command": "", "date": "", "commit": "", "machine": {}, "workload": ""}
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**about, "settings": settings, "points": points}))
    told = beside(path, EIGHT)
    assert [(each["configuration"], each["rate"]) for each in told["points"]] == [
        (each["configuration"], each["rate"]) for each in points
    ]
    assert [each["simulated"]["recomputed_share"] > 0.5 for each in told["points"]] == [True, False] * 2
    assert told["points"][0]["measured"]["turns_per_s"] == 1.0
    assert told["table"].count("simulated") == 4


def test_a_run_with_cancelled_turns_is_not_foreseen(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    settings = {"cancel_rate": 0.2, "resume_rate": 0.0}
    path.write_text(json.dumps({"tool": "continuo bench", "settings": settings, "points": [{}]}))
    with pytest.raises(ConfigError, match="cancel_rate of 0.2"):
        beside(path, EIGHT)


def test_what_is_no_profile_is_refused() -> None:
    with pytest.raises(ConfigError, match="no profile"):
        profile_named("h300")
