"""A Hub on this machine, small enough to read: repositories, large files, commits, downloads,
rights, dropped connections.

It speaks what huggingface_hub's client asks of huggingface.co, as far as models need it. Commits
are atomic: a repository is a mapping of paths to bytes that is replaced whole.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_loopbackloopbackloopback"


class Hub:
    """The state behind the server. `drop`: so many of the next uploads of large files end in a
    closed connection.

    Models and data sets share one set of names.
    """

    def __init__(self):
        self.repos, self.blobs, self.uploads, self.drop, self.url = {}, {}, [], 0, ""
        self.private = set()  # names of repositories that only TOKEN reads

    def listing(self, name):
        for path, data in sorted(self.repos[name].items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)}
            if is_large(path):
                entry["lfs"] = {
                    "oid": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 130,
                }
            yield entry


def git_sha(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path):
    return path.endswith((".safetensors", ".onnx"))


def children(entries, below):
    """Of files below a folder those that lie in it, and its folders."""
    direct = {}
    for entry in entries:
        name, slash, _ = entry["path"].removeprefix(below).partition("/")
        folder = {"type": "directory", "path": below + name, "size": 0, "oid": git_sha(b"")}
        direct[name] = folder if slash else entry
    return list(direct.values())


def revision(files):
    return hashlib.sha1(
        repr(sorted((p, git_sha(d)) for p, d in files.items())).encode()
    ).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def may_write(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self):
        hub, data = self.server.hub, self.body()
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.may_write():
            return self.answer(403, {"error": "you may not write here"})
        if self.path == "/api/repos/create":
            wish = json.loads(data)
            name = f"{wish['organization'] or 'me'}/{wish['name']}"
            known = name in hub.repos
            hub.repos.setdefault(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            return self.answer(409 if known else 200, {"url": f"{hub.url}/{name}", "id": name})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            objects = []
            for wanted in json.loads(data)["objects"]:
                if wanted["oid"] not in hub.blobs:
                    wanted["actions"] = {"upload": {"href": f"{hub.url}/blob/{wanted['oid']}"}}
                objects.append(wanted)
            return self.answer(200, {"objects": objects, "transfer": "basic"})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if is_large(f["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(data)["files"]
            ]
            return self.answer(200, {"files": files})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            files = dict(hub.repos[match[1]])
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            hub.repos[match[1]] = files
            return self.answer(
                200, {"commitUrl": f"{hub.url}/{match[1]}/commit/1", "commitOid": revision(files)}
            )
        return self.answer(404, {"error": self.path})

    def do_PUT(self):
        hub, data = self.server.hub, self.body()
        oid = self.path.rpartition("/")[2]
        if hub.drop > 0:
            hub.drop -= 1
            self.close_connection = True
            self.connection.close()
            return None
        assert hashlib.sha256(data).hexdigest() == oid
        hub.blobs[oid] = data
        hub.uploads.append(oid)
        return self.answer(200)

    def do_GET(self):
        hub, path = self.server.hub, self.path.partition("?")[0]
        path = path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets")
        name = re.match(r"(?:/api/models)?/([^/]+/[^/]+)", path)
        if name and name[1] in hub.private and not self.may_write():
            return self.answer(401, {"error": "Invalid username or password."})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/(.+))?", path):
            if match[1] not in hub.repos:
                return self.missing("RepoNotFound")
            below = f"{match[2]}/" if match[2] else ""
            inside = [e for e in hub.listing(match[1]) if e["path"].startswith(below)]
            if "recursive=true" not in self.path.lower():
                inside = children(inside, below)
            return self.answer(200, inside) if inside else self.missing("EntryNotFound")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if match[1] not in hub.repos:
                return self.missing("RepoNotFound")
            siblings = [{"rfilename": entry["path"]} for entry in hub.listing(match[1])]
            return self.answer(
                200, {"id": match[1], "sha": revision(hub.repos[match[1]]), "siblings": siblings}
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            files = hub.repos.get(match[1], {})
            if match[2] not in files:
                return self.missing("EntryNotFound")
            data = files[match[2]]
            about = {"ETag": f'"{git_sha(data)}"', "X_Repo_Commit": revision(files)}
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if part is None:
                return self.answer(200, data, **about)
            return self.answer(206, data[int(part[1]) : int(part[2]) + 1], **about)
        return self.missing("RepoNotFound")

    do_HEAD = do_GET

    def missing(self, code):
        return self.answer(404, {"error": self.path}, X_Error_Code=code)


@contextmanager
def loopback_hub():
    """A running Hub at `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub = Hub()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
