"""`continuo top`: the figures it draws from two answers, and what a user meets."""

import asyncio
import re
import socket
import sys
import urllib.request
from argparse import Namespace
from types import SimpleNamespace

import pytest

from engine.errors import Draining
from engine.load import Histogram, Tier
from rpc import codec
from tests.loads import BOUNDS, a_load
from tests.rpc.conftest import running
from tests.rpc.fakes import FakeEngine
from tools import top, top_view
from tools.connection import UsageError

SINCE_START = (
    "75% reused, 4% from host, 6% recomputed, 15% new; "
    "recomputed: 58% evicted, 24% restart, 15% rewritten, 3% cut"
)


def loads(**later):
    """Now and two seconds before."""
    return codec.load(a_load(uptime_s=102.0, **later)), codec.load(a_load())


# -- figures


def test_a_line_tells_what_happened_between_two_answers() -> None:
    now, before = loads(
        completion_tokens=3600,
        prompt_tokens=8400,
        cached_device_tokens=6300,
        recomputed_tokens=490,
        evicted_tokens=290,
        cut_tokens=23,
        new_tokens=1260,
        ttft_s=Histogram(BOUNDS, (0, 60, 4, 0), 5.0),
    )
    assert top_view.line(now, before) == (
        "3 running, 5 waiting (1 suspended) | 50.0 tokens/s out, "
        "200.0 in: 75% reused, 0% from host, 10% recomputed, 15% new; recomputed: 75% evicted, 25% cut | "
        "first token 550 ms | KV 25% in use, 50% idle, 25% free | 12 attached, 2034 idle"
    )


def test_a_server_without_a_host_tier_is_asked_nothing_of_it() -> None:
    none = Tier(0, 0, 0, 0)
    now, before = codec.load(a_load(uptime_s=102.0, prompt_tokens=8100, host=none)), codec.load(a_load())
    assert "host" not in top_view.line(now, before) + "".join(top_view.page("tiny", now, before))


def test_an_interval_in_which_nothing_happened_has_no_shares_and_no_times() -> None:
    assert "| 0.0 tokens/s out, 0.0 in | first token - |" in top_view.line(*loads())
    rows = top_view.page("tiny", *loads())
    assert "steps           0.0/s" in rows
    assert "first token             - median         - 95th percentile" in rows


def test_a_page_shows_turns_conversations_memory_speed_and_endings() -> None:
    now, before = loads(
        steps=500, step_s=17.0, finished_turns={"STOP_TOKEN": 43, "LENGTH": 21}, completion_tokens=6500
    )
    rows = top_view.page("tiny at here:1", now, before)
    assert rows[0] == "tiny at here:1, up 102 s; rates and times over 2 s"
    assert rows[2:] == [
        "turns           3 running, 5 waiting (1 suspended), 2.0/s done",
        "conversations   2 running, 4 waiting, 12 attached, 2,034 idle",
        "tokens out      1,500/s",
        "tokens in       0/s",
        "recomputed      none",
        "steps           50.0/s, 10.0 ms each",
        "device KV       ██████▒▒▒▒▒▒▒▒▒▒▒▒░░░░░░ of 1,000 tokens",
        "                25% in use, 50% idle, 25% free",
        "host KV         ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒░░░░░░ of 4,000 tokens",
        "queue                   - median         - 95th percentile",
        "first token             - median         - 95th percentile",
        "between tokens          - median         - 95th percentile",
        "whole turn              - median         - 95th percentile",
        "since start     turns done: 64, streams resumed: 7, blocks evicted: 11",
        "failed          5 TURN_CANCELLED",
        "refused         9 QUEUE_FULL",
    ]


def test_all_since_the_start_is_compared_with_nothing() -> None:
    now = codec.load(a_load())
    line = top_view.line(now, top_view.since_start(now))
    assert f"35.0 tokens/s out, 80.0 in: {SINCE_START} | " in line


@pytest.mark.parametrize(
    ("counts", "share", "seconds"),
    [
        ((0, 0, 0, 0), 0.5, None),
        ((10, 0, 0, 0), 0.5, 0.005),
        ((0, 10, 0, 0), 0.5, 0.055),
        ((10, 10, 0, 0), 0.5, 0.01),
        ((0, 0, 9, 1), 0.95, 1.0),  # above the last bound: it is at least that
        ((0, 0, 0, 3), 0.5, 1.0),
    ],
)
def test_a_quantile_lies_evenly_within_its_bucket(counts, share, seconds) -> None:
    assert top_view.quantile(BOUNDS, counts, share) == pytest.approx(seconds)


# -- the command


class Watched(FakeEngine):
    """Answers with `answers`, one after the other: uptimes, or errors."""

    def __init__(self, *answers) -> None:
        super().__init__()
        self._answers = iter(answers)
        self.is_over = asyncio.Event()

    def load(self):
        answer = next(self._answers, None)
        if answer is None:
            self.is_over.set()
            raise Draining("the script has ended")
        if isinstance(answer, Exception):
            raise answer
        return a_load(uptime_s=answer, completion_tokens=int(100 * answer))


async def watch(server, **chosen) -> None:
    """`continuo top`, without waiting between two looks."""
    given = {"server": server.address, "token_file": None, "tls_ca": None, "interval": 0, "once": False}
    await top.watch(Namespace(**{**given, **chosen}))


async def test_piped_it_writes_a_line_per_interval_and_ends_with_the_server(capsys) -> None:
    engine = Watched(10.0, 12.0, 13.0)
    async with engine, running(engine) as server:
        with pytest.raises(top.NoAnswer, match=r"no server answers at 127.*\(the script has ended\)$"):
            await watch(server)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines] == [
        f"100.0 tokens/s out, 800.0 in: {SINCE_START}",
        *["100.0 tokens/s out, 0.0 in"] * 2,
    ]


