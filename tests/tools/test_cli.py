"""`continuo serve` and `continuo generate` as a user meets them: real processes, a tiny model."""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.statistics import summary_line
from rpc.client import ContinuoClient
from tests.loads import a_load
from tests.tools.conftest import ROOT, command
from tests.tools.talking_models import REPLY
from tools import cli, logs
from tools import serve as serve_command
from tools.arguments import BUNDLED_MODEL

SECRET = "xylophone"


def refusal(capsys, *arguments: str) -> str:
    """What a user reads whose arguments are refused: one line on stderr."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


@pytest.fixture
def here(capsys, monkeypatch):
    """Runs a command in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as `serve` would, but not for ever
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    monkeypatch.setattr(logs, "configure", lambda level, as_json: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["serve", "--sing"], "unrecognized arguments: --sing"),
        (
            ["serve", ".", "--revision", "v2"],
            "--revision goes with a hub id like org/name, not with a folder",
        ),
        (["generate", "--prompt", "x", "--revision", "v2"], "--revision goes with a hub id"),
        (["serve", "no/where/else"], "there is no folder no/where/else; pass a folder"),
        (["serve", "./no/where"], "there is no folder ./no/where; pass a folder in Hugging Face format"),
        (["serve", "LICENSE"], "LICENSE is not a folder; pass the folder that holds its config.json"),
        (["serve", ".", "--device-kv-memory", "4 apples"], "'4 apples' is not a size; write 512MiB, 4GiB"),
        (["serve", ".", "--device-kv-memory", "1GiB", "--device-kv-tokens", "9"], "not allowed with"),
        (["serve", ".", "--max-queue", "0"], "'0' is not a positive whole number"),
        (["serve", ".", "--drain-grace", "-1"], "'-1' is not a number of seconds"),
        (["serve", ".", "--drain-grace", "nan"], "'nan' is not a number of seconds"),
        (["serve", ".", "--step-timeout", "0"], "'0' seconds are no time at all; give it more than 0"),
        (["generate", "."], "one of the arguments --prompt --tokens is required"),
        (["generate", ".", "--prompt", ""], "the text is empty"),
        (["generate", ".", "--tokens", "[1, -2]"], "'[1, -2]' is not a JSON list of token ids like [1,2,3]"),
        (["generate", ".", "--tokens", "[true]"], "is not a JSON list of token ids"),
        (["chat", ".", "--server", "localhost:1"], "not allowed with argument MODEL"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(capsys, monkeypatch, arguments, complaint):
    monkeypatch.chdir(ROOT)
    line = refusal(capsys, *arguments)
    assert line.startswith("error: ") and complaint in line and "--help)" in line


def test_without_a_bundled_model_one_has_to_be_named(capsys, monkeypatch):
    monkeypatch.setattr(cli, "BUNDLED_MODEL", Path("/nowhere"))
    assert "there is no folder /nowhere" in refusal(capsys, "serve")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "cuda", "--verify-reloads"], "--verify-reloads is not for a GPU, whose copies"),
        (["--block-size", "20"], "block size is 20; it must be one of 16, 32, 64"),
        (["--device-kv-tokens", "33"], "the KV cache would hold 33 tokens; give it at least 64 (two blocks)"),
        (["--listen", "0.0.0.0:0"], "add --token-file and --tls-cert and --tls-key, listen on 127.0.0.1, or"),
        (["--listen", "nonsense"], "cannot listen on 'nonsense'; give HOST:PORT"),
        (["--token-file", "/no/tokens"], "the token file /no/tokens cannot be read"),
        (["--tls-cert", "/no/cert", "--tls-key", "/no/key"], "/no/cert and /no/key do not work for TLS: "),
        (["--tls-cert", "/no/cert"], "--tls-cert was given without --tls-key; TLS needs both"),
        (["--until-eof"], "--until-eof needs a pipe or a terminal on stdin"),
    ],
)
def test_a_setting_that_cannot_work_ends_with_2_and_one_line(here, talking_model, arguments, complaint):
    code, out, err = here("serve", talking_model, "--listen", "127.0.0.1:0", "--data-dir", "none", *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and complaint in line


def test_a_folder_that_is_no_model_ends_with_1_and_says_what_it_lacks(continuo, tmp_path):
    ended = continuo("serve", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {tmp_path} has no config.json")
    assert len(ended.stderr.splitlines()) == 1


def test_help_is_there_at_once_without_torch():
    code = "import sys; from tools import cli\ntry: cli.main(['serve', '--help'])\nexcept SystemExit: pass\n"
    code += "print(*{'torch', 'grpc', 'engine', 'rpc', 'rich'} & set(sys.modules), file=sys.stderr)"
    begin = time.process_time()
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--device-kv-tokens" in ended.stdout and ended.stderr == "\n"
    assert time.process_time() - begin < 0.3


def test_every_setting_of_serve_reaches_the_engine(monkeypatch, talking_model, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/c")
    flags = (
        "--device cpu --dtype bfloat16 --threads 3 --block-size 64 --device-kv-memory 1.5GiB "
        f"--max-step-tokens 100 --max-concurrent 5 --max-queue 7 --stateless --data-dir {tmp_path} "
        "--profile costs.json --step-profile steps.jsonl --eager-stores"
    )
    chosen = cli._parser().parse_args(["serve", str(talking_model), *flags.split()])
    cli._use_environment(chosen)
    assert serve_command.engine_config(chosen) == EngineConfig(
        model=talking_model,
        device="cpu",
        dtype="bfloat16",
        block_size=64,
        device_kv_bytes=3 << 29,
        max_step_tokens=100,
        max_concurrent=5,
        max_queue=7,
        data_dir=tmp_path,
        profile=Path("costs.json"),
        step_profile=Path("steps.jsonl"),
        profile_dir=Path("/var/c/continuo/profiles"),
        stateless=True,
        threads=3,
        eager_stores=True,
    )


@pytest.mark.parametrize(
    ("variables", "data_dir"),
    [
        ({"XDG_STATE_HOME": "/var/s", "HOME": "/home/u"}, "/var/s/continuo"),
        ({"XDG_STATE_HOME": "", "HOME": "/home/u"}, "/home/u/.local/state/continuo"),
        ({"XDG_STATE_HOME": "not/absolute", "HOME": "/home/u"}, "/home/u/.local/state/continuo"),
    ],
)
def test_the_data_dir_follows_the_environment(monkeypatch, talking_model, variables, data_dir):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = cli._parser().parse_args(["serve", str(talking_model)])
    cli._use_environment(chosen)
    assert chosen.data_dir == Path(data_dir)


def test_threads_follow_openmp_unless_they_are_given(monkeypatch, talking_model):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for words, threads in ((["generate"], 3), (["generate", "--threads", "2"], 2)):
        chosen = cli._parser().parse_args([*words, str(talking_model), "--prompt", "x"])
        cli._use_environment(chosen)
        assert chosen.threads == threads


@pytest.mark.parametrize(
    ("own", "spins"),
    [
        ({}, cli.SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, None),
        ({"OMP_NUM_THREADS": "1"}, cli.SPINS),
    ],
)
@pytest.mark.parametrize("words", [["serve"], ["generate", "--prompt", "x"], ["profile"]])
def test_what_computes_waits_awake_for_a_moment_unless_the_user_says_otherwise(
    monkeypatch, talking_model, words, own, spins
):
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # what is set below goes when the test ends
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    cli._use_environment(cli._parser().parse_args([words[0], str(talking_model), *words[1:]]))
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    assert os.environ.get("OMP_WAIT_POLICY") == own.get("OMP_WAIT_POLICY")


@pytest.mark.skipif(not BUNDLED_MODEL.is_dir(), reason="the bundled model is not in this checkout")
def test_the_bundled_model_is_the_default_and_runs_in_float32():
    for words in (["serve"], ["serve", str(BUNDLED_MODEL)]):
        chosen = cli._parser().parse_args(words)
        cli._use_environment(chosen)
        assert (chosen.model, chosen.dtype) == (BUNDLED_MODEL, "float32")


def test_generate_prints_the_text_and_nothing_else(continuo, talking_model):
    ended = continuo("generate", talking_model, "--prompt", "Say it:\n")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{REPLY}\n", "")


def test_generate_ends_with_json_when_asked(continuo, talking_model):
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(talking_model / "tokenizer.json")).encode("Now:\n").ids
    ended = continuo("generate", talking_model, "--tokens", json.dumps(ids), "--max-new-tokens", 3, "--json")
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout.splitlines()[-1])
    assert (answer["text"], len(answer["token_ids"]), answer["finish_reason"]) == (REPLY[:3], 3, "length")
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["new_tokens"] == len(ids)
    assert answer["usage"]["completion_tokens"] == 3


def test_generate_ends_quietly_when_nobody_reads_on(environment, talking_model):
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        command("generate", talking_model, "--prompt", "x\n"),
        cwd=ROOT,
        env=environment,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--prompt", "x", "--temperature", "nan"],
            "temperature is nan; it must be between 0 (greedy) and 100",
        ),
        (["--prompt", "x", "--top-p", "0"], "top_p is 0.0; it must be above 0 and at most 1 (off)"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_tokens is 0; it must be at least 1"),
        (["--tokens", "[1, 99999]"], "token id 99999 is outside the vocabulary of 320"),
    ],
)
def test_generate_refuses_what_makes_no_sense_in_one_line(here, talking_model, arguments, complaint):
    assert here("generate", talking_model, *arguments) == (2, "", f"error: {complaint}\n")


