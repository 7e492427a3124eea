"""A streamed reply over HTTP/1.1, read as it arrives: server-sent events whose data is JSON.

As thin as it can be, because the client runs on the cores of the servers that it measures.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

_END_OF_EVENT = b"\n\n"
_DONE = b"[DONE]"


class PeerError(Exception):
    """A server refused, or broke a reply off; says what it said."""


async def events(port: int, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """What 127.0.0.1:`port` answers to `body`, posted as JSON, event by event.

    Raises PeerError for any status but 200, for an event with an `error`, and for a body that is cut off;
    OSError if nobody answers.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + content)
        status, headers = await _head(reader)
        async with aclosing(_body(reader, headers)) as pieces:
            if status != 200:
                said = b"".join([piece async for piece in pieces])
                raise PeerError(f"status {status}: {said.decode(errors='replace')[:500]}")
            buffer = b""
            async for piece in pieces:
                *whole, buffer = (buffer + piece).replace(b"\r\n", b"\n").split(_END_OF_EVENT)
                for event in whole:
                    if (data := _data(event)) == _DONE:
                        return
                    if data:
                        yield _parsed(data)
    except asyncio.IncompleteReadError as error:
        raise PeerError("the reply was cut off") from error
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncGenerator[bytes]:
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readline()).partition(b";")[0] or b"-1", 16):
            if size < 0:
                raise asyncio.IncompleteReadError(b"", None)
            yield (await reader.readexactly(size + 2))[:-2]
    else:
        yield await reader.readexactly(int(headers["content-length"]))


def _data(event: bytes) -> bytes:
    """The data of an event; of a comment, nothing."""
    lines = (line.partition(b":") for line in event.split(b"\n"))
    return b"\n".join(value.removeprefix(b" ") for name, _, value in lines if name in (b"data", b"error"))


def _parsed(data: bytes) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise PeerError(f"in the middle of a reply: {json.dumps(event['error'])[:500]}")
    return event
