"""A local web server that misbehaves on request, archives that no one should open, and manifests that name them."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Served:
    """One file of the server, and how it is served.

    ``cuts`` are used up one a request: the connection is closed after that many bytes of the body (None: not).
    ``stalls`` likewise: after that many bytes nothing more comes until the server is released.
    """

    content: bytes
    etag: str | None = '"one"'
    ranges: bool = True
    status: int = 200
    length: bool = True
    trickle: float = 0.0
    cuts: list[int | None] = field(default_factory=list)
    stalls: list[int | None] = field(default_factory=list)


class Server(ThreadingHTTPServer):
    """Serves ``files`` by path and notes every request as (path, Range header)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.release = threading.Event()

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path.lstrip("/"), wanted))
        served = self.server.files.get(self.path.lstrip("/"))
        self.close_connection = True
        if served is None or served.status >= 400:
            self.send_error(served.status if served else 404)
            return
        start = self._start(served, wanted)
        if start is None:
            return
        body = served.content[start:]
        cut = served.cuts.pop(0) if served.cuts else None
        stall = served.stalls.pop(0) if served.stalls else None
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}")
        if served.etag:
            self.send_header("ETag", served.etag)
        if served.length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self._send(body if cut is None else body[:cut], stall, served.trickle)

    def _start(self, served: Served, wanted: str | None) -> int | None:
        """First byte to send; None if the range was answered with an error."""
        condition = self.headers.get("If-Range")
        if not wanted or not served.ranges or (condition and condition != served.etag):
            return 0
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(served.content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return start

    def _send(self, body: bytes, stall: int | None, trickle: float) -> None:
        try:
            if trickle:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if self.server.release.wait(trickle):
                        return
            elif stall is None:
                self.wfile.write(body)
            else:
                self.wfile.write(body[:stall])
                self.wfile.flush()
                self.server.release.wait(30)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up, as it should

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


# ---- archives ----


def zip_of(files: dict[str, bytes]) -> bytes:
    """The same bytes whenever it is asked: without a date of its own a member has the time of day."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def zip_link(name: str, target: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", b"plain")
        info = zipfile.ZipInfo(name)
        info.external_attr = 0o120777 << 16
        archive.writestr(info, target)
    return buffer.getvalue()


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_special(kind: bytes, name: str, link: str = "") -> bytes:
    """A tar with a plain file and one member that is a link or a device."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        plain = tarfile.TarInfo("a.txt")
        plain.size = 5
        archive.addfile(plain, io.BytesIO(b"plain"))
        special = tarfile.TarInfo(name)
        special.type, special.linkname = kind, link
        archive.addfile(special)
    return buffer.getvalue()


# ---- manifests ----


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def urls_entry(name: str, bases: list[str], files: list[dict[str, Any]], expect: dict[str, int], **keys: Any) -> str:
    """A table of the manifest for an entry with urls. TOML's inline values are written as JSON writes them."""
    table = {
        "what": "a test",
        "licence": "none",
        "citation": "none",
        "images": 1,
        "lessons": ["00"],
        "verified": False,
        "unpacked": 100_000,
    } | keys
    lines = [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    lines += [f"[{name}.urls]", f"bases = {json.dumps(bases)}"]
    inline = [", ".join(f"{key} = {json.dumps(value)}" for key, value in file.items()) for file in files]
    lines.append("files = [" + ", ".join(f"{{ {row} }}" for row in inline) + "]")
    wanted = ", ".join(f"{{ files = {json.dumps(glob)}, count = {count} }}" for glob, count in expect.items())
    return "\n".join([*lines, f"expect = [{wanted}]", ""])


def write_manifest(path: Path, *entries: str) -> Path:
    path.write_text("schema = 1\n" + "\n".join(entries), encoding="utf-8")
    return path
