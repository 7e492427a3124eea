"""The command line of the simulated engine."""

import json
import shlex
from pathlib import Path

import pytest

from engine.simulation.random_operations import OperationSettings
from tools import simulate


def test_the_command_of_a_run_runs_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = OperationSettings(7, 50, "lru-tail", 1, 9, 0, 2, 3)
    ran = []
    monkeypatch.setattr(simulate, "_operate", lambda settings: ran.append(settings) or 0)
    _, _, module, *arguments = shlex.split(settings.command)
    assert module == "tools.simulate"
    monkeypatch.setattr("sys.argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        simulate.main()
    assert ran == [settings] and ended.value.code == 0


def test_random_operations_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["simulate", "--operations", "100"])
    with pytest.raises(SystemExit) as ended:
        simulate.main()
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "100 operations" in out and "say again" in out and "stored" in out


def test_curves_are_printed_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tools.measure.RESULTS", tmp_path)
    arguments = "--profile h200-70b --rates 0.5 --compare stateless two-tier --warmup 5 --duration 20"
    monkeypatch.setattr("sys.argv", ["simulate", *arguments.split(), "--result", "curves"])
    with pytest.raises(SystemExit) as ended:
        simulate.main()
    assert ended.value.code == 0
    told = capsys.readouterr()
    assert "Llama-3-70B on 4 H200" in told.out and "two-tier at 0.5 turns/s" in told.err
    (curve,) = json.loads((tmp_path / "curves.json").read_text())["curves"]
    assert [point["configuration"] for point in curve["points"]] == ["stateless", "two-tier"]
    assert curve["sweep"]["device_bytes"] == 4 * 40e9 and curve["costs"]["num_layers"] == 80


def test_an_unknown_profile_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["simulate", "--profile", "h300"])
    with pytest.raises(SystemExit) as ended:
        simulate.main()
    assert ended.value.code == 2 and "h300 is no profile" in capsys.readouterr().err
