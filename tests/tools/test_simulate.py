"""The command line of the simulated engine."""

import shlex

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
