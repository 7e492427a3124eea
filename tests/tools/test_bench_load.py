"""How `continuo bench` holds conversations, what it makes of their events, and what a user meets."""

import asyncio
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from rpc._generated import continuo_pb2 as pb
from rpc.client import ContinuoClient, ResourceExhausted, Unavailable
from tests.tools.virtual_server import VirtualServer, play
from tools import cli
from tools.bench import compare, metrics, plots, report
from tools.bench.driver import Driver, Manner, Sample, TurnRecord
from tools.bench.generator import Observed, Progress
from tools.bench.metrics import Limits
from tools.bench.plan import plan_of
from tools.bench.population import Population, Recorded
from tools.bench.progress import Progressing
from tools.bench.workload import CHATS, Exchange, Script, chat_pool, mean_life_s, mean_turns
from tools.connection import UsageError

POOL = chat_pool(CHATS["sharegpt"], 0, 0.05, 60.0)


def drive(people, server=None, duration_s=3600.0, **manner):
    """Holds the conversations of `people` with a virtual server; nothing is warmed up."""
    server = server or VirtualServer()

    async def held() -> Driver:
        loop = asyncio.get_running_loop()
        driver = Driver(server, people, Manner(0, 0.0, duration_s, **manner), 1000, clock=loop.time)
        await driver.fill(lambda done, of: None)
        await driver.run(can_sample=True)
        return driver

    return play(held())


def finished(driver):
    return [record for record in driver.records if record.done_s is not None]


# -- who says what when, in virtual time


def test_an_open_population_says_its_turns_at_the_rate_from_the_first_minute_on() -> None:
    driver = drive(Population(POOL, 1, rate=4.0), duration_s=1800.0)
    assert len(finished(driver)) / 1800 == pytest.approx(4.0, rel=0.1)
    assert sum(record.sent_s < 300 for record in driver.records) == pytest.approx(300 * 4.0, rel=0.15)
    living = [sample.live_tokens for sample in driver.samples]
    assert sum(living[:300]) / 300 == pytest.approx(sum(living) / len(living), rel=0.2)


def test_a_slow_server_gets_the_same_conversations_as_a_fast_one() -> None:
    def begun(token_s):
        driver = drive(Population(POOL, 1, rate=1.0), VirtualServer(token_s=token_s), duration_s=600.0)
        first = {record.conversation: record.due_s for record in driver.records if record.turn == 0}
        return dict(sorted(first.items()))

    fast = begun(0.01)
    assert len(fast) > 60 and begun(0.2) == pytest.approx(fast)


def test_a_turn_is_said_a_think_time_after_the_reply_before_it() -> None:
    script = Script((Exchange(5, 3), Exchange(5, 3, 40.0), Exchange(5, 3, 7.0)))
    driver = drive(Recorded([(10.0, script)]), VirtualServer(ttft_s=2.0, token_s=1.0), duration_s=100.0)
    assert [record.sent_s for record in driver.records] == pytest.approx([10.0, 54.0, 65.0])
    assert [record.done_s for record in driver.records] == pytest.approx([14.0, 58.0, 69.0])
    assert [record.history_tokens for record in driver.records] == [0, 8, 16]


def test_a_recorded_turn_is_said_at_its_time_or_when_the_reply_before_it_has_come() -> None:
    script = Script((Exchange(5, 3, at_s=0.0), Exchange(5, 3, at_s=1.0), Exchange(5, 3, at_s=20.0)))
    driver = drive(Recorded([(10.0, script)]), VirtualServer(ttft_s=2.0, token_s=1.0), duration_s=100.0)
    assert [record.due_s for record in driver.records] == pytest.approx([10.0, 14.0, 30.0])


def test_a_closed_population_keeps_its_number() -> None:
    driver = drive(Population(POOL, 2, 1.0, size=30), duration_s=1800.0)
    scripts = scripts_of(driver, Population(POOL, 2, 1.0, size=30))
    said = {(record.conversation, record.turn) for record in finished(driver)}
    ended = [number for number, script in scripts.items() if (number, len(script.exchanges) - 1) in said]
    assert len(ended) > 30 and len(scripts) == 30 + len(ended)
    expected = 30 * mean_turns(POOL) / mean_life_s(POOL)
    assert len(finished(driver)) / 1800 == pytest.approx(expected, rel=0.15)


def scripts_of(driver, people):
    """What every conversation that took part had to say, by its number."""
    scripts = {member.number: member.script for member in people.initial()}
    while len(scripts) < max(record.conversation for record in driver.records):
        newcomer = people.successor()
        scripts[newcomer.number] = newcomer.script
    return scripts


