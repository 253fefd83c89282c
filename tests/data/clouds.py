"""The folder of `loopback_store` behind gs:// and abfs://, with the same faults.

Google's answers what gcsfs asks of the JSON API (https://cloud.google.com/storage/docs/json_api):
lists, objects with ranges, uploads in one request and resumable ones. Azure's answers what adlfs
asks of the Blob REST API (https://learn.microsoft.com/rest/api/storageservices/blob-service-rest-api):
lists, blobs with ranges, blocks. Requests are neither signed nor checked; there is one bucket, and
one container, called "bucket".
"""

from __future__ import annotations

import base64
import json
import re
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.data.loopback_store import Handler, etag

WRITTEN = "2026-01-01T00:00:00.000Z"


class Google(Handler):
    """/storage/v1/b/bucket/o[/NAME], /download/… and /upload/…"""

    def do_GET(self) -> None:
        if self._suffers():
            return
        query = parse_qs(urlsplit(self.path).query)
        name = self._name()
        if name is None and self._in_bucket():
            entries = self._entries(query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
            files, folders = entries
            listing = {"items": [self._about(file) for file in files], "prefixes": folders}
            self._send(200, json.dumps(listing).encode(), body=True)
        elif name is None or not (self.server.root / name).is_file():
            self._refuse(404, "notFound")
        elif query.get("alt") == ["media"]:
            self._answer_file(name, self.headers.get("Range", ""))
        else:
            self._send(200, json.dumps(self._about(name)).encode(), body=True)

    def do_POST(self) -> None:
        data = self._sent()
        if self._suffers(writes=True):
            return
        query = parse_qs(urlsplit(self.path).query)
        if "upload_id" in query:
            self._take_piece(query["name"][0], data)
            return
        if query.get("uploadType") == ["resumable"]:
            self._done(200, Location=f"{self.server.url}{self.path}&upload_id=1")
            return
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary is not None
        _, about, content, _ = data.split(b"--" + boundary[1].encode())
        name = json.loads(about.partition(b"\n\n")[2])["name"]
        self._keep(name, content.partition(b"\n\n")[2].removesuffix(b"\n"))

    def _take_piece(self, name: str, data: bytes) -> None:
        """Take a part of a resumable upload."""
        first, last, size = map(int, re.findall(r"\d+", self.headers["Content-Range"]))
        begun = self.server.blocks.get(name, b"")[:first] + data
        self.server.blocks[name] = begun
        if last + 1 < size:
            self.send_response(308)
            self.send_header("Range", f"bytes=0-{last}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._keep(name, self.server.blocks.pop(name))

    def do_DELETE(self) -> None:
        if self._suffers(writes=True):
            return
        name = self._name()
        if name is None or not (self.server.root / name).is_file():
            self._refuse(404, "notFound")
            return
        (self.server.root / name).unlink()
        self._done(204)

    def _keep(self, name: str, data: bytes) -> None:
        file = self.server.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        if self.ill in ("late", "cut"):
            self.close_connection = True
            return
        self._send(200, json.dumps(self._about(name)).encode(), body=True)

    def _about(self, name: str) -> dict:
        data = (self.server.root / name).read_bytes()
        return {
            "name": name,
            "bucket": "bucket",
            "size": str(len(data)),
            "generation": "1",
            "updated": WRITTEN,
            "timeCreated": WRITTEN,
            "md5Hash": base64.b64encode(bytes.fromhex(etag(data).strip('"'))).decode(),
            "mediaLink": f"{self.server.url}/download/storage/v1/b/bucket/o/{name}?alt=media",
        }

    def _name(self) -> str | None:
        match = re.search(r"/o/(.+)$", urlsplit(self.path).path)
        return unquote(match[1]) if match else None

    def _in_bucket(self) -> bool:
        return "/b/bucket/" in urlsplit(self.path).path

    def _refuse(self, status: int, code: str) -> None:
        error = {"code": status, "message": f"{code}, told by the store"}
        self._say(status, json.dumps({"error": error}).encode(), "application/json")


class Azure(Handler):
    """/account/bucket[/NAME]"""

    def do_HEAD(self) -> None:
        if self._suffers():
            return
        if "restype=container" in self.path:
            self._say(200 if self._in_bucket() else 404, b"", "")
        else:
            self._answer_blob(body=False)

    def do_GET(self) -> None:
        if self._suffers():
            return
        query = parse_qs(urlsplit(self.path).query)
        if not self._in_bucket():
            self._refuse(404, "ContainerNotFound")
        elif query.get("comp") == ["list"]:
            listing = self._listing_of(
                query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
            )
            self._say(200, listing.encode(), "application/xml")
        elif query.get("restype") == ["container"]:
            self._say(200, b"", "")
        else:
            self._answer_blob(body=True)

    def do_PUT(self) -> None:
        data = self._sent()
        if self._suffers(writes=True):
            return
        query = parse_qs(urlsplit(self.path).query)
        name = self._name()
        if query.get("comp") == ["block"]:
            self.server.blocks[f"{name} {query['blockid'][0]}"] = data
        elif query.get("comp") == ["blocklist"]:
            ids = re.findall(r"<(?:Latest|Uncommitted)>([^<]+)<", data.decode())
            self._write(name, b"".join(self.server.blocks.pop(f"{name} {key}") for key in ids))
        else:
            replaces = self.headers.get("If-None-Match") != "*"
            if not replaces and (self.server.root / name).exists():
                self._refuse(409, "BlobAlreadyExists")
                return
            self._write(name, data)
        self.etag = etag(data)
        self._done(201, **{"Last-Modified": formatdate(0, usegmt=True)})

    def do_DELETE(self) -> None:
        if self._suffers(writes=True):
            return
        file = self.server.root / self._name()
        if not file.is_file():
            self._refuse(404, "BlobNotFound")
            return
        file.unlink()
        self._done(202)

    def _write(self, name: str, data: bytes) -> None:
        file: Path = self.server.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def _answer_blob(self, body: bool) -> None:
        name = self._name()
        if not self._in_bucket() or not (self.server.root / name).is_file():
            self._refuse(404, "BlobNotFound")
            return
        asked = self.headers.get("x-ms-range") or self.headers.get("Range", "")
        self._answer_file(name, asked, body, **{"x-ms-blob-type": "BlockBlob"})

    def _listing_of(self, prefix: str, delimiter: str) -> str:
        files, folders = self._entries(prefix, delimiter)
        blobs = []
        for name in files:
            data = (self.server.root / name).read_bytes()
            blobs.append(
                f"<Blob><Name>{escape(name)}</Name><Properties>"
                f"<Content-Length>{len(data)}</Content-Length><Etag>{etag(data)}</Etag>"
                f"<Last-Modified>{formatdate(0, usegmt=True)}</Last-Modified>"
                "<BlobType>BlockBlob</BlobType></Properties></Blob>"
            )
        blobs += [f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>" for folder in folders]
        return (
            '<?xml version="1.0" encoding="utf-8"?>'
            f'<EnumerationResults ServiceEndpoint="{self.server.url}/account" '
            f'ContainerName="bucket"><Blobs>{"".join(blobs)}</Blobs><NextMarker />'
            "</EnumerationResults>"
        )

    def _name(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/account/bucket").strip("/")

    def _in_bucket(self) -> bool:
        path = urlsplit(self.path).path
        return path == "/account/bucket" or path.startswith("/account/bucket/")

    def _refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>told by the store</Message></Error>"
        self._say(status, body.encode(), "application/xml", **{"x-ms-error-code": code})
