"""Types of command line values: text in, value out, or ArgumentTypeError with what to write instead."""

import json
import math
import re
from argparse import ArgumentTypeError
from pathlib import Path

BUNDLED_MODEL = Path(__file__).resolve().parent / "demo_model" / "model"
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def model_folder(text: str) -> Path:
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path == BUNDLED_MODEL:
        raise ArgumentTypeError(f"the bundled model is missing: {path}; pass a folder")
    if path.exists():
        raise ArgumentTypeError(f"{text} is not a folder; pass the folder that holds its config.json")
    raise ArgumentTypeError(f"there is no folder {text}; pass a folder in Hugging Face format")


def model(text: str) -> Path | str:
    """A folder, or a hub id as a str: what has the form org/name and is not here."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) and not Path(text).exists():
        return text
    return model_folder(text)


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def some_seconds(text: str) -> float:
    value = seconds(text)
    if value == 0:
        raise ArgumentTypeError(f"{text!r} seconds are no time at all; give it more than 0")
    return value


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text!r} is not a share; give a number from 0 to 1")
    return value


def memory(text: str) -> int:
    """Bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-zA-Z]*)", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ArgumentTypeError(f"{text!r} is not a size; write 512MiB, 4GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def some_text(text: str) -> str:
    if not text:
        raise ArgumentTypeError("the text is empty")
    return text


def token_ids(text: str) -> tuple[int, ...]:
    try:
        ids = json.loads(text)
    except ValueError:
        ids = None
    if not (isinstance(ids, list) and ids and all(type(id) is int and id >= 0 for id in ids)):
        raise ArgumentTypeError(f"{text[:60]!r} is not a JSON list of token ids like [1,2,3]")
    return tuple(ids)
