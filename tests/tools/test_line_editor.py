"""Typing messages: real keys on a pseudo-terminal, without a server."""

import stat
import sys

import pytest

from tests.tools.terminal import Terminal
from tools.chat.line_editor import NUM_REMEMBERED

PROGRAM = """
import sys
from pathlib import Path
from tools.chat.line_editor import LineEditor

complete = {"/rew": ["/rewind "]}
editor = LineEditor(Path(sys.argv[1]), lambda text: complete.get(text, []), sys.argv[2] == "plain")
suggestion = ""
while True:
    try:
        said = editor.read(suggestion)
        suggestion = "To be edited" if said == "suggest" else ""
        if said == "work":  # as while a reply comes
            print("working", flush=True)
            while not Path(sys.argv[1] + ".go").exists():
                pass
    except EOFError:
        break
    print("said", ascii(said), flush=True)
"""


@pytest.fixture
def history(tmp_path):
    return tmp_path / "state" / "history"


@pytest.fixture
def typing(environment, history):
    """Starts the program; `until` what it says shows the message that was read."""
    terminals = []

    def start(term="xterm", kind="full"):
        terminals.append(
            Terminal([sys.executable, "-c", PROGRAM, str(history), kind], environment, term=term)
        )
        terminals[-1].until("›")
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.mark.parametrize("kind", ["full", "plain"])
def test_a_line_that_ends_in_a_backslash_goes_on(typing, kind):
    terminal = typing(kind=kind)
    terminal.press("One\\\r")
    terminal.until("…")
    terminal.press("two\r")
    terminal.until(r"said 'One\ntwo'")


def test_a_marked_paste_is_one_message_once_enter_is_pressed(typing):
    terminal = typing()
    terminal.press("See: \x1b[200~one\rtwo\rthree\x1b[201~")
    terminal.until("three")
    terminal.press("!\r")
    terminal.until(r"said 'See: one\ntwo\nthree!'")


@pytest.mark.parametrize("kind", ["full", "plain"])
def test_a_paste_without_marks_is_one_message_too(typing, kind):
    terminal = typing(kind=kind)
    terminal.press("one\rtwo\rthree\r")
    terminal.until(r"said 'one\ntwo\nthree'")


def test_lines_typed_while_a_reply_runs_are_messages_of_their_own(typing, history):
    terminal = typing()
    terminal.press("work\r")
    terminal.until("working")
    terminal.press("one\rtwo\r")
    terminal.until("two")
    history.with_name("history.go").touch()
    terminal.until("said 'one'")
    terminal.until("said 'two'")


def test_messages_are_remembered_for_the_next_time_and_for_their_owner_alone(typing, history):
    terminal = typing()
    terminal.press("\x1b[200~one\rtwo\x1b[201~\r")
    terminal.until("said")
    terminal.until("›")
    terminal.press("\x04")
    assert terminal.process.wait(20) == 0
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    terminal = typing()
    terminal.press("\x1b[A\r")
    terminal.until(r"said 'one\ntwo'")


def test_the_oldest_messages_are_forgotten_and_damaged_ones_left_out(typing, history):
    history.parent.mkdir()
    history.write_text("".join(f'"{number}"\n' for number in range(2 * NUM_REMEMBERED)) + '{"a\n"last"\n')
    terminal = typing()
    kept = history.read_text().splitlines()
    assert (len(kept), kept[-1]) == (NUM_REMEMBERED, '"last"')
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    terminal.press("\x1b[A\r")
    terminal.until("said 'last'")


def test_a_plain_terminal_is_sent_no_control_sequence_and_leaves_no_history(typing, history):
    terminal = typing(term="dumb", kind="plain")
    terminal.press("One.\r")
    assert "\x1b" not in terminal.until("said 'One.'")
    assert not history.exists()


def test_a_history_that_cannot_be_kept_does_not_end_the_chat(typing, history):
    history.parent.write_text("a file where a folder should be")
    terminal = typing()
    terminal.press("One.\r")
    terminal.until("said 'One.'")
    terminal.press("\x1b[A\r")
    terminal.until("said 'One.'")


def test_a_suggestion_stands_on_the_next_line_alone(typing):
    terminal = typing()
    terminal.press("suggest\r")
    terminal.until("said 'suggest'")
    terminal.until("To be edited")
    terminal.press(" now\r")
    terminal.until("said 'To be edited now'")
    terminal.press("Other\r")
    terminal.until("said 'Other'")


def test_the_tab_key_completes(typing):
    terminal = typing()
    terminal.press("/rew\t2\r")
    terminal.until("said '/rewind 2'")
