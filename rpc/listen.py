"""What may be exposed how: loopback as it is; anything else with tokens and TLS, or with `--insecure`."""

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from engine.errors import ConfigError
from rpc.auth import Authenticator

MAX_MESSAGE_BYTES = 64 * 2**20  # a first turn may carry a whole document; gRPC's own default is 4 MiB


@dataclass(frozen=True, slots=True)
class ServerOptions:
    listen: str = "127.0.0.1:50051"  # HOST:PORT; port 0 = any free one
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    max_message_bytes: int = MAX_MESSAGE_BYTES
    drain_grace_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        host, colon, port = text.rpartition(":")
        if not (colon and host and port.isdecimal() and int(port) < 65536):
            raise ConfigError(f"cannot listen on {text!r}; give HOST:PORT, for example 127.0.0.1:50051")
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            raise ConfigError(f"cannot listen on {text!r}; an IPv6 address stands in brackets: [::1]:50051")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it.  A name other than localhost might resolve to anything."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def check_exposure(options: ServerOptions) -> Address:
    """Where to listen.  Raises `ConfigError` if the options would expose conversations unprotected."""
    address = Address.parse(options.listen)
    if (options.tls_cert is None) != (options.tls_key is None):
        given, missing = ("--tls-cert", "--tls-key") if options.tls_cert else ("--tls-key", "--tls-cert")
        raise ConfigError(f"{given} was given without {missing}; TLS needs both")
    needed = {"--token-file": options.token_file, "--tls-cert and --tls-key": options.tls_cert}
    absent = [name for name, given in needed.items() if given is None]
    if absent and not (address.is_loopback or options.insecure):
        raise ConfigError(
            f"{address} can be reached from other machines; add {' and '.join(absent)}, "
            "listen on 127.0.0.1, or accept the risk with --insecure"
        )
    return address


def authenticator(options: ServerOptions, address: Address) -> Authenticator:
    """Without a token file every caller is the tenant `local`, who is admin only on loopback."""
    if options.token_file is not None:
        return Authenticator.of_file(options.token_file)
    return Authenticator.without_tokens(admin=address.is_loopback)


def tls_credentials(options: ServerOptions) -> grpc.ServerCredentials | None:
    if options.tls_cert is None or options.tls_key is None:
        return None
    try:
        # Python says what is wrong with the files; gRPC would only fail to bind.
        checked = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        checked.load_cert_chain(options.tls_cert, options.tls_key, _no_password)
        pair = options.tls_key.read_bytes(), options.tls_cert.read_bytes()
    except OSError as error:  # SSLError is one
        raise ConfigError(f"{options.tls_cert} and {options.tls_key} do not work for TLS: {error}") from error
    return grpc.ssl_server_credentials([pair])


def _no_password() -> str:
    """For an encrypted key: fails, where the default would ask on the terminal."""
    return ""