async def test_once_is_one_line_about_all_since_the_start(capsys) -> None:
    async with Watched(10.0, 12.0) as engine, running(engine) as server:
        await watch(server, once=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"| 100.0 tokens/s out, 800.0 in: {SINCE_START} |" in line


async def test_a_server_that_was_started_anew_is_not_compared_with_the_one_before(capsys) -> None:
    engine = Watched(1000.0, 2.0)
    async with engine, running(engine) as server:
        with pytest.raises(top.NoAnswer):
            await watch(server)
    assert "| 100.0 tokens/s out, 4000.0 in" in capsys.readouterr().out.splitlines()[1]


async def test_a_terminal_is_drawn_over_and_stays_when_the_server_goes_away(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    engine = Watched(10.0, Draining("back in a moment"), 12.0)
    async with engine, running(engine) as server:
        watching = asyncio.create_task(watch(server))
        await asyncio.wait_for(engine.is_over.wait(), 5)
        watching.cancel()
        await asyncio.wait([watching])
    first, gone, back = re.split(r"\x1b\[\d+F", capsys.readouterr().out)[:3]
    assert first.startswith("fake at") and first.endswith("\x1b[J")
    rows = first.split("\x1b[K\n")
    assert len(rows) == 19 and max(map(len, rows)) == 39
    assert gone.split("\x1b[K\n")[:17] == rows[:17]
    assert "no server answers at" in gone and "no server answers at" not in back
    assert "tokens out      100/s" in back


async def test_a_low_terminal_shows_what_it_has_room_for(capsys, monkeypatch) -> None:
    monkeypatch.setenv("LINES", "6")
    view = top.Page("fake")
    for _ in range(2):
        view.show(codec.load(a_load()), codec.load(a_load(uptime_s=1.0)))
    first, again = capsys.readouterr().out.split("\x1b[5F")
    assert first == again and first.count("\n") == 5


async def test_a_server_cannot_drive_the_terminal(capsys) -> None:
    view = top.Page("\x1b]0;evil\a")
    view.show(codec.load(a_load(refused_turns={"\x1b[2J": 1})), codec.load(a_load(uptime_s=1.0)))
    shown = capsys.readouterr().out
    assert "?]0;evil?, up 100 s" in shown and "1 ?[2J" in shown


async def test_a_silent_server_is_given_up_after_a_while(monkeypatch) -> None:
    monkeypatch.setattr(top, "ANSWER_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(top.NoAnswer, match=f"the server at {address} has not answered for 0.05 s"):
            await watch(SimpleNamespace(address=address))


async def test_a_server_with_tokens_says_how_to_send_one(tmp_path) -> None:
    tokens, mine = tmp_path / "tokens", tmp_path / "mine"
    tokens.write_text(f"root {'r' * 16} admin\n")
    tokens.chmod(0o600)
    mine.write_text("r" * 16)
    async with FakeEngine() as engine, running(engine, token_file=tokens) as server:
        with pytest.raises(UsageError, match="--token-file FILE sends the token in FILE"):
            await watch(server)
        await watch(server, token_file=mine, once=True)


@pytest.mark.parametrize(
    ("flag", "content", "complaint"),
    [
        ("token_file", None, "the token file .* cannot be read: .*No such file"),
        ("token_file", "alice 0123456789abcdef", "the token file .* should hold one token and nothing else"),
        ("tls_ca", None, "there is no file .*; --tls-ca takes a certificate authority in PEM format"),
    ],
)
async def test_a_file_that_cannot_work_is_named(tmp_path, flag, content, complaint) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=complaint):
        await watch(SimpleNamespace(address="127.0.0.1:1"), **{flag: path})


# -- the commands themselves


def test_a_server_tells_prometheus_and_top_the_same(serve, continuo, talking_model) -> None:
    server = serve(talking_model, "--data-dir", "none", "--metrics", "127.0.0.1:0")
    (url,) = re.findall(
        r"metrics on (http://127\.0\.0\.1:\d+/metrics), without authentication", server.stderr
    )
    said = continuo("chat", "--server", server.address, input="SECRET question\n")
    assert said.returncode == 0, said.stderr
    with urllib.request.urlopen(url, timeout=10) as answer:
        metrics = answer.read().decode()
    (num_tokens,) = re.findall(r"^continuo:generation_tokens_total (\d+)\.0$", metrics, re.MULTILINE)
    assert int(num_tokens) > 0
    assert 'continuo:request_success_total{finished_reason="stop_token"} 1.0' in metrics
    assert "SECRET" not in metrics and not re.search(r"c-[0-9a-f]{16}", metrics)
    looked = continuo("top", "--server", server.address, "--once")
    assert (looked.returncode, looked.stderr) == (0, "")
    rate, uptime = re.match(r"0 running, 0 waiting \| ([\d.]+) tokens/s out", looked.stdout)[1], 60
    assert 0 < float(rate) and int(num_tokens) / float(rate) < uptime


def test_top_without_a_server_says_what_to_do(continuo) -> None:
    ended = continuo("top", "--server", "127.0.0.1:1")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: no server answers at 127.0.0.1:1; start one with 'continuo serve'\n"


@pytest.mark.parametrize(
    ("address", "complaint"),
    [("9090", "cannot listen on '9090'; give HOST:PORT"), ("", "cannot listen on ''; give HOST:PORT")],
)
def test_metrics_need_an_address(continuo, talking_model, address, complaint) -> None:
    ended = continuo("serve", talking_model, "--data-dir", "none", "--metrics", address)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {complaint}")
