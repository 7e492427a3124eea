"""Two tiny tokenizers of the kinds that we support, trained here, and templates of the kinds that exist.

`CONTINUO_TEST_DATA` names a folder of published tokenizers, templates and dialogues (`test_published.py`).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.types import RewritePolicy
from tests.text.telling import Story, Telling

SPECIMENS = Path(__file__).parent / "specimens"
CORPUS = [
    "Once upon a time a small cat called Miso lived in a house by the sea, and she said hello to the sea.",
    "The weather in Zürich is fine; naïve café owners sell 12 cups at 3.50 each, don't they?",
    "def answer(x):\n    return x + 42\n\nprint(answer(1))",
    "你好，世界。你好，小猫。",
    "I'm glad you asked: the house by the sea is small, the cat in the house is called Miso.",
]
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def train_byte_level(path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=alphabet,
            special_tokens=["<s>", "</s>", *SPECIAL],
            show_progress=False,
        ),
    )
    backend.add_tokens(["<think>", "</think>", "<table>"])
    backend.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "unk_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def train_byte_fallback(path: Path) -> None:
    """SentencePiece-style: spaces become U+2581, one is put in front, unknown characters become bytes."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizer
    ascii_corpus = [text for text in CORPUS if text.isascii()]
    trained.train_from_iterator(
        ascii_corpus, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in model["vocab"] if piece != "<unk>" and "\n" not in piece]
    merges = [tuple(pair) for pair in model["merges"] if not any("\n" in piece for piece in pair)]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    backend.add_special_tokens(
        [AddedToken(text, rstrip=True, normalized=False) for text in [*roles, *SPECIAL]]
    )
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("byte_level")
    train_byte_level(path)
    return path


@pytest.fixture(scope="session")
def byte_fallback_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("byte_fallback")
    train_byte_fallback(path)
    return path


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback"])
def kind_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of each kind of tokenizer in turn."""
    path: Path = request.getfixturevalue(f"{request.param}_dir")
    return path


@pytest.fixture(scope="session")
def tokenizer(kind_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(kind_dir)


@pytest.fixture(scope="session")
def library(kind_dir: Path) -> tokenizers.Tokenizer:
    """The `tokenizers` library's own view of the same folder."""
    return tokenizers.Tokenizer.from_file(str(kind_dir / "tokenizer.json"))


Speak = Callable[..., tuple[Tokenizer, ChatTemplate]]


@pytest.fixture(scope="session")
def speak(byte_level_dir: Path, byte_fallback_dir: Path) -> Speak:
    """`speak("ordinary")`: the byte-level tokenizer with that template; `kind` chooses the other one."""
    folders = {"byte_level": byte_level_dir, "byte_fallback": byte_fallback_dir}

    def make(name: str, kind: str = "byte_level") -> tuple[Tokenizer, ChatTemplate]:
        folder = folders[kind]
        config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
        source = (SPECIMENS / f"{name}.jinja").read_text()
        tokenizer = Tokenizer((folder / "tokenizer.json").read_text(), config, source)
        return tokenizer, ChatTemplate(tokenizer)

    return make


Tell = Callable[..., Telling]


@pytest.fixture
def tell(speak: Speak, byte_level_dir: Path) -> Iterator[Tell]:
    """`tell(story)`: the conversation before its first turn."""
    tellings: list[Telling] = []

    def make(story: Story, policy: RewritePolicy = RewritePolicy.KEEP) -> Telling:
        tokenizer, _ = speak(story.template)
        tellings.append(Telling(tokenizer, byte_level_dir / "tokenizer.json", story, policy))
        return tellings[-1]

    yield make
    for telling in tellings:
        telling.service.close()
