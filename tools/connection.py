"""The server that a command talks to: its address, the caller's token, the authorities to trust."""

import argparse
from pathlib import Path

from rpc.client import ContinuoClient


class UsageError(Exception):
    """An argument that cannot work."""


def client_of(chosen: argparse.Namespace) -> ContinuoClient:
    """By `server`, `token_file` and `tls_ca`.  Raises UsageError; connects when it is first used."""
    return ContinuoClient(
        chosen.server, token=_token(chosen.token_file), tls=_readable(chosen.tls_ca) or False, retry=False
    )


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the token file {path} cannot be read: {error}") from error
    if len(token.split()) != 1:
        raise UsageError(f"the token file {path} should hold one token and nothing else")
    return token


def _readable(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise UsageError(f"there is no file {path}; --tls-ca takes a certificate authority in PEM format")
    return path
