"""A folder behind http:// and s3:// on this machine, with the faults of real ones: errors, dropped
connections, stalls.

It answers what fsspec's HTTP and S3 file systems ask of a server that holds files: HEAD, GET with
ranges, and S3's ListObjectsV2, PUT and DELETE on `/bucket`. Requests are neither signed nor
checked; there is one bucket.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

STALL_S = 5


class Store(ThreadingHTTPServer):
    """`faults`: how the next bodies of tars, or of files of another `ending`, go wrong, one each:
    "error", "drop", "stall", "away" or "denied" (401).

    While "away" is the next one, HEAD fails too. `served`: bodies sent whole; `n_sent`: bytes of
    bodies, cut ones included.

    `faulty`: how a request of any kind goes wrong, by its number from 0: "error", "drop" before it
    is carried out, "late" after, "stall", or "cut" in the middle of what is sent.
    `refused_from`: the number of the first request that is refused, as by credentials that have
    ended. `read_only`: what writes is refused.
    """

    daemon_threads = True
    request_queue_size = 64  # as many are asked for at once

    def __init__(self, root: Path, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.root, self.lock = root, threading.Lock()
        self.faults: list[str] = []
        self.ending = ".tar"
        self.suffered: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.n_sent: Counter[str] = Counter()
        self.blocks: dict[str, bytes] = {}  # of uploads that are under way

        # Of every request, whatever it asks for.
        self.requests: list[str] = []
        self.faulty: dict[int, str] = {}
        self.refused_from: int | None = None
        self.read_only = False

    def numbered(self, request: str) -> tuple[int, str]:
        """The number of a request, and the fault that it suffers, or nothing."""
        with self.lock:
            number = len(self.requests)
            self.requests.append(request)
            return number, self.faulty.get(number, "")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, name: str) -> str:
        """The fault that this body suffers, or nothing."""
        with self.lock:
            found = self.faults.pop(0) if self.faults and name.endswith(self.ending) else ""
            self.suffered[found] += 1
            return found

    def away(self, name: str) -> bool:
        """Whether not even a HEAD is answered now."""
        with self.lock:
            return self.faults[:1] == ["away"] and name.endswith(self.ending)

    def handle_error(self, request: object, address: object) -> None:
        """A client that goes away is part of the play."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self._suffers():
            self._answer(body=False)

    def do_GET(self) -> None:
        if not self._suffers():
            self._answer(body=True)

    def do_PUT(self) -> None:
        data = self._sent()
        file = self._file()
        if self._suffers(writes=True):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        self.etag = etag(data)
        self._done(200)

    def do_DELETE(self) -> None:
        if self._suffers(writes=True):
            return
        self._file().unlink(missing_ok=True)
        self._done(204)

    def _file(self) -> Path:
        name = unquote(urlsplit(self.path).path).removeprefix("/bucket").strip("/")
        return self.server.root / name

    def _sent(self) -> bytes:
        """The body of a request; botocore may send it in signed pieces."""
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        pieces = []
        while data:
            head, _, data = data.partition(b"\r\n")
            size = int(head.split(b";")[0], 16)
            if not size:
                break
            pieces.append(data[:size])
            data = data[size + 2 :]
        return b"".join(pieces)

    def _suffers(self, writes: bool = False) -> bool:
        """Whether a request is answered by a fault alone."""
        number, self.ill = self.server.numbered(f"{self.command} {self.path}")
        refused_from = self.server.refused_from
        if (refused_from is not None and number >= refused_from) or (
            writes and self.server.read_only
        ):
            self._refuse(403, "AccessDenied" if refused_from is None else "ExpiredToken")
            return True
        if writes and not self._in_bucket():
            self._refuse(404, "NoSuchBucket")
            return True
        if self.ill == "error":
            self._refuse(500, "InternalError")
            return True
        if self.ill == "stall":
            time.sleep(STALL_S)
        if self.ill in ("drop", "stall"):
            self.close_connection = True
            return True
        return False

    def _in_bucket(self) -> bool:
        return urlsplit(self.path).path.startswith("/bucket")

    def _refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>told by the store</Message></Error>"
        self._say(status, body.encode(), "application/xml")

    def _say(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        """Answer with words, in which no fault falls."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _done(self, status: int, **headers: str) -> None:
        """Answer what has been carried out."""
        if self.ill in ("late", "cut"):
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("ETag", getattr(self, "etag", '"0"'))
        self.send_header("Content-Length", "0")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, *, body: bool) -> None:
        address = urlsplit(self.path)
        name = unquote(address.path).removeprefix("/bucket").strip("/")
        if "list-type=2" in address.query:
            return self._send(200, self._listing(parse_qs(address.query)), body)
        if not (self.server.root / name).is_file():
            return self._send(404, b"", body)
        self._answer_file(name, self.headers.get("Range", ""), body)

    def _answer_file(self, name: str, asked: str, body: bool = True, **headers: str) -> None:
        """Answer with a file, or with the range of it that is asked for."""
        data = (self.server.root / name).read_bytes()
        self.etag = etag(data)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        if not match:
            return self._send(200, data, body, name, **headers)
        first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], body, name, **headers)

    def _entries(self, prefix: str, delimiter: str) -> tuple[list[str], list[str]]:
        """The files whose names begin with a prefix, and the folders there, each with its /."""
        files, folders = [], set()
        for path in sorted(path for path in self.server.root.rglob("*") if path.is_file()):
            name = path.relative_to(self.server.root).as_posix()
            if not name.startswith(prefix):
                continue
            beyond = name[len(prefix) :]
            if delimiter and delimiter in beyond:
                folders.add(prefix + beyond.partition(delimiter)[0] + delimiter)
            else:
                files.append(name)
        return files, sorted(folders)

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        files, folders = self._entries(
            query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        )
        entries = []
        for name in files:
            data = (self.server.root / name).read_bytes()
            entries.append(
                f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{etag(data)}</ETag></Contents>"
            )
        entries += [
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in folders
        ]
        listing = (
            "<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>"
            f"{''.join(entries)}</ListBucketResult>"
        )
        return listing.encode()

    def _send(self, status: int, data: bytes, body: bool, name: str = "", **headers: str) -> None:
        fault = self.server.fault(name) if body else ""
        if self.ill in ("late", "cut"):
            fault = "drop"
        if fault == "error":
            status, data, headers = 500, b"try again", {}
        elif fault == "denied":
            status, data, headers = 401, b"", {}
        elif fault == "away" or (not body and self.server.away(name)):
            status, data, headers = 503, b"", {}
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", getattr(self, "etag", '"0"'))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        if fault in ("drop", "stall"):
            self.server.n_sent[name] += len(data) // 2
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(STALL_S)
            self.close_connection = True
            return
        self.server.n_sent[name] += len(data)
        self.wfile.write(data)
        self.server.served[name] += status < 300


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@contextmanager
def store(root: Path, handler: type[Handler] = Handler) -> Iterator[Store]:
    """Serve a folder while the block runs."""
    server = Store(root, handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
