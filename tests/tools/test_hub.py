"""Hub ids against a hub on localhost, through the real client library."""

import gc
import json
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import file_download

from engine.errors import ModelFolderError
from tests.tools.fake_hub import COMMIT, MODEL, FakeHub, running
from tools import demo
from tools.arguments import model
from tools.hub import HubError, resolve_model

WEIGHTS = "model.safetensors"
UNUSED = {
    "README.md": b"words",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"x",
    "modeling.py": b"code",
}


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)


@pytest.fixture
def hub(talking_model) -> Iterator[FakeHub]:
    files = {path.name: path.read_bytes() for path in talking_model.iterdir() if path.is_file()}
    with running(FakeHub(files | UNUSED)) as hub:
        yield hub


@pytest.fixture
def fetch(hub, tmp_path):
    def fetch(id: str = MODEL, **options) -> Path:
        return resolve_model(id, endpoint=hub.endpoint, cache_dir=tmp_path / "cache", **options)

    return fetch


def refusal(fetch, *arguments, **options) -> str:
    with pytest.raises(HubError) as refused:
        fetch(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def closed_port() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize("folder", ["./org/name", "org/name"])
def test_a_folder_that_is_there_goes_before_a_hub_id(monkeypatch, tmp_path, folder):
    monkeypatch.chdir(tmp_path)
    assert model("org/name") == "org/name"
    (tmp_path / "org/name").mkdir(parents=True)
    assert model(folder) == Path("org/name")
    assert resolve_model(Path("org/name")) == Path("org/name")


def test_a_download_holds_what_is_read_and_nothing_else(fetch, hub, caplog):
    with caplog.at_level(logging.INFO, "tools.hub"):
        folder = fetch()
    assert folder.name == COMMIT
    here = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert here == {name: data for name, data in hub.files.items() if name not in UNUSED}
    assert hub.files_sent() == set(here)
    begun, done = (record.message for record in caplog.records)
    assert f"downloading {MODEL}, " in begun and " MiB in 1 files, to " in begun
    assert done.startswith(f"downloaded {MODEL} in ")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_sees_one_bar_which_is_gone_in_the_end_and_a_pipe_sees_none(
    fetch, monkeypatch, capsys, is_terminal
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    fetch()
    gc.collect()  # a bar that was left open would be drawn once more
    shown = capsys.readouterr().err
    assert ("downloading: " in shown) == is_terminal and "Fetching" not in shown
    assert not any(line.strip() for line in shown.split("\r")[-2:])


def test_what_is_here_is_not_fetched_again(fetch, hub):
    folder = fetch()
    hub.sent.clear()
    assert fetch() == fetch(revision=COMMIT) == folder
    assert hub.sent == []


def test_a_connection_that_breaks_is_taken_up_where_it_broke(fetch, hub, monkeypatch):
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # before it tries again
    monkeypatch.setattr(file_download.constants, "DOWNLOAD_CHUNK_SIZE", 64)
    hub.breaks_at[WEIGHTS] = 640
    folder = fetch()
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert [wanted for name, wanted in hub.sent if name == WEIGHTS] == ["", "bytes=640-"]


def test_a_download_that_was_given_up_keeps_its_whole_files(fetch, hub, monkeypatch):
    def give_up(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        get = file_download.http_get
        patch.setattr(
            file_download, "http_get", lambda url, *a, **k: (give_up if WEIGHTS in url else get)(url, *a, **k)
        )
        assert refusal(fetch) == (
            f"the download of {MODEL} broke off; run this again, whole files are kept "
            "([Errno 28] No space left on device)"
        )
    assert "is not, or not wholly, in" in refusal(fetch, offline=True)
    hub.sent.clear()
    fetch()
    assert hub.files_sent() == {WEIGHTS}


def test_a_disk_without_room_is_found_before_the_weights_are_fetched(fetch, hub, tmp_path):
    hub.files[WEIGHTS] = bytes(3 * 2**20)
    told = refusal(fetch, free_bytes=lambda folder: 2**20)
    assert told == (
        f"{MODEL} needs 3.0 MiB more in {tmp_path / 'cache'}, whose disk has 1.0 MiB free; "
        "make room, or set HF_HOME to a folder on another disk"
    )
    assert WEIGHTS not in hub.files_sent()
    fetch(free_bytes=lambda folder: 3 * 2**20)


def test_a_model_of_a_kind_that_is_not_served_is_refused_before_its_weights_are_fetched(fetch, hub):
    hub.files["config.json"] = json.dumps({"architectures": ["BertModel"]}).encode()
    with pytest.raises(ModelFolderError, match="BertModel"):
        fetch()
    assert WEIGHTS not in hub.files_sent()


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (
            {"config.json", "pytorch_model.bin"},
            "has its weights as pytorch_model.bin only, a pickle: loading one",
        ),
        ({"config.json", "README.md"}, "has no model.safetensors, so there is nothing to serve; it holds "),
    ],
)
def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(fetch, hub, left, reason):
    hub.files = {name: data for name, data in hub.files.items() if name in left}
    assert f"{hub.endpoint}/{MODEL} {reason}" in refusal(fetch)
    assert hub.sent == []


def test_a_gated_model_says_what_to_do_and_is_fetched_with_the_token(fetch, hub, monkeypatch):
    hub.gated = True
    assert refusal(fetch) == (
        f"{MODEL} is gated: accept its conditions at {hub.endpoint}/{MODEL}, set HF_TOKEN to a token of the "
        f"account that did ({hub.endpoint}/settings/tokens), and run this again"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    assert (fetch() / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("id", "revision", "complaint"),
    [
        ("tests/unknown", None, "there is no model tests/unknown at {endpoint}, or it is private; check the"),
        (MODEL, "v2", "{endpoint}/tests/talking has no revision v2; leave --revision out for main"),
        ("tests/a--b", None, "'tests/a--b' is no hub id: "),
    ],
)
def test_what_the_hub_does_not_have_is_named(fetch, hub, id, revision, complaint):
    assert refusal(fetch, id, revision=revision).startswith(complaint.format(endpoint=hub.endpoint))


def test_a_hub_in_trouble_is_told_from_one_that_lacks_the_model(fetch, hub):
    hub.is_down = True
    assert f"{hub.endpoint}/{MODEL} answered 500 Internal Server Error; try again" in refusal(fetch)


def test_offline_serves_what_is_here_and_asks_nobody(fetch, hub):
    told = refusal(fetch, offline=True)
    assert f"{MODEL} at revision main is not, or not wholly, in" in told
    assert told.endswith(f"fetch it once with the network: continuo serve {MODEL}")
    assert refusal(fetch, offline=True, revision="v2").endswith(f"continuo serve {MODEL} --revision v2")
    folder = fetch()
    hub.is_down = True
    assert fetch(offline=True) == fetch(offline=True, revision=COMMIT) == folder


def test_without_a_network_what_is_here_serves_and_what_is_not_says_so(fetch, hub, tmp_path, caplog):
    nowhere = closed_port()
    told = refusal(resolve_model, MODEL, endpoint=nowhere, cache_dir=tmp_path / "cache")
    assert told.startswith(f"{nowhere} cannot be reached (") and "check the network" in told
    folder = fetch()
    assert resolve_model(MODEL, endpoint=nowhere, cache_dir=tmp_path / "cache") == folder
    assert caplog.messages[-1] == f"{nowhere} cannot be reached; serving the copy of {MODEL} that is here"


def test_generate_takes_a_hub_id(continuo, environment, hub, talking_model, tmp_path):
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub")}
    how = ("--prompt", "Hello", "--max-new-tokens", "4", "--json")
    ended, folder = continuo("generate", MODEL, *how), continuo("generate", talking_model, *how)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["token_ids"] == json.loads(folder.stdout)["token_ids"]
    ended = continuo("generate", "tests/unknown", *how)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1].startswith("error: there is no model tests/unknown at ")


def test_the_demo_takes_a_hub_id_and_says_what_is_wrong_with_it(hub, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    assert demo.main(["--model", "tests/unknown"]) == 1
    assert capsys.readouterr().err.startswith(f"error: there is no model tests/unknown at {hub.endpoint}, ")