def test_histories_are_there_before_the_clock_starts() -> None:
    server = VirtualServer()
    driver = drive(Population(POOL, 0, 1.0, size=20), server, duration_s=1.0)
    initial = Population(POOL, 0, 1.0, size=20).initial()
    filled = {len(said["token_ids"]) for said in server.said if said["max_tokens"] == 1}
    assert {member.history_tokens - 1 for member in initial} <= filled
    assert driver.samples[0].live_tokens == sum(member.history_tokens for member in initial)


def test_a_dialogue_in_the_middle_brings_what_was_said_as_messages() -> None:
    words = Script(tuple(Exchange(2, 2, 60.0 * bool(n), f"say {n}", f"reply {n}") for n in range(3)))
    server = VirtualServer()
    people = Population([words], 0, 1.0, size=8)
    drive(people, server, duration_s=1.0)
    opened = [chat.opened_with.get("history") for chat in server._chats.values()]
    told = [{"role": "user", "content": "say 0"}, {"role": "assistant", "content": "reply 0"}]
    assert told in opened and None in opened
    assert {said["text"] for said in server.said} >= {"say 0", "say 1"}


def test_conversations_of_a_trace_share_their_beginning() -> None:
    script, server = Script((Exchange(30, 1),), shared_tokens=20), VirtualServer()
    drive(Recorded([(0.0, script), (1.0, script)]), server, duration_s=10.0)
    first, second = (said["token_ids"] for said in server.said)
    assert first[:20] == second[:20] and first[20:] != second[20:]


