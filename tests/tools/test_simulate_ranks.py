"""The command line of the simulated cluster."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.simulation.cluster_workload import TRACES
from tools import simulate_ranks
from tools.simulate_ranks import REAL, Case, Outcome, comparisons, requests_of


def test_a_comparison_is_printed_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tools.measure.RESULTS", tmp_path)
    monkeypatch.setattr("tools.simulate_ranks.RESULTS", tmp_path)
    arguments = "--traces 2 4 --instances 4 --requests 4 --seeds 1 --result ranks"
    monkeypatch.setattr("sys.argv", ["simulate_ranks", *arguments.split()])
    simulate_ranks.main()
    out = capsys.readouterr().out
    assert "v2/isolated" in out and "ranks.json" in out
    short, long = json.loads((tmp_path / "ranks.json").read_text())["points"]
    assert set(short["figures"]) == {"isolated", "single", "v1", "v2"}
    assert short["figures"]["v1"][0]["refused"] == 0 < long["figures"]["isolated"][0]["refused"]
    tokens = {figures[0]["tokens"] for figures in short["figures"].values()}
    assert len(tokens) == 1  # all systems generated the same


def test_what_is_run_by_itself_covers_the_issue() -> None:
    cases = [case for named in comparisons().values() for case in named]
    assert {case.num_instances for case in cases} >= {2, 4, 8, 16, 32}
    assert {case.trace for case in cases} == {*TRACES, *REAL}
    assert len({case.network for case in cases}) == 4
    assert {case.prefills for case in cases} == {case.settles for case in cases} == {True, False}


def test_throughputs_are_not_compared_where_requests_were_refused() -> None:
    case = Case("asked", "4", 4, requests_each=4, seeds=(1,))
    requests = requests_of(case, 1, None)
    assert not isinstance(requests, str)
    outcome = Outcome(case, {name: [case.run(name, requests, 1)] for name in ("isolated", "single", "v2")})
    assert outcome.over("v2", "isolated") is None
    assert outcome.over("v2", "single") is not None


def test_a_trace_that_is_not_there_is_left_out_with_a_reason(tmp_path: Path) -> None:
    for data in (None, tmp_path):
        reason = requests_of(Case("real", "mooncake"), 1, data)
        assert isinstance(reason, str) and "CONTINUO_TEST_DATA" in reason


@pytest.mark.parametrize("name", REAL)
def test_real_traces_are_read(name: str, test_data: Path) -> None:
    requests = requests_of(replace(Case("real", name), num_instances=4), 1, test_data)
    assert not isinstance(requests, str) and len(requests) == 4 * 16
    assert all(request.prompt_tokens > 0 < request.reply_tokens for request in requests)
