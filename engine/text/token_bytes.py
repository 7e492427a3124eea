"""Which bytes a token stands for.

Both supported kinds of tokenizer decode token by token: the text of a run of ids is the UTF-8 of the joined
bytes. That makes streaming exact and cheap: no token is ever decoded twice, whatever the split.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SPACE_MARK = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True, slots=True)
class DecodeRule:
    """How the `decoder` of a tokenizer.json reads tokens: `spells` gives the bytes of a token."""

    spells: Callable[[str], bytes]
    drops_first_space: bool  # the first token of a text carries a space that was never written


def decode_rule(decoder: Mapping[str, Any] | None) -> DecodeRule:
    """The rule that `decoder` describes.  Raises ValueError if it is of neither supported kind."""
    steps = _flatten(decoder)
    names = [str(step.get("type")) for step in steps]
    if names == ["ByteLevel"]:
        return DecodeRule(_byte_level, drops_first_space=False)
    replaces_marks = any(
        step.get("type") == "Replace"
        and step.get("pattern") == {"String": SPACE_MARK}
        and step.get("content") == " "
        for step in steps
    )
    strips = [step for step in steps if step.get("type") == "Strip"]
    one_space = all((s.get("content"), s.get("start"), s.get("stop")) == (" ", 1, 0) for s in strips)
    if (
        replaces_marks
        and one_space
        and [n for n in names if n != "Strip"] == ["Replace", "ByteFallback", "Fuse"]
    ):
        return DecodeRule(_byte_fallback, drops_first_space=bool(strips))
    raise ValueError(f"its decoder is {' + '.join(names) or 'missing'}")


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flatten(inner)]


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE spells a byte as one visible character: itself if printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # a character outside the alphabet: the token is literal text
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:  # looks like a byte and is not one
            pass
    return token.replace(SPACE_MARK, " ").encode()
