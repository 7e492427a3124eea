"""`continuo chat`, piped, against real servers; and what keeps it from beginning."""

import re
import subprocess
import sys

import pytest

from tests.tools.conftest import ROOT, command
from tests.tools.fake_hub import FakeHub, running
from tests.tools.talking_models import REPLY
from tests.tools.terminal import pids_of

RESUME = re.compile(r"To go on: continuo chat --conversation (\S+) (.*)\n")


def test_piped_it_answers_each_line_and_prints_nothing_else(serve, continuo, talking_model):
    server = serve(talking_model)
    ended = continuo("chat", "--server", server.address, input="One.\n\nTwo.\nThree.")
    assert (ended.returncode, ended.stdout) == (0, f"{REPLY}\n" * 3)
    assert RESUME.fullmatch(ended.stderr)


def test_what_is_no_text_is_replaced_and_answered(serve, environment, talking_model):
    server = serve(talking_model)
    for encoding in ("utf-8", "ascii", "utf-8:surrogateescape"):
        ended = subprocess.run(
            command("chat", "--server", server.address),
            cwd=ROOT,
            env={**environment, "PYTHONIOENCODING": encoding},
            input=b"\xff\xfe\n",
            capture_output=True,
            timeout=60,
        )
        assert (ended.returncode, ended.stdout) == (0, f"{REPLY}\n".encode()), ended.stderr


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
    assert pids_of(talking_model) == []


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


def test_a_model_that_the_hub_does_not_have_is_named_before_a_server_is_started(continuo, environment):
    with running(FakeHub({})) as hub:
        environment |= {"HF_ENDPOINT": hub.endpoint}
        ended = continuo("chat", "org/name", input="One.\n")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"error: there is no model org/name at {hub.endpoint}")
    assert len(ended.stderr.splitlines()) == 1


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
