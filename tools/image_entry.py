"""What the image starts: `continuo serve`, with a token made when none is given.

Its arguments are those of `serve`.  The token is kept beside the conversations, as `tokens` for the server
and as `token` for a client, so it is still right after a restart; no log shows it.
"""

import os
import secrets
import shlex
import socket
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from tools.cli import data_dir

LISTEN = "0.0.0.0:50051"


def main(arguments: Sequence[str]) -> None:
    try:
        serve = serve_arguments(arguments)
    except OSError as error:
        sys.exit(
            f"error: no token can be kept: {error}; mount a volume that this user may write, or --token-file"
        )
    os.execv(sys.executable, [sys.executable, "-m", "tools.cli", "serve", *serve])


def serve_arguments(arguments: Sequence[str]) -> list[str]:
    """Of `serve`, for these of the image.  Makes the token and tells how to use it.  Raises OSError."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--listen", "--token-file", "--tls-cert", "--data-dir"):
        parser.add_argument(flag)
    chosen, _ = parser.parse_known_args(arguments)
    added: list[str] = []
    if chosen.listen is None:
        added += ["--listen", LISTEN]
    if chosen.tls_cert is None:
        added += ["--insecure"]
    if chosen.token_file is None and not {"-h", "--help"} & set(arguments):
        folder = data_dir(chosen.data_dir) or Path.home()
        added += ["--token-file", str(make_token(folder))]
        port = (chosen.listen or LISTEN).rpartition(":")[2]
        print(how_to_chat(folder / "token", port, chosen.tls_cert is not None), file=sys.stderr, flush=True)
    return [*added, *arguments]


def make_token(folder: Path) -> Path:
    """The server's token file in `folder`; an earlier one is kept.  Both files are for their owner alone."""
    tokens, token = folder / "tokens", folder / "token"
    if not tokens.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        secret = secrets.token_hex(24)
        _write(token, f"{secret}\n")
        _write(tokens, f"local {secret} admin\n")
    return tokens


def how_to_chat(token: Path, port: str, has_tls: bool) -> str:
    """Lines to paste on the machine that runs the container, whose name is the host's in here."""
    read = f"docker exec {shlex.quote(socket.gethostname())} cat {shlex.quote(str(token))}"
    tls = " --tls-ca CA.pem" if has_tls else ""
    return (
        "To chat:\n"
        f"  (umask 077; {read} >continuo.token)\n"
        f"  continuo chat --server localhost:{port} --token-file continuo.token{tls}"
    )


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