async def test_serve_says_six_lines_drains_on_ctrl_c_and_logs_no_text(serve, talking_model, tmp_path):
    server = serve(talking_model, "--log-level", "debug")
    assert server.stdout == f"listening on {server.address}\n"
    banner = [line.partition(" ")[2] for line in server.stderr.splitlines()]
    assert [line.split()[0] for line in banner] == ["continuo", "device", "KV", "data", "no", "attention:"]
    assert banner[3] == f"data dir {tmp_path / 'state' / 'continuo'}"
    assert banner[4] == "no tokens: every caller is the tenant local | TLS off"

    async with ContinuoClient(server.address) as client:
        chat = await client.open(system=SECRET)
        turn = await chat.say(f"{SECRET}?")
        assert turn.text == REPLY
        server.signal(signal.SIGINT)
        assert server.wait() == 0
    assert server.stdout == f"listening on {server.address}\n"
    assert SECRET not in server.stderr and REPLY not in server.stderr
    assert "Traceback" not in server.stderr


async def test_a_reply_in_flight_is_given_its_grace_and_a_second_ctrl_c_does_not_wait(serve, endless_model):
    server = serve(endless_model, "--drain-grace", "60")
    async with ContinuoClient(server.address, retry=False) as client:
        chat = await client.open()
        reply = chat.say("Go.")
        await anext(reply)
        begin = time.monotonic()
        server.signal(signal.SIGTERM)
        await anext(reply)  # draining lets it go on
        assert server.process.poll() is None
        server.signal(signal.SIGINT)
        assert server.wait() == 1
        assert time.monotonic() - begin < 20


