"""What a command needs to talk to a server: the caller's token, whom to trust, words when nobody answers."""

from argparse import Namespace
from pathlib import Path


class UsageError(Exception):
    """An argument that cannot work."""


def credentials(chosen: Namespace) -> tuple[str | None, Path | bool]:
    """The `token` and the `tls` of a client, by the arguments token_file and tls_ca.  Raises UsageError."""
    return _token(chosen.token_file), authorities(chosen)


def authorities(chosen: Namespace) -> Path | bool:
    """The `tls` of a client, by the argument tls_ca.  Raises UsageError."""
    path: Path | None = chosen.tls_ca
    if path is not None and not path.is_file():
        raise UsageError(f"there is no file {path}; --tls-ca takes a certificate authority in PEM format")
    return path or False


def nobody_answers(why: object, address: str | None = None) -> str:
    """Instead of what gRPC says at length about a connection that it could not make, or has lost."""
    who = f"no server answers at {address}" if address else "the server does not answer"
    return who if "Connection refused" in str(why) else f"{who} ({why})"


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
