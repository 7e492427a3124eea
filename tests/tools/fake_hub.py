"""A model hub on localhost: what huggingface_hub asks of one, over HTTP, with faults on request."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "tests/talking"


@dataclass
class FakeHub:
    """One repository at one commit."""

    files: dict[str, bytes]
    endpoint: str = ""
    gated: bool = False  # its list of files is public, the files are not
    is_down: bool = False
    breaks_at: dict[str, int] = field(default_factory=dict)  # file -> bytes after which its first answer ends
    sent: list[tuple[str, str]] = field(default_factory=list)  # (file, range) of every GET of a file

    def files_sent(self) -> set[str]:
        return {name for name, _ in self.sent}


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.hub.is_down:
            self._refuse(500, "InternalError")
        elif path.startswith("/api/models/"):
            self._describe(path.removeprefix("/api/models/"))
        else:
            self._resolve(path.removeprefix("/"))

    do_HEAD = do_GET

    def _describe(self, path: str) -> None:
        repository, _, rest = (
            path.partition("/revision/") if "/revision/" in path else path.partition("/tree/")
        )
        if repository != MODEL:
            return self._refuse(404, "RepoNotFound")
        if rest.partition("/")[0] not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if "/tree/" in path:
            return self._json([_entry(name, data) for name, data in self.hub.files.items()])
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.hub.files.items()]
        self._json({"id": MODEL, "sha": COMMIT, "siblings": siblings})

    def _resolve(self, path: str) -> None:
        repository, _, rest = path.partition("/resolve/")
        commit, _, name = rest.partition("/")
        if self.hub.gated and self.headers["Authorization"] != "Bearer hf_accepted":
            return self._refuse(403, "GatedRepo")
        if (repository, commit) != (MODEL, COMMIT) or name not in self.hub.files:
            return self._refuse(404, "EntryNotFound")
        data, wanted = self.hub.files[name], self.headers["Range"] or ""
        begin = int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.hub.sent.append((name, wanted))
            self.wfile.write(data[begin : self.hub.breaks_at.pop(name, len(data))])

    def _json(self, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
