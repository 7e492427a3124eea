"""What the chat program makes of each line, against a client that notes what it is asked for."""

import os
import signal

import pytest

from rpc.client import Aborted, OutOfRange, RunState, Unavailable
from tests.tools.fake_chat import FakeClient, FakeScreen
from tools.chat import converse
from tools.chat.commands import COMMANDS, NUM_LISTED, complete, parse
from tools.chat.talk import Talk


async def chat(*lines, client=None, **options):
    """The client and the screen of a chat in which `lines` are typed."""
    client = client or FakeClient("c-1", "c-2")
    screen = FakeScreen(*lines)
    await converse(Talk(client, screen, **options))
    return client, screen


async def test_the_first_message_opens_a_conversation_and_names_it():
    client, screen = await chat("  Hello\n there", "And?", system="Be brief.")
    assert client.calls == [
        ("open", "Be brief.", {"title": "Hello there"}, {}),
        ("say", "c-new", "  Hello\n there"),
        ("say", "c-new", "And?"),
    ]
    assert screen.replies == ["Miso.", "Miso."]


async def test_a_turn_that_is_suspended_is_told_and_one_that_runs_is_not():
    client = FakeClient()
    client.states = [RunState.RUNNING, RunState.SUSPENDED, RunState.RUNNING, RunState.PAUSED]
    _, screen = await chat("Hello", client=client)
    assert screen.notes == ["suspended"] and screen.replies == ["Miso."]


async def test_each_command_is_one_operation_of_the_conversation():
    client, screen = await chat(
        "/open c-1", "/regenerate temperature=0.5", "/append Note this.", "/fork 1", "/rewind"
    )
    assert client.calls == [
        ("regenerate", "c-1", {"temperature": 0.5}),
        ("append", "c-1", "Note this."),
        ("fork", "c-1", 2),
        ("rewind", "c-1-fork", 1),
    ]
    assert not screen.errors


async def test_what_was_taken_back_stands_on_the_next_line_to_be_edited():
    _, screen = await chat("/open c-1", "/rewind 2")
    assert screen.suggestions == ["One."]
    assert screen.notes[-1] == "back to 0 turns, 0 tokens"


async def test_a_file_is_told_without_asking_for_a_reply(tmp_path):
    path = tmp_path / "notes"
    path.write_text("It rained.\n")
    client, _ = await chat(f"/file {path}")
    assert client.calls[-1] == ("append", "c-new", "It rained.\n")


async def test_what_is_set_holds_for_this_and_for_new_conversations():
    client, screen = await chat("/set temperature=0.7", '/set stop="The end"', "Hello", "/set seed=3", "/set")
    assert client.calls == [
        ("open", None, {"title": "Hello"}, {"temperature": 0.7, "stop": ["The end"]}),
        ("say", "c-new", "Hello"),
        ("update", "c-new", {"seed": 3}),
    ]
    assert screen.notes == ["temperature=0.7", 'temperature=0.7 stop=["The end"]', "top_k=5", "top_k=5"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("stop=The", ["The"]),
        ('stop="The end"', ["The end"]),
        ('stop=["a b", "\\"c\\""]', ["a b", '"c"']),
        ('stop="a"b', ['"a"b']),
        ("stop=[a,b]", ["[a,b]"]),
    ],
)
async def test_a_text_to_set_is_json_or_a_word(typed, meant):
    client, _ = await chat(f"/set top_k=5 {typed}  seed=3", "Hello")
    assert client.calls[0][3] == {"top_k": 5, "stop": meant, "seed": 3}


async def test_a_new_conversation_leaves_the_other_as_it_is():
    client, screen = await chat("One.", "/new", "Two.", "/system Be rude.", "Three.")
    assert [call for call in client.calls if call[0] == "open"] == [
        ("open", None, {"title": "One."}, {}),
        ("open", None, {"title": "Two."}, {}),
        ("open", "Be rude.", {"title": "Three."}, {}),
    ]
    assert screen.notes[0] == "c-new stays as it is; /open c-new goes on with it"


async def test_a_number_names_a_conversation_of_the_last_list():
    client, screen = await chat("/list", "/open 2", "Hello", "/delete 2")
    assert client.calls == [("say", "c-2", "Hello"), ("delete", "c-2")]
    lines = screen.notes[0].splitlines()
    assert [line.split()[:2] for line in lines] == [["1", "c-1"], ["2", "c-2"]]
    assert lines[0].endswith("2 turns      66 tokens  on c-1")


async def test_a_long_list_says_that_there_are_more():
    ids = [f"c-{number}" for number in range(NUM_LISTED + 1)]
    _, screen = await chat("/list", client=FakeClient(*ids))
    lines = screen.notes[0].splitlines()
    assert len(lines) == NUM_LISTED + 1 and lines[-1].endswith("... and older ones")
    _, screen = await chat("/list", client=FakeClient(*ids[1:]))
    assert len(screen.notes[0].splitlines()) == NUM_LISTED


