"""Both kinds of tokenizer: ids, text, special tokens, and what is said of a folder that cannot be used."""

import json
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from engine.errors import InvalidRequest, ModelFolderError
from engine.text.tokenizer import Tokenizer

TEXTS = [
    "",
    "a",
    " ",
    "\n",
    " leading and trailing ",
    "tabs\tand\r\nline ends\n\n\n",
    "multiple     spaces",
    "Ünïcödé naïve café",
    "你好，世界。",
    "🙂👩‍👩‍👧‍👦🇫🇷",
    "\x00\x01\x7f",
    "the cat in the house by the sea",
]
PROPERTY = settings(max_examples=200)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_library_and_decode_to_the_text(tokenizer, library, text):
    ids = tokenizer.encode(text, allow_special=True)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special=False) == text


@given(data=st.data())
@PROPERTY
def test_any_ids_decode_as_the_library_decodes_them(tokenizer, library, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    for skip_special in (True, False):
        expected = library.decode(ids, skip_special_tokens=skip_special)
        if "\ufffd" not in expected or library.model.byte_fallback is False:
            # Next to invalid bytes the library's byte fallback gives up valid characters too; we do not.
            assert tokenizer.decode(ids, skip_special=skip_special) == expected


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    cat = tokenizer.encode("cat", allow_special=True)
    assert tokenizer.decode([*cat, tokenizer.vocab_size + 7], skip_special=True) == "cat"


def test_special_tokens_are_skipped_only_when_asked(tokenizer):
    ids = tokenizer.encode("<|im_start|>cat<|im_end|>", allow_special=True)
    assert tokenizer.special_ids.issuperset({ids[0], ids[-1]})
    assert tokenizer.decode(ids, skip_special=True) == "cat"
    assert "<|im_end|>" in tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a<|im_end|><|im_end|> b", "<|im_<|im_end|>end|>", "<s>x</s>"]
)
def test_lookalikes_stay_text_when_special_tokens_are_not_allowed(tokenizer, text):
    assert not tokenizer.special_ids.isdisjoint(tokenizer.encode(text, allow_special=True))
    ids = tokenizer.encode(text, allow_special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skip_special=True) == text


@given(pieces=st.lists(st.sampled_from(["<|im_", "<", "s>", "end|>", "<s>", "<|im_end|>", " ", "a", "é"])))
@PROPERTY
def test_no_text_can_forge_a_control_token_and_none_is_lost(tokenizer, pieces):
    text = "".join(pieces)
    ids = tokenizer.encode(text, allow_special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skip_special=True) == text


def test_tags_that_the_template_writes_are_control_tokens_and_other_added_tokens_are_not(speak):
    tokenizer, _ = speak("reasoning")
    tags = {"<think>", "</think>"}
    assert tags <= tokenizer.control_tokens.keys()
    assert "<table>" not in tokenizer.control_tokens
    plain = tokenizer.encode("<think><table>", allow_special=False)
    assert len(plain) > 2 and tokenizer.decode(plain, skip_special=False) == "<think><table>"
    assert plain[-1] == tokenizer.encode("<table>", allow_special=True)[0]


