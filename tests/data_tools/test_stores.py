"""Tools of `vlp data` whose input and output lie in a store: the same files as on this machine,
through every fault of every request.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import s3fs
from fsspec.implementations.local import LocalFileSystem

from tests.data.loopback_store import Store, store
from tests.data.material import data_of, encoded, loader_of, picture, write_shards, write_tar
from tests.data_tools import mining
from tests.data_tools.tools import CAPTIONS
from tests.loopback_hub import TOKEN, loopback_hub
from vlp.cli import main
from vlp.data import fetch, stored, stores
from vlp.data.format import ShardWriter
from vlp.data.index_file import NAME, open_index
from vlp.data.paths import expand
from vlp.data.stored import StoredPath
from vlp.data_tools._run import writers
from vlp.data_tools._run.kept import Kept
from vlp.data_tools._run.writers import writing
from vlp.files import write_atomically
from vlp.locks import InUse

# Whose times are those of the machine that wrote the shards.
OF_THE_MACHINE = NAME
# What a process remembers, anew for each test.
STATE = {
    stores: ("signed", "_listed"),
    stored: ("_scratch", "_growing", "_compared"),
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Three shards of two samples in a store, and here."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.001)
    monkeypatch.setattr(stores, "_PAUSE_S", 0.001)
    monkeypatch.setattr(writers, "BEAT_S", 0.02)
    write_shards(tmp_path / "root" / "in", 6, 2)
    monkeypatch.setattr(stores, "options", {})
    forget_all(monkeypatch)
    with store(tmp_path / "root") as running:
        # The clients' own patience would add minutes to the walk below.
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        stores.use({"s3": options(running)})
        yield running
    s3fs.S3FileSystem.clear_instance_cache()


def forget_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be as a process that has just begun."""
    for module, names in STATE.items():
        for name in names:
            monkeypatch.setattr(module, name, type(vars(module)[name])())