async def test_help_names_every_command_and_statistics_the_whole_conversation():
    _, screen = await chat("/help", "/open c-1", "/stats")
    assert all(f"/{name}" in screen.notes[0] for name in COMMANDS)
    assert screen.notes[-1].startswith("c-1: 2 turns, 66 tokens of history\nreused 0")


async def test_quit_ends_the_chat():
    client, _ = await chat("/quit", "Hello")
    assert client.calls == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/rewnd", "there is no command /rewnd; did you mean /rewind?"),
        ("/zzz", "there is no command /zzz; /help lists them.  A space before the / makes it a message."),
        ("/list all", "/list takes nothing behind it"),
        ("/open", "/open ID: go on with one of them; its number in the list will do"),
        ("/open c-9", "there is no conversation c-9"),
        ("/open 3", "there is no conversation 3"),
        ("/rewind", "nothing has been said yet"),
        ("/regenerate", "nothing has been said yet"),
        ("/stats", "nothing has been said yet"),
        ("/set warmth=1", "'warmth=1' is not NAME=VALUE with a name out of temperature, top_k,"),
        ("/set temperature", "'temperature' is not NAME=VALUE"),
        ("/set top_k=5 hot", "'hot' is not NAME=VALUE"),
        ("/set temperature=hot", "temperature cannot be hot; it is a number"),
        ("/set temperature=null", "temperature cannot be null; it is a number"),
        ("/set top_k=0.5", "top_k cannot be 0.5; it is a whole number"),
        ("/set ignore_eos=maybe", "ignore_eos cannot be maybe; it is true or false"),
        ("/set stop=[1]", 'stop cannot be [1]; it is a text, or several like ["a", "b"]'),
        ("/file /no/file", "/no/file cannot be read: No such file or directory"),
        ("/file /bin/sh", "/bin/sh cannot be read as text: "),
        ("/file /dev/null", "/dev/null is empty"),
    ],
)
async def test_a_command_that_cannot_work_is_told_in_one_line_and_the_chat_goes_on(line, complaint):
    client, screen = await chat(line, "Hello")
    (error,) = screen.errors
    assert error.startswith(complaint) and "\n" not in error
    assert client.calls[-1] == ("say", "c-new", "Hello")


@pytest.mark.parametrize("argument", ["0", "3", "-1", "one"])
async def test_no_more_turns_are_taken_back_than_there_are(argument):
    client, screen = await chat("/open c-1", f"/rewind {argument}")
    assert screen.errors == [f"{argument!r} is not a number of turns from 1 to 2, as many as there are"]
    assert client.calls == []


@pytest.mark.parametrize("text", ["/etc/hosts is what?", " /help", "a /quit", "/", "/2", "//"])
def test_what_only_looks_like_a_command_is_a_message(text):
    assert parse(text) is None


def test_the_tab_key_completes_commands_and_nothing_else():
    assert complete("/re") == ["/rewind ", "/regenerate "]
    assert complete("re") == complete("/x") == []


async def test_a_failed_message_is_offered_again_and_said_again_it_is_the_same_turn():
    client = FakeClient()
    client.failures = [Unavailable("gone"), OutOfRange("too long"), Aborted("another has it")]
    _, screen = await chat(*["Hello"] * 5, client=client)
    assert screen.errors == [
        "the server does not answer (gone); say it again when it is back",
        "too long (/rewind makes room, /new begins anew)",
        "another has it; saying it again takes it back",
    ]
    assert screen.suggestions == ["Hello"] * 3
    *same, another = client.turn_ids
    assert len(set(same)) == 1 and another not in same


class ImpatientScreen(FakeScreen):
    """Its user presses Ctrl-C as soon as a reply begins."""

    def reply(self, delta):
        super().reply(delta)
        os.kill(os.getpid(), signal.SIGINT)


async def test_ctrl_c_ends_a_reply_and_keeps_what_was_said():
    client, screen = FakeClient(), ImpatientScreen("Hello")
    client.endless = True
    await converse(Talk(client, screen))
    assert screen.errors == [] and screen.replies == ["Miso."]


async def test_ctrl_c_gives_a_reply_up_that_has_no_connection():
    client, screen = FakeClient(), ImpatientScreen("Hello", "Hello")
    client.endless, client.cannot_cancel = True, Unavailable("not back yet")
    await converse(Talk(client, screen))
    assert screen.errors == ["interrupted", "interrupted"]
    assert len(set(client.turn_ids)) == 2  # a turn that was given up is not said again


async def test_piped_every_line_is_a_message_and_the_first_error_ends_it():
    client, screen = FakeClient(), FakeScreen("/help", "Two.", "Three.")
    screen.is_interactive = False
    client.failures = [None, OutOfRange("too long")]
    with pytest.raises(OutOfRange):
        await converse(Talk(client, screen))
    assert [call[2] for call in client.calls if call[0] == "say"] == ["/help", "Two."]
