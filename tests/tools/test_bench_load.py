"""`continuo bench` as a user meets it: what is asked for, whole runs, and what can go wrong."""

import asyncio
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from kernels.marks import PARTS
from rpc.client import ContinuoClient
from tools import cli
from tools.bench import plots, report
from tools.bench.generator import Progress
from tools.bench.plan import plan_of
from tools.bench.progress import Progressing
from tools.connection import UsageError

# -- what is asked for


def chosen(*arguments: str) -> Namespace:
    given = cli._parser().parse_args(["bench", *arguments])
    cli._use_environment(given)
    return given


def test_configurations_take_turns_at_every_load_and_change_places_at_every_repeat() -> None:
    planned = plan_of(chosen(*"--compare device stateless --rates 1 2 --repeats 2 --scale 0.1".split()))
    order = [(point.repeat, point.load.rate, point.configuration.name) for point in planned.points]
    assert order == [
        *((0, 1.0, "device"), (0, 1.0, "stateless"), (0, 2.0, "device"), (0, 2.0, "stateless")),
        *((1, 1.0, "stateless"), (1, 1.0, "device"), (1, 2.0, "stateless"), (1, 2.0, "device")),
    ]


def test_what_is_given_for_the_server_reaches_it_and_nothing_else_does() -> None:
    flags = "--device-kv-tokens 640 --host-kv-memory 1GiB --policy lru --threads 1 --verify-reloads".split()
    given = ("--device-kv-tokens", "640", "--host-kv-memory", str(2**30), "--policy", "lru")
    planned = plan_of(chosen(*flags))
    assert set(planned.points[0].configuration.flags) == {*given, "--threads", "1", "--verify-reloads"}
    compared = plan_of(chosen(*flags, *"--compare stateless device two-tier lru-tail".split()))
    flags_of = {point.configuration.name: point.configuration.flags for point in compared.points}
    assert flags_of["stateless"][-3:] == ("--stateless", "--host-kv-tokens", "0")
    assert "--host-kv-memory" not in flags_of["stateless"] + flags_of["device"]
    assert "--stateless" not in flags_of["device"] + flags_of["two-tier"]
    assert flags_of["lru-tail"].count("--policy") == 1 and "lru-tail" in flags_of["lru-tail"]
    for text in flags_of.values():
        cli._parser().parse_args(["serve", *text])
    assert plan_of(chosen()).points[0].configuration.flags == ()
    profiled = plan_of(chosen("--profile", "costs.json")).points[0].configuration.flags
    assert profiled == ("--profile", str(Path.cwd() / "costs.json"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--workload sing", "--workload sing is not known; there are chat, agent, dialogues, trace"),
        ("--workload trace", "write --workload trace FILE"),
        ("--workload chat file", "write --workload chat, which reads no file"),
        ("--workload agent --lengths ultrachat", "--lengths goes with --workload chat, not with agent"),
        ("--time-scale 2", "--time-scale goes with --workload trace, not with chat"),
        ("--rates 1 --conversations 5 --think-time 9", "are one too many: any two of them give the third"),
        (
            "--server here:1 --policy lru --compare device",
            "--policy, --compare: these are for a server that is",
        ),
        ("--server here:1 --step-profile", "--step-profile is for a server that is started here"),
        ("--compare two-tier", "--compare two-tier needs a host tier; give --host-kv-tokens N"),
        ("--compare device --stateless", "--stateless is a configuration of --compare"),
        ("--json /no/where/x.json", "nothing can be written to /no/where/x.json: No such file or directory"),
        ("--plots /dev/null/x", "nothing can be written to /dev/null/x: Not a directory"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_server_starts(capsys, arguments, complaint) -> None:
    assert cli.main(["bench", *arguments.split()]) == 2
    assert complaint in capsys.readouterr().err


def test_a_trace_with_times_of_its_own_takes_no_rate(tmp_path) -> None:
    path = tmp_path / "trace"
    path.write_text('{"timestamp": 0, "input_length": 9, "output_length": 9, "hash_ids": [0]}\n')
    assert str(plan_of(chosen("--workload", "trace", str(path))).points[0].load) == "as recorded"
    with pytest.raises(UsageError, match="use --time-scale instead of --rates"):
        plan_of(chosen("--workload", "trace", str(path), "--rates", "1"))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "fast"])
def test_a_rate_is_a_number_above_0(capsys, value) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--rates", value])
    assert f"{value!r} is not a number above 0" in capsys.readouterr().err


# -- as a user meets it


SHORT = "--scale 0.1 --conversations 4 --think-time 0.4 --warmup 0.1 --duration 2.5".split()


def test_two_configurations_are_measured_side_by_side(continuo, capsys, tmp_path) -> None:
    file, folder = tmp_path / "report.json", tmp_path / "plots"
    ended = continuo(
        *("bench", *SHORT, "--compare", "stateless", "two-tier", "--device-kv-tokens", 1024),
        *("--host-kv-tokens", 4096, "--resume-rate", 1, "--json", file, "--step-profile"),
    )
    assert ended.returncode == 0, ended.stderr
    assert [line.partition(":")[0] for line in ended.stderr.splitlines()] == [
        "[1/2] stateless, 4 conversations",
        "[2/2] two-tier, 4 conversations",
    ]
    told = json.loads(file.read_text())
    stateless, stateful = (point["figures"] for point in told["points"])
    assert stateless["turns"] > 0 < stateful["turns"], ended.stderr
    assert not stateless["failures"] | stateful["failures"]
    assert stateless["recomputed_share"] == 1.0
    assert stateful["recomputed_share"] < 0.5
    assert stateful["resume_ms_p50"] > 0 and stateful["server_cpu_s_per_turn"] > 0
    assert told["points"][0]["turns"]["turn"] and told["points"][0]["device_tokens"] == 1024
    for row in ("turns/s", "TTFT ms p50/p90/p99", "normalised ms mean/p90", "device/host/recomputed %"):
        assert row in ended.stdout
    assert "normalised latency: E2E / tokens of the reply" in ended.stdout
    for point in told["points"]:
        for group in point["steps"]:
            assert sum(group[part] for part in PARTS) == pytest.approx(
                group["seconds"], abs=1e-6 * group["steps"]
            )
        assert {group["kind"] for group in point["steps"]} >= {"decoding", "prompts"}
        assert 0.5 < sum(group["seconds"] for group in point["steps"]) <= 3.5
    assert "steps of stateless, 4 conversations: milliseconds" in ended.stdout
    assert "idle: there was nothing to compute" in ended.stdout

    assert cli.main(["bench", "--from", str(file)]) == 0
    assert capsys.readouterr().out == ended.stdout
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--from", str(file), "--plots", str(folder)]) == 0
    names = {"throughput.png", "ttft.png", "hits_1_stateless.png", "hits_2_two-tier.png"}
    names |= {"steps_1.png", "steps_2.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_a_running_server_is_measured_and_left_as_it_was(serve, continuo, talking_model) -> None:
    server = serve(talking_model, "--data-dir", "none")
    ended = continuo("bench", "--server", server.address, *SHORT)
    assert ended.returncode == 0, ended.stderr
    assert "turns measured" in ended.stdout and "CPU s/turn" not in ended.stdout
    listed = continuo("top", "--server", server.address, "--once")
    assert "0 attached, 0 idle" in listed.stdout, listed.stdout


def test_a_server_that_wants_a_token_is_measured_without_its_tiers(
    serve, continuo, talking_model, tmp_path
) -> None:
    (tmp_path / "tokens").write_text("acme 0123456789abcdef\n")
    (tmp_path / "tokens").chmod(0o600)
    (tmp_path / "mine").write_text("0123456789abcdef\n")
    server = serve(talking_model, "--data-dir", "none", "--token-file", tmp_path / "tokens")
    refused = continuo("bench", "--server", server.address)
    assert refused.returncode == 2 and "--token-file FILE sends the token in FILE" in refused.stderr
    ended = continuo("bench", "--server", server.address, "--token-file", tmp_path / "mine", *SHORT)
    assert ended.returncode == 0, ended.stderr
    assert "turns measured" in ended.stdout and "set/device" not in ended.stdout
    nobody = continuo("bench", "--server", "127.0.0.1:9")
    assert nobody.returncode == 1 and "no server answers at 127.0.0.1:9" in nobody.stderr


def test_a_server_that_goes_away_ends_it_with_what_was_measured(
    serve, talking_model, environment, tmp_path
) -> None:
    server, file = serve(talking_model, "--data-dir", "none"), tmp_path / "report.json"

    async def lost() -> tuple[int | None, str]:
        command = (sys.executable, "-m", "tools.cli", "bench", "--server", server.address)
        process = await asyncio.create_subprocess_exec(
            *(*command, *SHORT[:-1], "40", "--json", str(file)),
            env=environment,
            cwd=cli.__file__.rpartition("/tools/")[0],
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        async with ContinuoClient(server.address) as client:
            while (await client.load()).accepted_turns < 20:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        server.kill()
        _, said = await process.communicate()
        return process.returncode, said.decode()

    code, said = asyncio.run(lost())
    assert code == 1 and said.splitlines()[-1].startswith("error: "), said
    (point,) = json.loads(file.read_text())["points"]
    assert point["lost"] and point["figures"]["turns"] > 0


def test_a_terminal_gets_a_bar_and_a_file_a_line_per_point(capsys, monkeypatch) -> None:
    (point,) = plan_of(chosen("--scale", "0.1")).points
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)  # noqa: B023
        with Progressing(3) as progress:
            progress.at(point, Progress("measuring, 9 turns", 0.5))
            progress.done(point, "9 turns")
        said = capsys.readouterr().err
        assert ("[1/3] server, 1 turns/s: 9 turns\n" in said) and (
            ("█" * 10 + "░" * 10 in said) == is_terminal
        )
        assert said.count("\n") == 1


def test_without_matplotlib_a_sentence_says_how_to_get_plots(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.draw_all({}, tmp_path / "plots") == plots.HOW
    assert not (tmp_path / "plots").exists()


def test_a_file_that_is_no_report_is_refused(tmp_path) -> None:
    for text in ("[1]", "{", '{"tool": "continuo bench", "points": []}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(report.ReportError, match="x.json"):
            report.read(tmp_path / "x.json")