@pytest.mark.parametrize(("token", "text"), [("x", "x"), ("halt", "HALT")])
def test_text_that_becomes_a_control_token_even_when_cut_is_refused(byte_level_dir, token, text):
    backend = tokenizers.Tokenizer.from_file(str(byte_level_dir / "tokenizer.json"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.add_special_tokens([AddedToken(token, normalized=True)])
    tokenizer = Tokenizer(backend.to_str(), {}, None)
    with pytest.raises(
        InvalidRequest, match=f"contains '{token}'.*only read as a control token; leave it out"
    ):
        tokenizer.encode(f"a {text} b", allow_special=False)


@pytest.mark.parametrize("text", ["<a>b>", "<a<a>b>", "<a>b><a>", "b><a>b"])
def test_control_tokens_that_overlap_are_all_cut(byte_level_dir, text):
    backend = tokenizers.Tokenizer.from_file(str(byte_level_dir / "tokenizer.json"))
    backend.add_special_tokens(["<a>", ">b>", "<a>b"])
    tokenizer = Tokenizer(backend.to_str(), {}, None)
    ids = tokenizer.encode(text, allow_special=False)
    assert tokenizer.special_ids.isdisjoint(ids) and tokenizer.decode(ids, skip_special=False) == text


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer):
    text, slices = "the cat in the house by the sea " * 20_000, []
    begun, done = threading.Event(), threading.Event()

    def encode() -> None:
        begun.set()
        tokenizer.encode(text, allow_special=False)
        done.set()

    worker = threading.Thread(target=encode)
    worker.start()
    begun.wait()
    while not done.wait(0.001):
        slices.append(time.perf_counter())
    worker.join()
    assert len(slices) > 3  # with the lock kept this thread would not run before the end


def test_a_continuation_encodes_as_the_rest_of_the_whole(tokenizer):
    whole = tokenizer.encode("<|im_start|>the cat<|im_end|>\nsaid hello\nto the sea", allow_special=True)
    for cut in (
        "<|im_start|>",
        "<|im_start|>the cat<|im_end|>",
        "<|im_start|>the cat<|im_end|>\nsaid hello\n",
    ):
        head = tokenizer.encode(cut, allow_special=True)
        assert whole[: len(head)] == head
        rest = "<|im_start|>the cat<|im_end|>\nsaid hello\nto the sea"[len(cut) :]
        assert tokenizer.encode(rest, allow_special=True, after=head[-1]) == whole[len(head) :]


def test_a_continuation_does_not_join_what_stands_before_it(byte_fallback_dir):
    definition = json.loads((byte_fallback_dir / "tokenizer.json").read_text())
    vocab = definition["model"]["vocab"]
    vocab |= {"\n": len(vocab) + 100, "\n\n": len(vocab) + 101}
    definition["model"]["merges"].append(["\n", "\n"])
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.add_special_tokens([AddedToken("<word>", single_word=True)])
    tokenizer = Tokenizer(backend.to_str(), {}, None)
    cat = tokenizer.encode("cat", allow_special=True)
    for text in ("\nsaid", "\n\nsaid", "said", " said"):
        ids = tokenizer.encode(text, allow_special=True, after=cat[-1])
        assert tokenizer.decode([*cat, *ids], skip_special=True) == "cat" + text
    behind_word = tokenizer.encode("cat", allow_special=True, after=tokenizer.control_tokens["<word>"])
    assert behind_word == cat


def test_a_continuation_keeps_its_first_space_and_a_beginning_does_not(byte_fallback_dir):
    tokenizer = Tokenizer.from_dir(byte_fallback_dir)
    once, upon = tokenizer.encode("Once", allow_special=True), tokenizer.encode("upon", allow_special=True)
    assert tokenizer.decode(upon, skip_special=True) == "upon"
    assert tokenizer.decode(upon, skip_special=True, after=once[-1]) == " upon"
    user = tokenizer.control_tokens["<|user|>"]
    assert tokenizer.decode(upon, skip_special=True, after=user) == "upon"  # encoding puts a space there too
    assert tokenizer.encode("upon", allow_special=True, after=user) == upon


def test_the_fingerprint_is_stable_and_sees_every_file(byte_level_dir):
    definition = (byte_level_dir / "tokenizer.json").read_text()
    config = json.loads((byte_level_dir / "tokenizer_config.json").read_text())
    print_of = Tokenizer.from_dir(byte_level_dir).fingerprint
    assert Tokenizer(definition, config, None).fingerprint == print_of
    others = [
        Tokenizer(definition, config, "{{ messages }}"),
        Tokenizer(definition, config | {"bos_token": "</s>"}, None),
        Tokenizer(definition.replace('"<table>"', '"<frame>"'), config, None),
    ]
    assert len({print_of, *(other.fingerprint for other in others)}) == 4


def test_names_and_sizes_come_from_the_folder(byte_level_dir):
    tokenizer = Tokenizer.from_dir(byte_level_dir)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|im_end|>")
    assert tokenizer.named_tokens.keys() == {"bos_token", "eos_token"}
    assert tokenizer.vocab_size == 403


def test_a_token_that_the_config_names_is_special_whatever_its_flag(byte_level_dir):
    definition = (byte_level_dir / "tokenizer.json").read_text()
    plain, named = Tokenizer(definition, {}, None), Tokenizer(definition, {"eos_token": "<table>"}, None)
    [table] = plain.encode("<table>", allow_special=False)
    assert table not in plain.special_ids and table in named.special_ids


def test_a_plain_prompt_gets_the_prefix_that_the_tokenizer_itself_puts(byte_level_dir):
    backend = tokenizers.Tokenizer.from_file(str(byte_level_dir / "tokenizer.json"))
    assert Tokenizer(backend.to_str(), {}, None).prompt_prefix_ids == []
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert Tokenizer(backend.to_str(), {}, None).prompt_prefix_ids == [0]


def test_a_limit_stored_in_the_file_never_cuts_a_text(byte_level_dir):
    definition = json.loads((byte_level_dir / "tokenizer.json").read_text())
    definition["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer = Tokenizer(json.dumps(definition), {}, None)
    text = "the cat in the house by the sea"
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True), skip_special=True) == text


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        (None, None),
    ],
)
def test_the_template_is_found_in_every_form_of_the_config(byte_level_dir, tmp_path, entry, expected):
    folder = copy_of(byte_level_dir, tmp_path, {"chat_template": entry})
    assert Tokenizer.from_dir(folder).chat_template == expected
    (folder / "chat_template.jinja").write_text("from its own file")
    assert Tokenizer.from_dir(folder).chat_template == "from its own file"


