"""The safetensors files of a model folder: every tensor by name, mapped rather than read.

A mapped tensor costs file-backed pages, which the system can drop and fetch again; nothing is copied until a
caller converts or packs.  Names and shapes are checked against the model before a single weight is touched.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import ModelFolderError
from engine.models.fields import Fields

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")
_NAMED_AT_MOST = 5  # tensors in one message

Shape = tuple[int, ...]


class Checkpoint:
    """Opens every shard of `folder`.  Raises ModelFolderError: no weights, pickle weights, a damaged file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, Any] = {}  # file name -> open safetensors file (which is not typed)
        self._file_of: dict[str, str] = {}  # tensor name -> file name
        for file in _weight_files(folder):
            self._shards[file] = _open(folder / file)
            for name in self._shards[file].keys():  # noqa: SIM118  (not a dict)
                if name in self._file_of:
                    raise ModelFolderError(
                        f"{folder}: {name} is in {self._file_of[name]} and again in {file}"
                    )
                self._file_of[name] = file

    def check(self, expected: Mapping[str, Shape], ignored: Collection[str]) -> None:
        """Every expected tensor is there in its shape, nothing else but `ignored`, or ModelFolderError."""
        missing = [name for name in expected if name not in self._file_of]
        if missing:
            raise ModelFolderError(f"{self._folder} lacks {_some(missing)}, which config.json calls for")
        left_over = [name for name in self._file_of if name not in expected and name not in ignored]
        if left_over:
            raise ModelFolderError(
                f"{self._folder / self._file_of[left_over[0]]} holds {_some(left_over)}, for which the model "
                f"described by config.json has no place"
            )
        for name, shape in expected.items():
            file = self._file_of[name]
            header = self._shards[file].get_slice(name)
            found = tuple(header.get_shape())
            if found != shape:
                raise ModelFolderError(
                    f"{self._folder / file}: {name} has shape {list(found)}; "
                    f"config.json calls for {list(shape)}"
                )
            if header.get_dtype() not in _FLOATS:
                raise ModelFolderError(
                    f"{self._folder / file}: {name} is stored as {header.get_dtype()}; "
                    f"supported are {', '.join(_FLOATS)}"
                )

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def tensor(self, name: str) -> Tensor:
        """In the dtype of the file, mapped: valid while it is held, also after the checkpoint is gone."""
        tensor: Tensor = self._shards[self._file_of[name]].get_tensor(name)
        return tensor


def _weight_files(folder: Path) -> list[str]:
    if (folder / _SINGLE).exists():
        return [_SINGLE]
    if (folder / _INDEX).exists():
        index = Fields.read(folder / _INDEX)
        weight_map = index.value("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise index.wrong("weight_map", "an object: tensor name -> file name")
        files = sorted({str(file) for file in weight_map.values()})
        for file in files:
            if Path(file).name != file:
                raise ModelFolderError(f"{folder / _INDEX} names {file!r}; shards lie beside the index")
            if not (folder / file).exists():
                raise ModelFolderError(f"{folder} lacks {file}, which {_INDEX} names; download it again")
        return files
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise ModelFolderError(
            f"{folder} holds its weights as {pickled[0]}, a pickle: loading one can run any code, so it is "
            f"refused; convert it to safetensors or use a folder that has them"
        )
    raise ModelFolderError(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(
            f"{path} ({path.stat().st_size} bytes) is damaged or incomplete: {error}; download it again"
        ) from None


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED_AT_MOST])
    return shown if len(names) <= _NAMED_AT_MOST else f"{shown} and {len(names) - _NAMED_AT_MOST} more"