def options(server: Store) -> dict:
    return {
        "key": "k",
        "secret": "s",
        "client_kwargs": {"endpoint_url": server.url, "region_name": "us-east-1"},
        "config_kwargs": {"retries": {"total_max_attempts": 1}, "read_timeout": 2},
    }


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder but its index, and the samples that this counts."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.name == OF_THE_MACHINE:
            counts = {name: shard.count for name, shard in open_index(path).items()}
            files[str(path.relative_to(folder))] = json.dumps(counts).encode()
        elif path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def vlp(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def local(tmp_path: Path, *arguments: object) -> dict[str, bytes]:
    """What the same call writes on this machine."""
    assert vlp(*arguments, "--to", tmp_path / "here") == 0
    return content(tmp_path / "here")


FILTER = ("--max-repeats", 3, "--min-words", 2)  # with a survey before the shards


def test_what_a_store_holds_is_what_this_machine_would(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    assert vlp("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out") == 0
    assert content(server.root / "out") == here and len(here) > 10

    # A second call finds everything done, by one list of the folder: not by asking for each mark.
    before = len(server.requests)
    assert vlp("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out") == 0
    again = server.requests[before:]
    assert not [request for request in again if request.startswith("PUT") and "tar" in request]
    assert not [request for request in again if request.startswith("HEAD") and "out/" in request]
    assert content(server.root / "out") == here


# Each tool with its options; {in}: the folder of its input, {file}: where it writes a file.
TOOLS = {
    "stats": ["{in}/train", "--to", "{out}"],
    "negatives": ["{in}/train", "--to", "{out}"],
    "counting": ["{in}/count", "--to", "{out}"],
    "reshard": [
        "{in}/train::{in}/packed",
        "--to",
        "{out}",
        "--shuffle",
        0,
        "--samples-per-shard",
        5,
    ],
    "dedup": ["{in}/twins", "--to", "{out}", "--against", "{in}/train"],
    "dedup by cosine": [
        *("{in}/mined", "--to", "{out}", "--embeddings", "{in}/embedded", "--distance", -1),
    ],
    "mine": ["{in}/mined", "--to", "{out}", "--embeddings", "{in}/embedded", "--images"],
    "mine an order": [
        *("{in}/mined", "--to", "{out}", "--embeddings", "{in}/embedded", "--order", 2),
    ],
    "validate": ["{in}/train", "--json", "{out}/report.json", "--notes", "{out}"],
    "sheet": ["{in}/train", "--to", "{out}/sheet.html", "--samples", 3],
    "scenes": [
        *("--to", "{out}", "--train", 3, "--val", 0, "--test", 2, "--zeroshot", 0),
        *("--retrieval", 2, "--proofs", 0, "--size", 16, "--processes", 1),
    ],
    "pack": ["{in}/photos.tar", "--captions", "{in}/photos.csv", "--to", "{out}"],
}


@pytest.fixture
def material(server: Store) -> Path:
    """What the tools read, in the store."""
    root = server.root
    write_shards(root / "train", 8, 4)
    write_shards(root / "twins", 6, 3, start=4)
    with ShardWriter(root / "count", 3) as writer:
        for i, captions in enumerate(CAPTIONS):
            writer.add(None, encoded(picture(i)), "png", captions)
    write_shards(root / "packed", 4, 2, start=20)
    for path in (root / "packed").glob("*.tar"):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()
    mining.write(root / "mined")
    mining.store(root / "embedded", *mining.twins())
    write_tar(root / "photos.tar", [(f"{i}.png", encoded(picture(i))) for i in range(4)])
    (root / "photos.csv").write_text(
        "image,caption\n" + "".join(f"{i}.png,a {i}\n" for i in range(4))
    )
    return root


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool(name, material, server, tmp_path):
    def called(folder: str, out: str) -> None:
        arguments = [str(word).format(**{"in": folder, "out": out}) for word in TOOLS[name]]
        status = vlp(name.split()[0], *arguments)
        assert status == 0

    (tmp_path / "here").mkdir()
    called(str(material), str(tmp_path / "here"))
    here = content(tmp_path / "here")
    called("s3://bucket", "s3://bucket/made/here")

    # Places stand in reports and lists for people.
    there = content(server.root / "made" / "here")
    for path, data in there.items():
        data = data.replace(b"s3://bucket", str(material).encode())
        there[path] = data.replace("s3: …/".encode(), "…/".encode())
    assert there == here and here
    assert not [path for path in server.root.rglob(".*") if path.is_file()]


def walk(server: Store, call: tuple, here: dict[str, bytes], faults: list[list[str]]) -> int:
    """Let each request of a call fail in turn, by the faults of its turn, so often that no patience
    outlasts it in every other turn; returns how many calls ended, and had to be made again.
    """
    server.requests.clear()
    assert vlp(*call, "s3://bucket/whole") == 0
    n_requests = len(server.requests)
    assert n_requests > 15

    n_ended = n_walked = 0
    for number in range(n_requests):
        for fault in faults[number % len(faults)]:
            folder = f"{fault}{number}"
            server.requests.clear()
            n_faults = PATIENCE if number % 2 else 1
            server.faulty = {number + i: fault for i in range(n_faults)}
            status = vlp(*call, f"s3://bucket/{folder}")
            server.faulty = {}
            if status:
                n_ended += 1
                assert vlp(*call, f"s3://bucket/{folder}") == 0
            assert content(server.root / folder) == here, (fault, number)
            n_walked += 1
    assert n_walked >= n_requests
    return n_ended


PATIENCE = 20  # more than the tries of all layers
FAULTS = ["error", "drop", "late", "cut"]


def test_a_request_may_fail(server, tmp_path):
    write_shards(server.root / "one", 1, 1)
    here = local(tmp_path, "filter", server.root / "one", "--min-words", 2)
    call = ("filter", "s3://bucket/one", "--min-words", 2, "--to")
    assert walk(server, call, here, [[fault] for fault in FAULTS]) > 5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_request_may_fail_in_every_way(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    call = ("filter", "s3://bucket/in", *FILTER, "--to")
    assert walk(server, call, here, [FAULTS]) > 50


# ---- two calls, several processes, other addresses


def test_processes_and_parts_share_the_work(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    call = ("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out")
    assert vlp(*call, "--part", "1/2") == 0  # surveys its part
    assert vlp(*call, "--part", "2/2", "--processes", 2) == 0
    assert vlp(*call, "--part", "1/2") == 0
    assert content(server.root / "out") == here


def test_addresses_with_signatures_are_read_and_written_nowhere(server, tmp_path, capsys):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    host = server.url.replace("http://", "http://anna:PLANTED0@")
    shards = f"{host}/in/{{00000..00002}}.tar?X-Amz-Signature=PLANTED1&X-Amz-Credential=PLANTED2"
    storage = ("--storage", "s3:token=PLANTED3")
    to = ("--to", "s3://bucket/out", "--processes", 2)
    assert vlp("filter", shards, *FILTER, *to, *storage) == 0
    assert content(server.root / "out") == here

    # Refused, too: by the store, and by what is asked of it.
    server.read_only = True
    assert vlp("filter", shards, *FILTER, "--to", "s3://bucket/new", *storage) == 1
    assert vlp("filter", shards.replace("00002", "00009"), "--to", tmp_path / "x", *storage) == 1
    with pytest.raises(SystemExit):
        vlp("filter", shards, *to, *storage, "--token=PLANTED5 ")
    said = "".join(capsys.readouterr())
    assert "does not let s3://bucket/new" in said and "PLANTED" not in said

    # In no file of the store, of the cache or of this machine.
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert not [path for path in files if "PLANTED" in str(path) or b"PLANTED" in path.read_bytes()]


def test_training_finds_the_index_beside_what_was_written(server, tmp_path):
    assert vlp("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out") == 0
    source = {"name": "remote", "path": "s3://bucket/out/", "window": 1}
    before = len(server.requests)
    loader = loader_of(data_of({**source, "storage": options(server)}), 2)
    assert loader.n_samples == 6
    read = [request for request in server.requests[before:] if ".tar" in request]
    assert not [request for request in read if request.startswith("GET")], read


def test_a_living_call_is_left_alone_and_a_dead_one_is_not(server, monkeypatch, capsys):
    call = ("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out")
    folder = StoredPath("s3://bucket/out")
    advice = "Wait"

    # Another process of another machine: its note changes as long as it lives.
    note = server.root / "out" / ".writer-1-of-1.json"
    note.parent.mkdir()
    about = {"id": "x", "pid": 1, "host": "elsewhere", "command": "vlp data …", "beats": 0}
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.005):
            about["beats"] += 1
            temporary = note.with_suffix(".new")
            temporary.write_text(json.dumps(about))
            temporary.replace(note)

    other = threading.Thread(target=beat)
    other.start()
    try:
        time.sleep(0.05)
        assert vlp(*call) == 1
        said = capsys.readouterr().err
        assert "s3://bucket/out is in use by 'vlp data …' (process 1 on elsewhere)" in said
    finally:
        done.set()
        other.join()
    assert not list((server.root / "out").glob("*.tar"))

    # A killed one's does not, and of this machine nobody need wait.
    assert vlp(*call) == 0 and "watching for" in capsys.readouterr().err
    about |= {"host": socket.gethostname(), "pid": dead_process()}
    note.write_text(json.dumps(about))
    assert vlp(*call) == 0 and "watching for" not in capsys.readouterr().err
    assert not note.exists()

    # Shares of one number hold it together; the same share and another number do not.
    monkeypatch.setattr(writers, "is_alive", lambda pid: True)
    stored.destination(str(folder))
    with writing(folder, advice=advice, part=(1, 2)):
        monkeypatch.setattr(writers, "_held", set())
        with writing(folder, advice=advice, part=(2, 2)):
            for part in ((1, 2), (1, 1), (1, 3)):
                monkeypatch.setattr(writers, "_held", set())
                with pytest.raises(InUse), writing(folder, advice=advice, part=part):
                    pass


def dead_process() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


# ---- what is refused


def test_credentials_that_end_in_mid_run_lose_nothing(server, tmp_path, capsys):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    call = ("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out")
    server.requests.clear()
    server.refused_from = 40
    assert vlp(*call) == 1
    said = capsys.readouterr().err
    assert (
        "look at the credentials: they may have ended" in said and "the same command goes" in said
    )
    n_marks = len(list((server.root / "out").glob("*_captions.json")))
    assert n_marks == 3

    server.refused_from = None
    before = len(server.requests)
    assert vlp(*call) == 0 and content(server.root / "out") == here
    assert not [one for one in server.requests[before:] if "PUT" in one and "_captions" in one]


REFUSED = {
    "no right to write": ("s3://bucket/out", "does not let s3://bucket/out"),
    "no bucket": ("s3://nowhere/out", "no such bucket"),
    "http": ("https://host/out", "http can be read from, but not written to"),
    "memory": ("memory://out", "each process has a memory of its own"),
    "no package": ("gs://bucket/out", "gs:// needs another package: pip install gcsfs"),
    "no such scheme": ("s4://bucket/out", "no store is known by s4://"),
    "a bucket": ("s3://bucket", "is a whole bucket; name what is to be in it"),
    "the input": ("s3://bucket/in", "holds the input; name another folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_to_is_refused_before_anything_is_read(name, server, capsys):
    to, message = REFUSED[name]
    server.read_only = name == "no right to write"
    assert vlp("stats", "s3://bucket/in", "--to", to) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not [request for request in server.requests if "GET /bucket/in/0" in request]


SOURCES = {
    "s3://bucket/none": "names neither a file nor a folder with files",
    "s3://bucket/in/00009.tar": "names neither a file nor a folder with files",
    "memory://in": "each process has a memory of its own",
    "s3://bucket": "is a folder without .tar files; there are some in its folders",
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_is_none_says_so(source, server, tmp_path, capsys):
    assert vlp("stats", source, "--to", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert SOURCES[source] in said and "Traceback" not in said


def test_patterns_name_shards_of_a_store(server):
    expected = [f"s3://bucket/in/0000{i}.tar" for i in range(3)]
    for pattern in ("s3://bucket/in/*.tar", "s3://bucket/*/0000?.tar", "s3://bucket/in/"):
        assert list(map(str, expand(pattern))) == expected
    assert list(map(str, expand(f"file://{server.root}/in"))) == sorted(
        map(str, (server.root / "in").glob("*.tar"))
    )


@pytest.mark.parametrize("command", ["export run --to", "embed a b --out", "eval m --out"])
def test_commands_that_write_here_only_refuse_addresses(command, server, capsys):
    *words, option = command.split()
    with contextlib.suppress(SystemExit):
        assert main([*words, option, "s3://bucket/out"]) == 1
        assert "writes into folders of this machine only" in capsys.readouterr().err
    assert not Path("s3:").exists()


# ---- other stores


class Plain(LocalFileSystem):
    """A store that shows a file while it is written, and can rename."""

    protocol = "plain"
    root = ""
    renamed: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.replace("plain://", f"{cls.root}/").rstrip("/")

    def mv(self, path1: str, path2: str, **_: object) -> None:
        self.renamed.append(path1)
        Path(path1).rename(path2)


class Fixed(Plain):
    """One that cannot."""

    protocol = "fixed"

    def mv(self, path1: str, path2: str, **_: object) -> None:
        raise NotImplementedError("no rename")


@pytest.fixture
def plain(server: Store, monkeypatch: pytest.MonkeyPatch) -> type[Plain]:
    monkeypatch.setattr(Plain, "root", str(server.root))
    monkeypatch.setattr(Plain, "renamed", [])
    fsspec.register_implementation("plain", Plain, clobber=True)
    fsspec.register_implementation("fixed", Fixed, clobber=True)
    return Plain


def test_a_store_that_shows_parts_is_given_whole_files(plain, server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    assert vlp("filter", "plain://in", *FILTER, "--to", "plain://deep/out") == 0
    assert content(server.root / "deep" / "out") == here
    named = [Path(path).name for path in plain.renamed]
    assert len(named) > len(here) and all(name.endswith(".tmp") for name in named)


def test_a_store_without_rename_is_refused_before_work_starts(plain, server, capsys):
    assert vlp("filter", "s3://bucket/in", *FILTER, "--to", "fixed://deep/out") == 1
    assert "cannot be written: its store cannot (NotImplementedError: no rename)" in (
        capsys.readouterr().err
    )
    assert not [request for request in server.requests if "/in/0" in request]


def test_the_hub_is_read_and_written(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    with loopback_hub() as hub:
        hub.repos["me/set"] = {}
        stores.use({"hf": {"endpoint": hub.url, "token": TOKEN}})
        for source, to in (("s3://bucket/in", "first"), ("hf://me/set/first", "second")):
            assert vlp("filter", source, *FILTER, "--to", f"hf://me/set/{to}") == 0
        for folder in ("first", "second"):
            for name, data in hub.repos["me/set"].items():
                if name.startswith(f"{folder}/"):
                    place = tmp_path / "of_hub" / name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(data)
            assert content(tmp_path / "of_hub" / folder) == here


# ---- what lies on this machine meanwhile


def test_a_file_that_grows_is_sent_before_what_is_made_of_it(server, monkeypatch):
    folder = stored.destination("s3://bucket/out")
    kept = Kept(folder / "_answers" / "0.jsonl")
    kept.complete(["a", "b"], 1, lambda batch: [batch[0] * 2])
    assert not (server.root / "out").exists()  # not yet
    write_atomically(folder / "00000.json", b"{}")
    sent = server.root / "out" / "_answers" / "0.jsonl"
    assert sent.read_text().count("\n") == 2

    # From time to time, because a model may answer for hours.
    monkeypatch.setattr(stored, "SENT_EVERY_S", 0.0)
    kept.complete(["c"], 1, lambda batch: [batch[0] * 2])
    kept.complete(["d"], 1, lambda batch: [batch[0] * 2])
    assert sent.read_text().count("\n") == 4

    # A call on another machine reads them, and adds to them.
    forget_all(monkeypatch)
    again = Kept(stored.destination("s3://bucket/out") / "_answers" / "0.jsonl")
    assert again.values == {name: name * 2 for name in "abcd"}


def test_what_a_killed_call_left_goes_with_the_next(server, tmp_path, monkeypatch):
    dead = tmp_path / "cache" / "stores" / ("a" * 16)
    dead.mkdir(parents=True)
    (dead / "half").write_bytes(b"x")
    folder = stored.destination("s3://bucket/out")
    assert not dead.exists()
    mine = stored._scratch[str(folder)]
    forget_all(monkeypatch)
    other = stored.destination("s3://bucket/out")  # another call's, and mine still works
    assert mine.exists() and stored._scratch[str(other)] != mine


def test_a_pack_that_was_stopped_while_it_was_sent_is_not_made_again(
    material, server, monkeypatch, capsys
):
    call = ("pack", "s3://bucket/photos.tar", "--captions", "s3://bucket/photos.csv")
    to = ("--samples-per-shard", 1, "--to", "s3://bucket/packed_photos")
    forget_all(monkeypatch)
    server.requests.clear()
    assert vlp(*call, *to[:-1], "s3://bucket/dry") == 0
    of_tars = [i for i, request in enumerate(server.requests) if ".tar" in request[-4:]]
    forget_all(monkeypatch)
    server.requests.clear()
    server.refused_from = of_tars[-2]
    assert vlp(*call, *to) == 1
    n_sent = len(list((server.root / "packed_photos").glob("*.tar")))
    assert 0 < n_sent <= 4 and not (server.root / "packed_photos" / "_index.bin").exists()
    server.refused_from = None
    before = len(server.requests)
    assert vlp(*call, *to) == 0 and "goes on sending" in capsys.readouterr().out
    put = [request for request in server.requests[before:] if request.startswith("PUT")]
    assert sum(request.endswith(".tar") for request in put) == 4 - n_sent
    assert put[-1].endswith("_index.bin")

    # Another's folder stays as it is, unless it is to be replaced.
    assert vlp(*call, *to) == 1 and "is not empty" in capsys.readouterr().err
    assert vlp(*call, *to[2:], "--overwrite") == 0
    assert len(list((server.root / "packed_photos").glob("*.tar"))) == 1
    assert not (server.root.parent / "cache" / "packs").exists() or not list(
        (server.root.parent / "cache" / "packs").iterdir()
    )