def test_a_folder_without_config_has_no_template_and_no_named_tokens(byte_level_dir, tmp_path):
    folder = copy_of(byte_level_dir, tmp_path, None)
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.chat_template is None and tokenizer.named_tokens == {}


def test_a_folder_that_cannot_be_used_is_refused_with_file_and_remedy(byte_level_dir, tmp_path):
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json is missing.*save_pretrained"):
        Tokenizer.from_dir(tmp_path / "nowhere")

    folder = copy_of(byte_level_dir, tmp_path, None)
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json cannot be read.*fetch the file again"):
        Tokenizer.from_dir(folder)
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json cannot be read.*fetch the file again"):
        Tokenizer.from_dir(folder)

    for broken in ("{", "[1]"):
        folder = copy_of(byte_level_dir, tmp_path, None)
        (folder / "tokenizer_config.json").write_text(broken)
        with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json cannot be read"):
            Tokenizer.from_dir(folder)


@pytest.mark.parametrize(
    ("decoder", "named"),
    [(tokenizers.decoders.WordPiece(), "its decoder is WordPiece"), (None, "is missing")],
)
def test_a_tokenizer_of_another_kind_is_refused_by_name(byte_level_dir, tmp_path, decoder, named):
    backend = tokenizers.Tokenizer.from_file(str(byte_level_dir / "tokenizer.json"))
    backend.decoder = decoder
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ModelFolderError, match=f"not supported: its decoder {named.removeprefix('its decoder ')}"
    ):
        Tokenizer.from_dir(tmp_path)


def copy_of(source: Path, target: Path, config: dict | None) -> Path:
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    if config is not None:
        (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def swallowing(byte_level_dir: Path) -> Tokenizer:
    """Has control tokens that take the white space beside them into themselves."""
    backend = tokenizers.Tokenizer.from_file(str(byte_level_dir / "tokenizer.json"))
    backend.add_special_tokens(
        [
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("<both>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("<none>", normalized=False),
        ]
    )
    return Tokenizer(backend.to_str(), {}, None)


@given(
    pieces=st.lists(st.sampled_from([" ", "\n", "a", "<left>", "<right>", "<both>", "<none>"]), max_size=9)
)
@PROPERTY
def test_a_text_as_spelled_is_what_its_ids_spell(swallowing, pieces):
    text = "".join(pieces)
    ids = swallowing.encode(text, allow_special=True)
    assert swallowing.as_spelled(text, allow_special=True) == swallowing.decode(ids, skip_special=False)
