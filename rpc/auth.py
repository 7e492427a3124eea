"""Who is calling.  The tenant comes from the bearer token alone.

`Doorkeeper` is an interceptor, so that nothing is reachable around it: every method of every service,
reflection too, needs a principal.  Only health checks do not, because load balancers have no tokens.
"""

import hashlib
import hmac
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc

from engine.errors import ConfigError, PermissionDenied, Unauthenticated
from engine.types import Tenant
from rpc.status import Context, Continuation, Details, Handler, status_of

MIN_TOKEN_LENGTH = 16
HEALTH = "/grpc.health.v1.Health/"


@dataclass(frozen=True, slots=True)
class Principal:
    tenant: Tenant
    admin: bool

    def require_admin(self, what: str) -> None:
        if not self.admin:
            raise PermissionDenied(f"{what} needs an admin token; {self.tenant} has none")


class Authenticator:
    """Knows the tokens; or has none and takes every caller for `everyone`."""

    def __init__(self, tokens: dict[bytes, Principal], everyone: Principal | None = None) -> None:
        self._digests = tokens  # sha256 of a token -> whose it is
        self._everyone = everyone

    @classmethod
    def of_file(cls, path: Path) -> "Authenticator":
        return cls(read_token_file(path))

    @classmethod
    def without_tokens(cls, *, admin: bool) -> "Authenticator":
        return cls({}, Principal(Tenant("local"), admin))

    def principal(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Principal:
        """Compares with every token, each in constant time, so that timing tells nothing.

        Raises `Unauthenticated`.
        """
        if self._everyone is not None:
            return self._everyone
        sent = [value for key, value in metadata or () if key == "authorization"]
        if not sent:
            raise Unauthenticated("no token was sent; add the metadata 'authorization: Bearer TOKEN'")
        scheme, _, token = str(sent[-1]).partition(" ")
        digest = hashlib.sha256(token.strip().encode()).digest()
        found = [who for known, who in self._digests.items() if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not found:
            raise Unauthenticated("the bearer token is not one of this server's tokens")
        return found[0]


class Doorkeeper(grpc.aio.ServerInterceptor):
    """Lets nobody in without a principal."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(self, continuation: Continuation, details: Details) -> Handler:
        try:
            if not details.method.startswith(HEALTH):
                self._authenticator.principal(details.invocation_metadata)
        except Unauthenticated as error:
            return _refuse(error)
        return await continuation(details)


def read_token_file(path: Path) -> dict[bytes, Principal]:
    """Lines `tenant token [admin]`; `#` begins a comment.  Several tokens may belong to one tenant.

    Raises `ConfigError` naming the line, never the token.
    """
    try:
        mode = path.stat().st_mode
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {path} cannot be read: {error}") from error
    if stat.S_IMODE(mode) & stat.S_IRWXO:
        raise ConfigError(f"everybody on this machine may open the token file; run: chmod o-rwx {path}")

    tokens: dict[bytes, Principal] = {}
    line_of: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        match re.split(r"(?:^|\s)#", line)[0].split():
            case []:
                continue
            case [tenant, token, *rest] if rest in ([], ["admin"]):
                digest = _digest(tenant, token, where)
            case _:
                raise ConfigError(f"{where}: a line is 'tenant token' or 'tenant token admin'")
        if digest in tokens:
            raise ConfigError(f"{where}: this token stands in line {line_of[digest]} already; make another")
        tokens[digest] = Principal(Tenant(tenant), admin=bool(rest))
        line_of[digest] = number
    if not tokens:
        raise ConfigError(f"the token file {path} holds no token; add a line 'tenant token'")
    return tokens


def _digest(tenant: str, token: str, where: str) -> bytes:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", tenant):
        raise ConfigError(f"{where}: a tenant's name is 1 to 64 letters, digits, dots, dashes or underscores")
    if len(token) < MIN_TOKEN_LENGTH:
        raise ConfigError(
            f"{where}: the token has {len(token)} characters; use at least {MIN_TOKEN_LENGTH}, "
            "for example from: openssl rand -hex 24"
        )
    return hashlib.sha256(token.encode()).digest()


def _refuse(error: Unauthenticated) -> Handler:
    """A handler for any kind of call: on the wire a stream that ends at once suits them all."""

    async def refuse(requests: Any, context: Context) -> NoReturn:
        await context.abort(*status_of(error))

    return grpc.stream_stream_rpc_method_handler(refuse)
