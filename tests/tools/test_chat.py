"""`continuo chat`, piped and in a terminal, against real servers."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rpc._generated import continuo_pb2 as pb
from rpc.client import Delta, FinishReason, ReplyKind
from tests.tools.conftest import ROOT, command
from tests.tools.fake_chat import turn
from tests.tools.talking_models import REPLY
from tests.tools.terminal import Terminal
from tools.chat import screen
from tools.chat.wording import status_line

RESUME = re.compile(r"To go on: continuo chat --conversation (\S+) (.*)\n")


def test_piped_it_answers_each_line_and_prints_nothing_else(serve, continuo, talking_model):
    server = serve(talking_model)
    ended = continuo("chat", "--server", server.address, input="One.\n\nTwo.\nThree.")
    assert (ended.returncode, ended.stdout) == (0, f"{REPLY}\n" * 3)
    assert RESUME.fullmatch(ended.stderr)


def test_a_conversation_goes_on_by_its_id_also_with_another_server_process(serve, continuo, talking_model):
    ended = continuo("chat", talking_model, input="One.\n")
    assert (ended.returncode, ended.stdout) == (0, f"{REPLY}\n")
    id, rest = RESUME.fullmatch(ended.stderr).groups()
    again = continuo("chat", "--conversation", id, *rest.split(), input="Two.\n")
    assert (again.returncode, again.stdout) == (0, f"{REPLY}\n")
    assert RESUME.fullmatch(again.stderr)[1] == id


def test_a_server_started_for_the_chat_ends_with_it(continuo, talking_model):
    ended = continuo("chat", talking_model, "--data-dir", "none", input="One.\n")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{REPLY}\n", "")
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(talking_model) in _read(path)]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has just ended
        return ""


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (
            ["--server", "127.0.0.1:1"],
            1,
            "error: no server answers at 127.0.0.1:1; start one with 'continuo serve', or talk to one "
            "of your own with 'continuo chat MODEL'\n",
        ),
        (["--token-file", "/no/token"], 2, "error: the token file /no/token cannot be read"),
        (
            ["--token-file", "LICENSE"],
            2,
            "error: the token file LICENSE should hold one token and nothing else\n",
        ),
        (["--tls-ca", "/no/ca"], 2, "error: there is no file /no/ca; --tls-ca takes a certificate authority"),
    ],
)
def test_what_keeps_a_chat_from_beginning_is_said_in_one_line(continuo, arguments, code, complaint):
    ended = continuo("chat", *arguments, input="One.\n")
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith(complaint) and len(ended.stderr.splitlines()) == 1


def test_a_model_that_cannot_be_served_says_why(continuo, tmp_path):
    ended = continuo("chat", tmp_path, input="One.\n")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"error: the server did not start: {tmp_path} has no config.json")


def test_an_unknown_conversation_and_a_full_context_are_told(serve, continuo, talking_model):
    server = serve(talking_model)
    ended = continuo("chat", "--server", server.address, "--conversation", "c-gone", input="One.\n")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: there is no conversation c-gone; open a new one or list yours\n"

    ended = continuo("chat", "--server", server.address, input="One.\n" + "long " * 2000 + "\nThree.\n")
    assert (ended.returncode, ended.stdout) == (1, f"{REPLY}\n")
    assert "tokens but" in ended.stderr and "To go on:" in ended.stderr


def test_a_token_is_asked_for_and_taken_from_a_file(serve, continuo, tmp_path, talking_model):
    tokens, mine = tmp_path / "tokens", tmp_path / "mine"
    mine.write_text("0123456789abcdef\n")
    tokens.write_text("alice 0123456789abcdef\n")
    tokens.chmod(0o600)
    server = serve(talking_model, "--token-file", tokens)
    refused = continuo("chat", "--server", server.address, input="One.\n")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: no token was sent") and "--token-file FILE" in refused.stderr
    ended = continuo("chat", "--server", server.address, "--token-file", mine, input="One.\n")
    assert (ended.returncode, ended.stdout) == (0, f"{REPLY}\n")
    assert "0123456789abcdef" not in ended.stderr + server.stderr


def test_it_needs_neither_torch_nor_the_engine(continuo):
    code = (
        "import sys; from tools import cli; cli.main(['chat', '--server', '127.0.0.1:1']); "
        "print(*{'torch', 'engine', 'numpy', 'tokenizers', 'rich', 'readline'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "no server answers" in ended.stderr
    assert ended.stdout.split() == []


@pytest.fixture
def terminal_chat(environment):
    chats = []

    def start(*arguments: object, term: str = "xterm") -> Terminal:
        chats.append(Terminal(command("chat", *arguments), environment, term))
        return chats[-1]

    yield start
    for chat in chats:
        chat.close()


def test_ctrl_c_ends_the_reply_and_not_the_chat(serve, terminal_chat, endless_model):
    server = serve(endless_model)
    chat = terminal_chat("--server", server.address)
    assert "context of 30,000 tokens" in chat.until("›")
    chat.press("Go.\r")
    chat.until("abab")
    chat.press("\x03")
    first = chat.until("cancelled")
    assert re.search(r"0 tokens reused from device · 0 recomputed · \d+ new", first)
    chat.until("›")
    chat.press("Go on.\r")
    chat.until("abab")
    chat.press("\x03")
    second = chat.until("cancelled")
    assert int(re.search(r"(\d+) tokens reused from device", second)[1]) > 20
    chat.until("›")
    chat.press("\x04")
    assert "continuo chat --conversation c-" in chat.until("--server")
    assert chat.process.wait(timeout=20) == 0


def test_a_resumed_chat_shows_what_was_said_and_forgets_it_for_a_new_one(
    serve, continuo, terminal_chat, talking_model
):
    server = serve(talking_model)
    ended = continuo("chat", "--server", server.address, input="Uno.\nDue.\nTre.\nQuattro.\n")
    id = RESUME.fullmatch(ended.stderr)[1]
    chat = terminal_chat("--server", server.address, "--conversation", id)
    shown = chat.until("Quattro.")
    assert "... 1 earlier" in shown and REPLY in shown and "Due." in shown and "Uno." not in shown
    chat.until("›")
    chat.press("/nonsense\r")
    chat.until("there is no command /nonsense")
    chat.press("/new\r")
    chat.until(f"{id} stays as it is")
    chat.press("Cinque.\r")
    assert "0 tokens reused" in chat.until(" left")
    chat.press("/quit\r")
    assert chat.process.wait(timeout=20) == 0


def test_every_operation_is_typed_behind_a_slash(serve, terminal_chat, talking_model):
    chat = terminal_chat("--server", serve(talking_model).address)

    def press(keys: str, until: str) -> str:
        chat.until("›")
        chat.press(f"{keys}\r")
        typed = chat.until("\n")
        return typed + chat.until(until)

    assert REPLY in press("One.", " left")
    assert REPLY in press("Two.", " left")
    press("/rewind", "back to 1 turn, ")
    assert "Two.!" in press("!", REPLY)  # what was taken back had stood there, to be edited
    assert not re.search(r"\b0 tokens reused", press("/regenerate temperature=0", " left"))
    press("/append Three.", "noted, without a reply")
    press("/set temperature=0.5", "temperature=0.5")
    press("/stats", "3 turns, ")
    press("/fork 1", "with 2 turns of the other")
    assert not re.search(r"\b0 tokens reused", press("Four.", " left"))
    assert press("/list", "tokens  One.").count("turns") == 1
    assert "One." in press("/open 2", REPLY)
    press("/delete 1", "is erased")
    press("/quit", "To go on: continuo chat --conversation c-")
    assert chat.process.wait(timeout=20) == 0


def test_a_reply_goes_on_when_the_server_comes_back(serve, terminal_chat, endless_model):
    server = serve(endless_model)
    chat = terminal_chat("--server", server.address)
    chat.until("›")
    chat.press("Go.\r")
    chat.until("abab")
    server.kill()
    chat.until("the connection is lost; trying to get it back")
    serve(endless_model, "--listen", server.address)
    chat.until("abab")
    chat.press("\x03")
    chat.until("cancelled")


def test_ctrl_c_gives_up_a_server_that_does_not_come_back(serve, terminal_chat, endless_model):
    server = serve(endless_model)
    chat = terminal_chat("--server", server.address)
    chat.until("›")
    chat.press("Go.\r")
    chat.until("abab")
    server.kill()
    chat.until("the connection is lost; trying to get it back")
    chat.press("\x03")
    chat.until("interrupted")
    chat.until("›")
    chat.press("/quit\r")
    assert chat.process.wait(timeout=20) == 0


class SilentEditor:
    """Nobody types."""


def show(*deltas, colours=False):
    terminal = screen.Terminal(SilentEditor(), colours=colours)
    for delta in deltas:
        terminal.reply(delta)
    return terminal


def test_a_reply_cannot_drive_the_terminal(capsys):
    show(Delta("a\x1b[2Jb\x9bc\rd\te\n", ()))
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffdc\ufffdd\te\n"


def test_reasoning_is_dimmed_and_tool_calls_are_passed_through(capsys):
    reply = [
        Delta("<think>Hm", (), kind=ReplyKind.REASONING),
        Delta("<tool_call>{}", (), kind=ReplyKind.TOOL_CALL),
        Delta("Yes", ()),
    ]
    show(*reply, colours=True)
    assert capsys.readouterr().out == "\x1b[2m<think>Hm\x1b[0m<tool_call>{}Yes"
    show(*reply)
    assert capsys.readouterr().out == "<think>Hm<tool_call>{}Yes"


def test_a_lost_connection_is_told_once_and_each_time_it_is_lost(capsys):
    terminal = show(Delta("Mi", ()))
    for _ in range(3):
        terminal.reconnecting()
    terminal.reply(Delta("Miso", (), restarted=True))
    terminal.reconnecting()
    lost = "the connection is lost; trying to get it back ... (Ctrl-C gives up)\n"
    assert capsys.readouterr().out == f"Mi\n{lost}the reply begins again:\nMiso\n{lost}"


async def test_ctrl_c_while_waiting_for_a_line_ends_a_piped_chat(monkeypatch):
    class Stdin:
        def readline(self):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdin", Stdin())
    with pytest.raises(KeyboardInterrupt):
        await screen.Pipe().read()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_status_line_says_what_was_reused_what_it_cost_and_what_is_left():
    usage = pb.Usage(
        prompt_tokens=1150,
        completion_tokens=20,
        cached_device_tokens=1024,
        recomputed_tokens=96,
        new_tokens=30,
    )
    timing = pb.Timing(ttft_s=0.0123, total_s=0.49)
    ended = turn(usage=usage, timing=timing, context_left=2048)
    line = (
        "1,024 tokens reused from device · 96 recomputed · 30 new · "
        "20 in 0.5 s, first after 12 ms · 2,048 left"
    )
    assert status_line(ended) == line
    full = turn(usage=usage, timing=timing, context_left=2048, finish_reason=FinishReason.CONTEXT_FULL)
    assert status_line(full) == f"{line} · the context is full: /rewind makes room, /new begins anew"
    rewritten = turn(usage=usage, timing=timing, context_left=2048, rewritten_from=77)
    assert status_line(rewritten) == (
        f"{line} · the template would now write the past differently from token 77"
    )