def test_turns_are_cancelled_midway() -> None:
    driver = drive(Population(POOL, 0, 1.0, size=10), duration_s=600.0, cancel_rate=0.5)
    cancelled = [record for record in finished(driver) if record.cancelled]
    assert len(cancelled) / len(finished(driver)) == pytest.approx(0.5, abs=0.15)
    scripts = scripts_of(driver, Population(POOL, 0, 1.0, size=10))
    for record in cancelled:
        wanted = scripts[record.conversation].exchanges[record.turn].reply_tokens
        assert record.reply_tokens == -(-wanted // 2)


def test_conversations_are_resumed_by_id() -> None:
    server = VirtualServer()
    driver = drive(Population(POOL, 0, 1.0, size=10), server, duration_s=600.0, resume_rate=1.0)
    resumed = [record for record in finished(driver) if record.resumed_s is not None]
    assert server.num_resumed >= len(resumed) > 0
    assert {record.turn for record in finished(driver) if record.resumed_s is None} <= {0}
    for record in resumed:
        assert record.sent_s - record.resumed_s == pytest.approx(0.2)


def test_a_refused_turn_is_noted_and_its_conversation_goes_on() -> None:
    script, server = Script((Exchange(5, 3), Exchange(5, 3, 10.0))), VirtualServer()
    server.failures[1] = ResourceExhausted("too many", "QUEUE_FULL")
    driver = drive(Recorded([(0.0, script)]), server, duration_s=30.0)
    assert [record.failure for record in driver.records] == ["RESOURCE_EXHAUSTED QUEUE_FULL", ""]


def test_a_server_that_opens_nothing_is_not_flooded() -> None:
    class Closed(VirtualServer):
        async def open(self, **arguments):
            if self.num_turns:
                raise ResourceExhausted("too many", "TOO_MANY_CONVERSATIONS")
            return await super().open(**arguments)

    single = [Script((Exchange(5, 3),))]
    driver = drive(Population(single, 0, 1.0, size=1), Closed(), duration_s=60.0)
    assert 50 < len(driver.records) < 70
    assert {record.failure for record in finished(driver)[1:]} == {
        "RESOURCE_EXHAUSTED TOO_MANY_CONVERSATIONS"
    }


def test_what_was_seen_before_the_server_was_lost_stands() -> None:
    server = VirtualServer()
    server.failures[50] = Unavailable("gone")
    people = Population(POOL, 0, rate=1.0)
    seen = []

    async def held() -> None:
        driver = Driver(server, people, Manner(0, 0.0, 600.0), 1000, clock=asyncio.get_running_loop().time)
        seen.append(driver)
        await driver.run(can_sample=False)

    with pytest.raises(Unavailable, match="gone"):
        play(held())
    assert 0 < len(finished(seen[0])) < 50


# -- arithmetic


def a_record(sent_s=10.0, deltas=((10.5, 1), (10.6, 1), (11.0, 2)), done_s=11.1, **more):
    record = TurnRecord(1, 1, sent_s, sent_s=sent_s, deltas=list(deltas), done_s=done_s, **more)
    return record


def observed(*records, samples=(), **more):
    return Observed(
        list(records), list(samples), measured_s=20.0, device_tokens=1000, server_cpu_s=3.0, **more
    )


def test_a_turn_is_measured_by_the_definitions() -> None:
    record = a_record()
    assert metrics.ttft_s(record) == pytest.approx(0.5)
    assert metrics.itl_s(record) == pytest.approx([0.1, 0.2, 0.2])
    assert metrics.tpot_s(record) == pytest.approx(0.6 / 3)
    assert metrics.tpot_s(a_record(deltas=[(10.5, 1)])) is None
    figures = metrics.summary(observed(record), 5.0, Limits())
    assert figures["ttst_ms_p50"] == pytest.approx(100)
    assert figures["e2e_ms_p50"] == pytest.approx(1100)
    assert figures["normalised_ms_mean"] == figures["normalised_ms_p90"] == pytest.approx(275)
    assert (figures["turns_per_s"], figures["output_tokens_per_s"]) == (1 / 20, 4 / 20)
    assert figures["server_cpu_s_per_turn"] == 3.0
    assert figures["goodput_turns_per_s"] is None and figures["resume_ms_p50"] is None


def test_only_what_was_done_in_the_measured_time_counts() -> None:
    early, late = a_record(done_s=4.9), a_record(done_s=25.1)
    unfinished = a_record(done_s=None)
    figures = metrics.summary(
        observed(early, a_record(sent_s=2.0, done_s=5.1), late, unfinished), 5.0, Limits()
    )
    assert (figures["turns"], figures["unfinished_turns"]) == (1, 1)


def test_percentiles_are_over_turns() -> None:
    turns = [a_record(deltas=[(10 + n / 1000, 1)], done_s=11.0) for n in range(1, 101)]
    figures = metrics.summary(observed(*turns), 5.0, Limits())
    assert figures["ttft_ms_mean"] == pytest.approx(50.5)
    assert (figures["ttft_ms_p50"], figures["ttft_ms_p90"], figures["ttft_ms_p99"]) == pytest.approx(
        (51, 91, 100)
    )


def test_hits_are_shares_of_the_history_of_all_turns() -> None:
    one = a_record(history_tokens=300, cached_device_tokens=100, cached_host_tokens=200)
    other = a_record(history_tokens=100, recomputed_tokens=100)
    figures = metrics.summary(observed(one, other, a_record()), 5.0, Limits())
    names = ("cached_device_share", "cached_host_share", "recomputed_share")
    assert [figures[name] for name in names] == [0.25, 0.5, 0.25]
    assert metrics.summary(observed(a_record()), 5.0, Limits())["recomputed_share"] is None


def test_goodput_counts_turns_that_meet_every_limit() -> None:
    slow = a_record(deltas=[(10.9, 1), (11.0, 3)])
    for limits, good in (
        (Limits(500.1), 1),
        (Limits(950, 199), 1),
        (Limits(950, 201), 2),
        (Limits(tpot_ms=1), 0),
    ):
        figures = metrics.summary(observed(a_record(), slow), 5.0, limits)
        assert figures["goodput_turns_per_s"] == pytest.approx(good / 20)


def test_what_the_server_says_of_its_time_is_told_as_well() -> None:
    timing = pb.Timing(queue_s=0.1, ttft_s=0.5, reload_s=0.05, recompute_s=0.2, prefill_s=0.15)
    figures = metrics.summary(observed(a_record(timing=timing), a_record()), 5.0, Limits())
    means = [
        figures[f"server_{name}_ms_mean"] for name in ("queue", "ttft", "reload", "recompute", "prefill")
    ]
    assert means == pytest.approx([50, 250, 25, 100, 75])


def test_the_slope_is_that_of_the_line_through_the_points() -> None:
    turns = [a_record(history_tokens=n, deltas=[(10.1 + 0.00002 * n, 1)]) for n in (0, 500, 1000, 4000)]
    assert metrics.summary(observed(*turns), 5.0, Limits())["ttft_slope_ms_per_1k"] == pytest.approx(20.0)
    assert metrics.slope([(1.0, 5.0), (1.0, 6.0)]) is None and metrics.slope([]) is None


def test_cancelled_and_failed_turns_are_told_apart() -> None:
    cancelled = a_record(cancelled=True)
    refused = a_record(deltas=(), failure="RESOURCE_EXHAUSTED QUEUE_FULL")
    figures = metrics.summary(observed(cancelled, refused, a_record()), 5.0, Limits())
    assert (figures["turns"], figures["cancelled_turns"]) == (1, 1)
    assert figures["failures"] == {"RESOURCE_EXHAUSTED QUEUE_FULL": 1}


def test_the_time_to_resume_begins_with_opening_by_id() -> None:
    figures = metrics.summary(observed(a_record(resumed_s=9.8)), 5.0, Limits())
    assert figures["resume_ms_p50"] == pytest.approx(700)


def test_the_working_set_is_compared_with_the_device_tier() -> None:
    samples = [Sample(at, live, pb.GetLoadResponse()) for at, live in ((1.0, 9000), (6.0, 2000), (7.0, 4000))]
    figures = metrics.summary(observed(a_record(), samples=samples), 5.0, Limits())
    assert (figures["working_set_tokens"], figures["working_set_device_tiers"]) == (3000, 3.0)


def test_a_series_tells_what_happened_in_each_second() -> None:
    loads = [
        pb.GetLoadResponse(cached_host_tokens=hits, device=pb.Tier(idle_tokens=idle))
        for hits, idle in ((5, 1), (8, 2), (8, 3))
    ]
    told = metrics.series([Sample(float(n), 100 * n, load) for n, load in enumerate(loads)])
    assert told["at_s"] == [1.0, 2.0] and told["cached_host_tokens"] == [3, 0]
    assert told["device_idle_tokens"] == [2, 3] and told["live_tokens"] == [100, 200]


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
        *("--host-kv-tokens", 4096, "--resume-rate", 1, "--json", file),
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

    assert cli.main(["bench", "--from", str(file)]) == 0
    assert capsys.readouterr().out == ended.stdout
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--from", str(file), "--plots", str(folder)]) == 0
    names = {"throughput.png", "ttft.png", "hits_1_stateless.png", "hits_2_two-tier.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_a_running_server_is_measured_and_left_as_it_was(serve, continuo, talking_model) -> None:
    server = serve(talking_model, "--data-dir", "none")
    ended = continuo("bench", "--server", server.address, *SHORT)
    assert ended.returncode == 0, ended.stderr
    assert "turns measured" in ended.stdout and "CPU s/turn" not in ended.stdout
    listed = continuo("top", "--server", server.address, "--once")
    assert "0 attached, 0 idle" in listed.stdout, listed.stdout


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


def curve(*points):
    """A report of points: configuration, rate, repeat, turns/s, normalised latency."""
    return {
        "points": [
            {
                "configuration": configuration,
                "rate": rate,
                "conversations": None,
                "repeat": repeat,
                "figures": {
                    "turns_per_s": turns_per_s,
                    "normalised_ms_p90": latency_ms,
                    "normalised_ms_mean": latency_ms,
                    "server_cpu_s_per_turn": None,
                },
            }
            for configuration, rate, repeat, turns_per_s, latency_ms in points
        ]
    }


def test_turns_at_equal_latency_are_where_the_curve_crosses_it() -> None:
    told = curve(
        *(("device", rate, 0, rate, 10.0 * rate) for rate in (3.0, 1.0, 2.0)),
        *(("slow", rate, 0, rate, 100.0) for rate in (1.0, 2.0)),
        ("fast", 1.0, 0, 1.5, 5.0),
        *(("stuck", rate, 0, done, ms) for rate, done, ms in ((1.0, 1.0, 5.0), (2.0, 0.5, 45.0))),
        ("none", 1.0, 0, 0.0, None),
    )
    assert compare.at_equal_latency(told, 25.0).splitlines()[1:] == [
        "  device: 2.50",
        "  slow: not reached, 1.00 turns/s have 100 ms already",
        "  fast: 1.50 or more, the highest load stays below",
        "  stuck: 0.75",
        "  none: nothing was measured",
    ]


def test_repeats_are_compared_pair_by_pair() -> None:
    ratios = (1.5, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.1)
    points = [
        (name, 1.0, repeat, 1.0, 10.0 * (ratio if name == "two-tier" else 1.0) * (1 + repeat))
        for repeat, ratio in enumerate(ratios)
        for name in ("device", "two-tier")
    ]
    assert compare.pair_by_pair(curve(*points)) == (
        "1 turns/s offered: normalised_ms_mean of two-tier / device: median 0.935 of 10 pairs, "
        "95% interval 0.900 to 0.970"
    )
    assert "too few for an interval" in compare.pair_by_pair(curve(*points[:4]))
    assert compare.pair_by_pair(curve(*points[:2])) == ""


def test_repeats_become_one_column_of_medians() -> None:
    points = [
        {
            "rate": 1.0,
            "conversations": None,
            "configuration": "device",
            "figures": {"turns": n, "failures": {"X": n}},
        }
        for n in (1, 2, 9)
    ]
    (merged,) = report.merged(points)
    assert merged["figures"] == {"turns": 2, "failures": {"X": 12}}


def test_a_file_that_is_no_report_is_refused(tmp_path) -> None:
    for text in ("[1]", "{", '{"tool": "continuo bench", "points": []}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(report.ReportError, match="x.json"):
            report.read(tmp_path / "x.json")
