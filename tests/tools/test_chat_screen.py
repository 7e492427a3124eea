"""What the chat shows on a terminal and takes from a pipe, without a server."""

import signal
import sys

import pytest

from rpc._generated import continuo_pb2 as pb
from rpc.client import Delta, FinishReason, ReplyKind
from tests.tools.fake_chat import turn
from tools.chat import screen
from tools.chat.wording import reuse, status_line


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


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "a\ufffd[2Jb\n"), (False, "a\x1b[2Jb\n")])
def test_a_reply_of_a_piped_chat_passes_through_but_for_what_would_drive_a_terminal(
    capsys, monkeypatch, is_terminal, shown
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    screen.Pipe().reply(Delta("a\x1b[2Jb\n", ()))
    assert capsys.readouterr().out == shown


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


def test_a_reply_that_waits_for_memory_says_so(capsys):
    show(Delta("Mi", ())).suspended()
    assert capsys.readouterr().out == (
        "Mi\nothers need the memory; the reply goes on by itself when there is room (Ctrl-C ends it)\n"
    )
    screen.Pipe().suspended()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        ({"new_tokens": 21}, ["reused 0", "new 21"]),
        ({"cached_host_tokens": 404, "new_tokens": 1}, ["reused 404 (host)", "new 1"]),
        (
            {"recomputed_tokens": 1096, "evicted_tokens": 1000, "restart_tokens": 64, "cut_tokens": 32},
            ["reused 0", "computed again 1,096 (evicted 1,000, restart 64, cut 32)", "new 0"],
        ),
        (
            {
                "recomputed_tokens": 7,
                "rewritten_tokens": 7,
                "new_tokens": 1521,
                "never_computed_tokens": 1500,
            },
            ["reused 0", "computed again 7 (rewritten)", "new 1,521 (1,500 of the history)"],
        ),
        ({"recomputed_tokens": 7}, ["reused 0", "computed again 7", "new 0"]),  # of an older server
    ],
)
def test_what_was_reused_is_told_by_tier_and_what_was_not_by_reason(usage, told):
    assert reuse(pb.Usage(**usage)) == told


def test_the_status_line_says_what_was_reused_what_it_cost_and_what_is_left():
    usage = pb.Usage(
        prompt_tokens=1150,
        completion_tokens=20,
        cached_device_tokens=824,
        cached_host_tokens=200,
        recomputed_tokens=96,
        evicted_tokens=96,
        new_tokens=30,
    )
    timing = pb.Timing(ttft_s=0.0123, total_s=0.49)
    ended = turn(usage=usage, timing=timing, context_left=2048)
    line = (
        "reused 1,024 (device 824, host 200) · computed again 96 (evicted) · new 30 · "
        "a reply of 20 in 0.5 s, first after 12 ms · 2,048 left"
    )
    assert status_line(ended) == line
    full = turn(usage=usage, timing=timing, context_left=2048, finish_reason=FinishReason.CONTEXT_FULL)
    assert status_line(full) == f"{line} · the context is full: /rewind makes room, /new begins anew"
    rewritten = turn(usage=usage, timing=timing, context_left=2048, rewritten_from=77)
    assert status_line(rewritten) == (
        f"{line} · the template would now write the past differently from token 77"
    )
