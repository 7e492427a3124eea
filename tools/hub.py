"""Models by their hub id: `org/name` becomes a folder in the cache that all tools of the Hugging Face Hub
share.

Only what is read is fetched: configuration, tokenizer, template and safetensors.  Whether the model can be
served, and whether the disk has room for it, is known before the first weight comes.  A connection that
breaks is taken up where it broke; started again, files that are whole are kept.  The hub's address, token and
cache are where its other tools have them: HF_ENDPOINT, HF_TOKEN, HF_HOME.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from engine.models.config import ModelConfig

log = logging.getLogger(__name__)

_SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_DESCRIPTION = (*_SETTINGS, "chat_template.jinja", "model.safetensors.index.json")
_WEIGHTS = ("model.safetensors", "model-*.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LOOK_UP_S = 10.0


class HubError(Exception):
    """The model cannot be had from the hub; says why and what to do."""


def resolve_model(
    model: Path | str,
    revision: str | None = None,
    offline: bool = False,
    *,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
    free_bytes: Callable[[Path], int] | None = None,
) -> Path:
    """The folder of `model`: a Path as it is, the hub id in a str once its files are here.

    `revision` is a branch, tag or commit.  `offline` takes what is here and asks nobody.  Raises HubError, or
    ModelFolderError if the model is of a kind that is not served.
    """
    if isinstance(model, Path):
        return model
    hub = _Hub(
        model,
        revision or constants.DEFAULT_REVISION,
        endpoint or constants.ENDPOINT,
        cache_dir or Path(constants.HF_HUB_CACHE),
    )
    if offline or is_offline_mode():
        return hub.cached()
    with hub.explained_errors():
        try:
            listing = hub.listing()
        except httpx2.TransportError as error:
            return hub.cached_because_unreachable(error)
        return hub.fetch(listing, free_bytes or _free_bytes)


@dataclass(frozen=True)
class _Listing:
    """What a repository holds at a commit."""

    commit: str
    sizes: dict[str, int]  # file name -> bytes

    def matching(self, *patterns: str) -> list[str]:
        return [name for name in self.sizes if any(fnmatch(name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class _Hub:
    """One model at one revision, on one hub, with one cache."""

    id: str
    revision: str
    endpoint: str
    cache_dir: Path

    def listing(self) -> _Listing:
        info = HfApi(self.endpoint).model_info(
            self.id, revision=self.revision, files_metadata=True, timeout=_LOOK_UP_S
        )
        assert info.sha is not None and info.siblings is not None
        return _Listing(info.sha, {file.rfilename: file.size or 0 for file in info.siblings})

    def fetch(self, listing: _Listing, free_bytes: Callable[[Path], int]) -> Path:
        """Downloads what is not here yet."""
        self._check_content(listing)
        absent = self._absent(listing)
        if absent:
            # Its description first: that alone tells whether this kind of model is served.
            ModelConfig.from_dir(self._download(_DESCRIPTION))
            absent = self._absent(listing)
            self._check_disk(sum(listing.sizes[name] for name in absent), free_bytes)
        if not absent:
            return self._download((*_DESCRIPTION, *_WEIGHTS))
        size = _size(sum(listing.sizes[name] for name in absent))
        log.info("downloading %s, %s in %d files, to %s", self.id, size, len(absent), self.cache_dir)
        begin = time.monotonic()
        folder = self._download((*_DESCRIPTION, *_WEIGHTS))
        log.info("downloaded %s in %.0f s", self.id, time.monotonic() - begin)
        return folder

    def cached(self) -> Path:
        """What an earlier download left here; asks nobody."""
        try:
            return self._download((*_DESCRIPTION, *_WEIGHTS), local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            flag = "" if self.revision == constants.DEFAULT_REVISION else f" --revision {self.revision}"
            raise HubError(
                f"{self.id} at revision {self.revision} is not, or not wholly, in {self.cache_dir}, and "
                f"--offline asks nobody; fetch it once with the network: continuo serve {self.id}{flag}"
            ) from None

    def cached_because_unreachable(self, error: Exception) -> Path:
        try:
            folder = self.cached()
        except HubError:
            raise HubError(
                f"{self.endpoint} cannot be reached ({_first_line(error)}), and {self.id} is not in "
                f"{self.cache_dir}; check the network and any proxy, or pass a folder"
            ) from None
        log.warning("%s cannot be reached; serving the copy of %s that is here", self.endpoint, self.id)
        return folder

    def _download(self, patterns: tuple[str, ...], local_files_only: bool = False) -> Path:
        bars: list[tqdm] = []

        class Bar(tqdm):
            """Of bytes alone, gone at the end; the library would show three and leave two of them open."""

            def __init__(self, *values: Any, **settings: Any) -> None:
                if settings.get("name") != "huggingface_hub.snapshot_download":
                    settings["disable"] = True
                super().__init__(*values, **settings | {"desc": "downloading", "leave": False})
                bars.append(self)

        try:
            folder = snapshot_download(
                self.id,
                revision=self.revision,
                allow_patterns=list(patterns),
                endpoint=self.endpoint,
                cache_dir=self.cache_dir,
                local_files_only=local_files_only,
                tqdm_class=Bar,
            )
        finally:
            for bar in bars:
                bar.close()
        return Path(folder)

    def _check_content(self, listing: _Listing) -> None:
        if listing.matching(*_WEIGHTS):
            return
        place = f"{self.endpoint}/{self.id}"
        if pickles := listing.matching(*_PICKLES):
            raise HubError(
                f"{place} has its weights as {pickles[0]} only, a pickle: loading one can run any code, so "
                "it is not even downloaded; use a repository with model.safetensors, or convert it"
            )
        held = ", ".join(list(listing.sizes)[:5]) or "nothing"
        raise HubError(f"{place} has no model.safetensors, so there is nothing to serve; it holds {held}")

    def _absent(self, listing: _Listing) -> list[str]:
        return [
            name
            for name in listing.matching(*_DESCRIPTION, *_WEIGHTS)
            if not isinstance(
                try_to_load_from_cache(self.id, name, cache_dir=self.cache_dir, revision=listing.commit), str
            )
        ]

    def _check_disk(self, needed: int, free_bytes: Callable[[Path], int]) -> None:
        free = free_bytes(self.cache_dir)
        if needed > free:
            raise HubError(
                f"{self.id} needs {_size(needed)} more in {self.cache_dir}, whose disk has {_size(free)} "
                "free; make room, or set HF_HOME to a folder on another disk"
            )

    @contextmanager
    def explained_errors(self) -> Iterator[None]:
        """What the hub's library raises, as HubError."""
        place = f"{self.endpoint}/{self.id}"
        try:
            yield
        except GatedRepoError:
            raise HubError(
                f"{self.id} is gated: accept its conditions at {place}, set HF_TOKEN to a token of the "
                f"account that did ({self.endpoint}/settings/tokens), and run this again"
            ) from None
        except RevisionNotFoundError:
            raise HubError(
                f"{place} has no revision {self.revision}; leave --revision out for main"
            ) from None
        except RepositoryNotFoundError:
            raise HubError(
                f"there is no model {self.id} at {self.endpoint}, or it is private; check the spelling, set "
                f"HF_TOKEN if it is private, or write ./{self.id} for a folder"
            ) from None
        except HFValidationError as error:
            raise HubError(f"{self.id!r} is no hub id: {_first_line(error)}") from None
        except LocalEntryNotFoundError as error:  # a connection that was lost between two files
            raise HubError(f"{self._interrupted} ({_first_line(error.__cause__ or error)})") from None
        except HfHubHTTPError as error:
            answer = f"{error.response.status_code} {error.response.reason_phrase}"
            raise HubError(f"{place} answered {answer}; try again later, or with --offline") from None
        except (httpx2.HTTPError, OSError) as error:
            raise HubError(f"{self._interrupted} ({_first_line(error)})") from None

    @property
    def _interrupted(self) -> str:
        return f"the download of {self.id} broke off; run this again, whole files are kept"


def _free_bytes(folder: Path) -> int:
    """On the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