async def test_what_was_said_before_kill_9_is_there_after_it(serve, talking_model):
    server = serve(talking_model)
    async with ContinuoClient(server.address, retry=False) as client:
        chat = await client.open()
        before = [await chat.say("One."), await chat.say("Two.")]
    server.kill()

    server = serve(talking_model)
    async with ContinuoClient(server.address) as client:
        chat = await client.resume(chat.id)
        assert (chat.committed_turns, chat.committed_tokens) == (2, before[-1].committed_tokens)
        turn = await chat.say("Three.")
        assert turn.text == REPLY
        assert turn.usage.recomputed_tokens > 0 == turn.usage.cached_device_tokens


def test_two_servers_never_share_a_data_dir(serve, continuo, talking_model):
    server = serve(talking_model)
    ended = continuo("serve", talking_model, "--listen", "127.0.0.1:0")
    assert ended.returncode == 1
    assert f"is in use by pid {server.process.pid}" in ended.stderr.splitlines()[-1]


def test_a_taken_port_is_an_error_that_names_it(serve, continuo, talking_model):
    server = serve(talking_model)
    ended = continuo("serve", talking_model, "--listen", server.address, "--data-dir", "none")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(
        f"error: cannot listen on {server.address}: the port is taken"
    )


async def test_a_public_port_lets_in_who_has_a_token(serve, tmp_path, talking_model):
    tokens = tmp_path / "tokens"
    tokens.write_text("alice 0123456789abcdef\n")
    tokens.chmod(0o600)
    server = serve(talking_model, "--token-file", tokens, "--data-dir", "none")
    assert f"tokens of {tokens} | TLS off" in server.stderr
    assert "0123456789abcdef" not in server.stderr
    async with ContinuoClient(server.address, token="0123456789abcdef") as client:
        assert (await client.model_info()).name == talking_model.name


