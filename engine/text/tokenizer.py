"""A model folder's tokenizer: text to ids, ids to text, special tokens, and the source of the chat template.

Encoding is the `tokenizers` library's, by the one call that releases the interpreter lock (`encode` keeps
it: a 60 KB text would stop every other thread for 60 ms).  Decoding joins the bytes of the tokens
(`token_bytes.py`), so one-shot and streamed text agree for every split.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers

from engine.errors import InvalidRequest, ModelFolderError
from engine.text.marks import OF_REPLIES
from engine.text.token_bytes import decode_rule

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text and ids of one model.  Threads may share it.

    `special_ids` are the tokens that the tokenizer's files call special.  `control_tokens` (text -> id) are
    those plus the tags that the chat template itself writes: what the content of a message must never become;
    `lookalike` finds their texts, `lookalike_in_reply` all but the marks of reasoning and tool calls.
    `prompt_prefix_ids` (a BOS, or nothing) go before a prompt in plain text; a chat template writes its own.
    `fingerprint` changes with anything that changes the ids of a text.
    """

    def __init__(self, definition: str, config: Mapping[str, Any], chat_template: str | None) -> None:
        """`definition` is the content of tokenizer.json; raises ValueError if its kind is not supported."""
        self._backend = tokenizers.Tokenizer.from_str(definition)
        self._backend.no_truncation()
        self._backend.no_padding()
        decoder = self._backend.decoder
        rule = decode_rule(None if decoder is None else json.loads(decoder.__getstate__()))
        self._spells, self._drops_first_space = rule.spells, rule.drops_first_space
        self._bytes: dict[int, bytes] = {}
        added = self._backend.get_added_tokens_decoder()
        self._added: dict[int, str] = {id: token.content for id, token in added.items()}

        self._swallows_left = frozenset(token.content for token in added.values() if token.lstrip)
        self._swallows_right = frozenset(token.content for token in added.values() if token.rstrip)
        swallow = self._swallows_left | self._swallows_right
        self._swallowing = _any_of(swallow) if swallow else None
        self._unicode_forms = _unicode_forms(json.loads(definition).get("normalizer"))

        self.chat_template = chat_template
        self.named_tokens = {name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name)))}
        self.bos_token = self.named_tokens.get("bos_token")
        self.eos_token = self.named_tokens.get("eos_token")
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        names = set(self.named_tokens.values())
        special = {
            token.content: id for id, token in added.items() if token.special or token.content in names
        }
        tags = {
            text: id for id, text in self._added.items() if _is_tag(text) and text in (chat_template or "")
        }
        self.special_ids = frozenset(special.values())
        self.control_tokens = special | tags
        self.lookalike = _any_of(self.control_tokens)
        self.lookalike_in_reply = _any_of(self.control_tokens.keys() - OF_REPLIES)
        self._control_ids = frozenset(self.control_tokens.values())
        self.prompt_prefix_ids = _prefix_ids(self._backend)
        identity = json.dumps([definition, chat_template, self.named_tokens], sort_keys=True)
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    @classmethod
    def from_dir(cls, path: Path | str) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja (the last two may be absent).

        Raises ModelFolderError naming the file that is missing, corrupt or of a kind that is not supported.
        """
        file = Path(path) / "tokenizer.json"
        definition = _read(file)
        if definition is None:
            raise ModelFolderError(
                f"{file} is missing; if the folder has a tokenizer in another format, convert it with"
                f" transformers: AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
            )
        config = _read_config(Path(path) / "tokenizer_config.json")
        template = _read(Path(path) / "chat_template.jinja") or _default_template(config.get("chat_template"))
        try:
            return cls(definition, config, template)
        except ValueError as error:
            raise ModelFolderError(
                f"{file} is not supported: {error}; supported are byte-level BPE and SentencePiece-style"
                " tokenizers with byte fallback"
            ) from error
        except Exception as error:  # the library raises plain Exception for whatever it cannot read
            raise _corrupt(file, error) from error

    def encode(self, text: str, *, allow_special: bool, after: int | None = None) -> list[int]:
        """Ids of `text`; nothing is put before or behind it.

        With `allow_special=False` what looks like a control token is cut behind its first character and stays
        text.  `after` is the id that the text continues from, None at the start of a history: SentencePiece
        adds a space at the start only, and some special tokens swallow the white space that follows them.
        Raises InvalidRequest if the text becomes a control token even so.
        """
        pieces = [text] if allow_special else self._cut_apart(text)
        ids = self._encode_behind(after, pieces)
        if not allow_special and (forged := self._control_ids.intersection(ids)):
            raise InvalidRequest(
                f"the text contains {self._added[min(forged)]!r}, which this model's tokenizer can only read"
                " as a control token; leave it out"
            )
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool, after: int | None = None) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.  `after` as in `encode`."""
        data = b"".join([self.token_bytes(id, skip_special=skip_special) for id in ids])
        if self.drops_space(after):
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def token_bytes(self, id: int, *, skip_special: bool) -> bytes:
        """The bytes that a token stands for; none for ids beyond the vocabulary (models pad theirs)."""
        if skip_special and id in self.special_ids:
            return b""
        data = self._bytes.get(id)
        if data is None:
            data = self._bytes[id] = self._look_up(id)
        return data

    def drops_space(self, after: int | None) -> bool:
        """Whether the first space of a text that follows this id (None: nothing) was added by encoding."""
        if after is None:
            return self._drops_first_space
        return after in self._added and self._adds_space_after_added

    def special_text(self, id: int) -> str | None:
        """The text of a special token, None for any other id."""
        return self._added[id] if id in self.special_ids else None

    @property
    def added_tokens(self) -> dict[str, int]:
        """Tokens that are found in a text before anything else is: text -> id."""
        return {text: id for id, text in self._added.items()}

    def as_spelled(self, text: str, *, allow_special: bool) -> str:
        """The text that the ids of `text` spell: normalised, and without what its control tokens swallow."""
        for form in self._unicode_forms:
            text = unicodedata.normalize(form, text)
        if not allow_special or self._swallowing is None:
            return text
        pieces = self._swallowing.split(text)
        for i in range(1, len(pieces), 2):  # there the tokens are, each between two pieces of other text
            if pieces[i] in self._swallows_left:
                pieces[i - 1] = pieces[i - 1].rstrip()
            if pieces[i] in self._swallows_right:
                pieces[i + 1] = pieces[i + 1].lstrip()
        return "".join(pieces)

    def _look_up(self, id: int) -> bytes:
        token = self._backend.id_to_token(id)
        return b"" if token is None else self._spells(token)

    def _cut_apart(self, text: str) -> list[str]:
        pieces, start = [], 0
        while found := self.lookalike.search(text, start):
            pieces.append(text[start : found.start() + 1])
            start = found.start() + 1
        return [*pieces, text[start:]]

    def _encode_behind(self, after: int | None, pieces: list[str]) -> list[int]:
        """Ids of the pieces, the first as what follows `after`, each other one as what follows plain text.

        A piece is encoded behind an anchor that stands for what precedes it; the anchor's ids are taken off.
        """
        anchors = [_anchor(piece) if self._drops_first_space else "" for piece in pieces]
        if after is None:
            anchors[0] = ""
        elif after in self._added:
            anchors[0] = self._added[after]
        heads = _encode(self._backend, anchors)
        wholes = _encode(self._backend, list(map(str.__add__, anchors, pieces)))
        ids: list[int] = []
        for piece, head, whole in zip(pieces, heads, wholes, strict=True):
            apart = whole[: len(head)] == head  # else the anchor is another token with the piece behind it
            ids += whole[len(head) :] if apart else _encode(self._backend, [piece])[0]
        return ids

    @cached_property
    def _adds_space_after_added(self) -> bool:
        """True for tokenizers that treat the text behind each added token as the start of a text."""
        if not self._drops_first_space:
            return False
        probes = _encode(self._backend, [text + "a" for text in self._added.values()])
        first = next((ids[1] for ids in probes if len(ids) > 1), None)
        return first is not None and self._look_up(first).startswith(b" ")


