"""What a command needs to talk to a server: the caller's token, whom to trust, words when nobody answers."""

import ssl
from argparse import Namespace
from pathlib import Path

_ADVICE = {
    "Socket closed": "if it speaks TLS, add --tls-ca FILE",
    "handshake failed": "--tls-ca FILE must hold the authority that signed its certificate",
}


class UsageError(Exception):
    """An argument that cannot work."""


def credentials(chosen: Namespace) -> tuple[str | None, Path | bool]:
    """The `token` and the `tls` of a client, by the arguments token_file and tls_ca.  Raises UsageError."""
    return _token(chosen.token_file), authorities(chosen)


def authorities(chosen: Namespace) -> Path | bool:
    """The `tls` of a client, by the argument tls_ca.  Raises UsageError."""
    path: Path | None = chosen.tls_ca
    if path is None:
        return False
    if not path.is_file():
        raise UsageError(f"there is no file {path}; --tls-ca takes a certificate authority in PEM format")
    try:
        ssl.create_default_context(cafile=path)  # gRPC would only fail to connect
    except ssl.SSLError:
        raise UsageError(f"{path} is no certificate authority in PEM format; --tls-ca takes one") from None
    return path


def nobody_answers(why: object, address: str, start: str = "start one with 'continuo serve'") -> str:
    """What to make of gRPC's long words about a connection that it could not make, or has lost."""
    reason = str(why)
    if "Connection refused" in reason:
        return f"no server answers at {address}; {start}"
    advice = next((f"; {advice}" for sign, advice in _ADVICE.items() if sign in reason), "")
    return f"no server answers at {address} ({reason}){advice}"


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