def test_a_server_that_was_started_until_eof_drains_when_its_parent_is_gone(continuo, talking_model):
    ended = continuo("serve", talking_model, "--until-eof", "--listen", "127.0.0.1:0", input="anything")
    assert ended.returncode == 0, ended.stderr
    assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", ended.stdout)


async def test_a_busy_server_says_what_it_did_and_an_idle_one_nothing(monkeypatch, caplog):
    class Engine:
        def load(self):
            return next(loads)

    begin, busy = a_load(), a_load(uptime_s=110.0, steps=450)
    loads = iter([begin, busy, busy, busy])
    monkeypatch.setattr(serve_command, "SUMMARY_INTERVAL_S", 0.001)
    with caplog.at_level(logging.INFO, "tools.serve"), pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(serve_command._report(Engine()), 5)
    (record,) = caplog.records
    assert record.message == summary_line(busy, begin)


def test_json_logs_are_one_object_per_line_with_time_level_and_trace():
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.LogRecord("rpc.server", logging.ERROR, "f", 1, "it %s", ("broke",), sys.exc_info())
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == ("error", "rpc.server", "it broke")
    assert "ValueError: no" in told["trace"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told["time"])


def test_plain_logs_name_the_level_of_what_is_not_information():
    formatter = logs.PlainFormatter()
    for level, text in ((logging.INFO, "ready"), (logging.WARNING, "warning: ready")):
        line = formatter.format(logging.LogRecord("rpc", level, "f", 1, "ready", (), None))
        assert re.fullmatch(rf"\d\d:\d\d:\d\d {text}", line)


def test_health_reaches_a_server_with_tls_and_names_what_it_cannot_read(
    serve, continuo, talking_model, tmp_path
):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    make += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(make.split(), check=True, capture_output=True)
    server = serve(talking_model, "--tls-cert", certificate, "--tls-key", key, "--data-dir", "none")
    trusting = continuo("health", "--server", server.address, "--tls-ca", certificate)
    assert (trusting.returncode, trusting.stdout) == (0, "SERVING\n"), trusting.stderr
    plain = continuo("health", "--server", server.address)
    assert plain.returncode == 1 and plain.stderr.startswith(
        f"error: no server answers at {server.address} ("
    )
    assert plain.stderr.endswith("; if it speaks TLS, add --tls-ca FILE\n")
    stranger = continuo("health", "--server", server.address, "--tls-ca", ROOT / "tests/rpc/tls/cert.pem")
    assert stranger.stderr.endswith("--tls-ca FILE must hold the authority that signed its certificate\n")
    unusable = continuo("health", "--tls-ca", key)
    assert unusable.returncode == 2 and "is no certificate authority in PEM format" in unusable.stderr
    blind = continuo("health", "--tls-ca", tmp_path / "none.pem")
    assert blind.returncode == 2 and "there is no file" in blind.stderr
