"""JSON files of a model folder, every access checked: what is absent or of the wrong kind is named."""

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelFolderError


class Fields:
    """One JSON object of `path`.  A null counts as absent; an absent key without a default is an error."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self._values = path, values

    @classmethod
    def read(cls, path: Path) -> "Fields":
        """Raises ModelFolderError if the file is absent, unreadable, or not a JSON object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelFolderError(
                f"{path.parent} has no {path.name}; a model folder in Hugging Face format holds config.json, "
                f"tokenizer.json and *.safetensors"
            ) from None
        except OSError as error:
            raise ModelFolderError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
            raise ModelFolderError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ModelFolderError(f"{path} holds a {type(values).__name__}; a JSON object was expected")
        return cls(path, values)

    def value(self, key: str) -> Any:
        """As it stands; None if absent."""
        return self._values.get(key)

    def has(self, key: str) -> bool:
        """Whether the key is there, be it as a null."""
        return key in self._values

    def integer(self, key: str, default: int | None = None, at_least: int = 1) -> int:
        value = self._present(key, default)
        if type(value) is not int or value < at_least:
            raise self.wrong(key, f"an integer, {at_least} or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._present(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.wrong(key, "a positive number")
        return float(value)

    def number_or_none(self, key: str, default: float | None) -> float | None:
        """A positive number, or None.  Here a null is no absent key: it says None, whatever the default."""
        return None if self._says_none(key, default) else self.number(key, default)

    def integer_or_none(self, key: str, default: int | None) -> int | None:
        """The same for an integer, 1 or more."""
        return None if self._says_none(key, default) else self.integer(key, default)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._present(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def ids(self, key: str) -> frozenset[int]:
        """A token id or a list of them; empty if absent."""
        value = self.value(key)
        if value is None:
            return frozenset()
        listed = value if isinstance(value, list) else [value]
        if not all(type(one) is int and one >= 0 for one in listed):
            raise self.wrong(key, "a token id or a list of token ids")
        return frozenset(listed)

    def group(self, key: str) -> "Fields":
        """A nested object; empty if absent."""
        value = self.value(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(self.path, value or {})

    def wrong(self, key: str, expected: str) -> ModelFolderError:
        return ModelFolderError(f"{self.path}: {key} is {self.value(key)!r}; expected {expected}")

    def _says_none(self, key: str, default: float | None) -> bool:
        return self.value(key) is None and (default is None or self.has(key))

    def _present(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelFolderError(f"{self.path} lacks {key}")
        return value
