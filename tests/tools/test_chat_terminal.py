"""`continuo chat` on a pseudo-terminal, against real servers."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.tools.conftest import command
from tests.tools.fake_hub import COMMIT, MODEL, FakeHub, running
from tests.tools.talking_models import REPLY, THOUGHT, write_thinking_model
from tests.tools.terminal import Terminal, pids_of


@pytest.fixture
def terminal_chat(environment):
    chats = []

    def start(*arguments: object, term: str = "xterm", **more: str) -> Terminal:
        chats.append(Terminal(command("chat", *arguments), {**environment, **more}, term))
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
    assert re.search(r"reused 0 · new \d+ ·", first)
    chat.until("›")
    chat.press("Go on.\r")
    chat.until("abab")
    chat.press("\x03")
    second = chat.until("cancelled")
    assert int(re.search(r"reused (\d+) \(device\)", second)[1]) > 20
    chat.until("›")
    chat.press("\x04")
    assert "continuo chat --conversation c-" in chat.until("--server")
    assert chat.process.wait(timeout=20) == 0


def test_a_resumed_chat_shows_what_was_said_and_forgets_it_for_a_new_one(
    serve, continuo, terminal_chat, talking_model
):
    server = serve(talking_model)
    ended = continuo("chat", "--server", server.address, input="Uno.\nDue.\nTre.\nQuattro.\n")
    id = re.search(r"--conversation (\S+)", ended.stderr)[1]
    chat = terminal_chat("--server", server.address, "--conversation", id)
    shown = chat.until("Quattro.")
    assert "... 1 earlier" in shown and REPLY in shown and "Due." in shown and "Uno." not in shown
    chat.until("›")
    chat.press("/nonsense\r")
    chat.until("there is no command /nonsense")
    chat.press("/new\r")
    chat.until(f"{id} stays as it is")
    chat.press("Cinque.\r")
    assert "reused 0 ·" in chat.until(" left")
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
    assert not re.search(r"reused 0\b", press("/regenerate temperature=0", " left"))
    press("/append Three.", "noted, without a reply")
    press("/set temperature=0.5", "temperature=0.5")
    press("/stats", "3 turns, ")
    press("/fork 1", "with 2 turns of the other")
    assert not re.search(r"reused 0\b", press("Four.", " left"))
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


def test_a_server_of_its_own_that_dies_ends_the_chat_with_a_reason(terminal_chat, endless_model):
    chat = terminal_chat(endless_model, "--data-dir", "none")
    chat.until("›")
    chat.press("Go.\r")
    chat.until("abab")
    (server,) = pids_of("serve", endless_model)
    os.kill(server, signal.SIGKILL)
    chat.until("error: the server has ended: ")
    assert chat.process.wait(timeout=20) == 1


def test_a_model_from_the_hub_shows_its_download_and_is_named_in_the_farewell(
    terminal_chat, talking_model, tmp_path
):
    files = {path.name: path.read_bytes() for path in talking_model.iterdir()}
    with running(FakeHub(files)) as hub:
        chat = terminal_chat(
            MODEL, "--revision", COMMIT, HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "hub"), HF_TOKEN=""
        )
        chat.until(f"downloading {MODEL}")
        chat.until(f"downloaded {MODEL}")
        chat.until(f"starting a server for {MODEL}")
        chat.until("›")
        chat.press("One.\r")
        assert REPLY in chat.until(" left")
        chat.until("›")
        chat.press("\x04")
        chat.until(f"{MODEL} --revision {COMMIT} --data-dir")


def test_a_dumb_terminal_gets_neither_colours_nor_control_sequences(serve, terminal_chat, talking_model):
    chat = terminal_chat("--server", serve(talking_model).address, term="dumb")
    shown = chat.until("›")
    chat.press("One.\r")
    shown += chat.until(" left")
    assert REPLY in shown and "\x1b" not in shown


def test_a_conversation_that_another_took_over_is_taken_back_by_the_next_word(
    serve, continuo, terminal_chat, talking_model
):
    server = serve(talking_model)
    chat = terminal_chat("--server", server.address)
    chat.until("›")
    chat.press("One.\r")
    chat.until(" left")
    chat.press("/list\r")
    id = re.search(r"c-\w+", chat.until("turn"))[0]
    ended = continuo("chat", "--server", server.address, "--conversation", id, input="Two.\n")
    assert ended.returncode == 0
    chat.until("›")
    chat.press("Three.\r")
    chat.until("another stream has attached")
    chat.until("Three.")  # on the prompt again
    chat.press("\r")
    assert REPLY in chat.until(" left")
    chat.press("/stats\r")
    chat.until("3 turns, ")


def test_no_color_is_heeded_and_what_was_typed_is_remembered(
    serve, terminal_chat, talking_model, environment
):
    chat = terminal_chat("--server", serve(talking_model).address, NO_COLOR="1")
    shown = chat.until("›")
    chat.press("One.\r")
    shown += chat.until(" left")
    assert REPLY in shown and not re.search(r"\x1b\[[0-9;]*m", shown)
    history = Path(environment["XDG_STATE_HOME"]) / "continuo" / "chat_history"
    assert history.read_text() == '"One."\n'


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


def test_a_thought_is_dimmed_and_a_template_that_forgets_it_is_told(serve, continuo, terminal_chat, tmp_path):
    server = serve(write_thinking_model(tmp_path / "thinking"))
    chat = terminal_chat("--server", server.address)
    chat.until("›")
    chat.press("One.\r")
    chat.until("\n")
    shown = chat.until(" left")
    dimmed, plain = (
        "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", shown)),
        re.sub(r"\x1b\[2m.*?\x1b\[0m", "", shown),
    )
    assert dimmed == THOUGHT and REPLY in plain
    chat.until("›")
    chat.press("Two.\r")
    chat.until("the template would now write the past differently from token")
    ended = continuo("chat", "--server", server.address, input="One.\n")
    assert ended.stdout == f"{THOUGHT}{REPLY}\n"