def _encode(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _anchor(piece: str) -> str:
    """A character that no tokenizer joins with the first one of `piece`."""
    return "a" if piece.startswith("\n") else "\n"


def _prefix_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """What the tokenizer's own post-processing puts before any text."""
    [bare], whole = _encode(backend, ["a"]), backend.encode("a", add_special_tokens=True).ids
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[: next(starts, 0)]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds these texts, the longest first; its only group is the one that was found."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")  # (?!) is never found


def _unicode_forms(normalizer: dict[str, Any] | None) -> list[Literal["NFC", "NFD", "NFKC", "NFKD"]]:
    """The Unicode normal forms that encoding brings a text into, in order."""
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [form for step in normalizer["normalizers"] for form in _unicode_forms(step)]
    return [form for form in ("NFC", "NFD", "NFKC", "NFKD") if normalizer["type"] == form]


def _is_tag(text: str) -> bool:
    return re.fullmatch(r"<\S.*>|\[\S.*\]", text) is not None


def _token_text(entry: object) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its text in `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _default_template(entry: object) -> str | None:
    """`chat_template` is the source itself, or a list of named ones of which `default` is for plain chat."""
    if isinstance(entry, list):
        entry = {named.get("name"): named.get("template") for named in entry}.get("default")
    return entry if isinstance(entry, str) else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _corrupt(path, error) from error


def _read_config(path: Path) -> dict[str, Any]:
    text = _read(path)
    try:
        config = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise _corrupt(path, error) from error
    if not isinstance(config, dict):
        raise _corrupt(path, ValueError("it holds no JSON object"))
    return config


def _corrupt(path: Path, error: Exception) -> ModelFolderError:
    return ModelFolderError(f"{path} cannot be read ({error}); fetch the file again")
