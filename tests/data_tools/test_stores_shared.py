"""Who else works with a store: calls, processes, training; and what lies on this machine."""

from __future__ import annotations

import json
import pickle
import socket
import threading
import time

import pytest

from tests.data.material import data_of, loader_of
from tests.data_tools.in_stores import (
    FILTER,
    content,
    dead_process,
    forget_all,
    local,
    options,
    vlp,
)
from vlp.data import stored, stores
from vlp.data.stored import StoredPath
from vlp.data_tools._run import writers
from vlp.data_tools._run.kept import Kept
from vlp.data_tools._run.writers import writing
from vlp.data_tools.pack.stored_draft import StoredDraft
from vlp.files import write_atomically
from vlp.locks import InUse

# ---- two calls, several processes, other addresses


def test_parts_share_the_work(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", "--min-words", 2)
    call = ("filter", "s3://bucket/in", "--min-words", 2, "--to", "s3://bucket/out")
    assert vlp(*call, "--part", "1/2") == 0
    assert vlp(*call, "--part", "2/2") == 0
    assert content(server.root / "out") == here


def test_addresses_with_signatures_are_read_and_written_nowhere(server, tmp_path, capsys):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    host = server.url.replace("http://", "http://anna:PLANTED0@")
    shards = f"{host}/in/{{00000..00002}}.tar?X-Amz-Signature=PLANTED1&X-Amz-Credential=PLANTED2"
    storage = ("--storage", "s3:token=PLANTED3")
    to = ("--to", "s3://bucket/out")
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


def test_a_path_takes_along_what_opens_it(server, monkeypatch):
    host = server.url.replace("http://", "http://anna:secret@")
    signed = stored.source(f"{host}/in/00000.tar?sig=1")
    out = stored.destination("s3://bucket/out")
    write_atomically(out / "a.json", b"{}")
    sent = pickle.dumps([signed, out / "a.json", signed.with_suffix(".parquet")])
    assert "secret" not in f"{signed} {signed!r} {signed.parent}"

    # Another process, of another machine: it has neither copies nor options.
    for copy in stored._scratch[str(out)].rglob("*.json"):
        copy.unlink()
    monkeypatch.setattr(stores, "options", {})
    forget_all(monkeypatch)
    path, note, beside = pickle.loads(sent)
    assert path.read_bytes() == (server.root / "in" / "00000.tar").read_bytes()
    assert note.read_bytes() == b"{}" and note.parent == out and not beside.exists()
    write_atomically(note.with_name("b.json"), b"[]")
    assert (server.root / "out" / "b.json").read_bytes() == b"[]"


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
    monkeypatch.setattr(writers, "BEAT_S", 0.05)

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
    # They are watched for long, so that on a busy machine, too, their notes change meanwhile.
    monkeypatch.setattr(writers, "BEAT_S", 0.3)
    monkeypatch.setattr(writers, "is_alive", lambda pid: True)
    stored.destination(str(folder))
    with writing(folder, advice=advice, part=(1, 2)):
        monkeypatch.setattr(writers, "_held", set())
        with writing(folder, advice=advice, part=(2, 2)):
            for part in ((1, 2), (1, 1), (1, 3)):
                monkeypatch.setattr(writers, "_held", set())
                with pytest.raises(InUse), writing(folder, advice=advice, part=part):
                    pass


def test_nobody_waits_for_a_call_that_has_ended(server, monkeypatch):
    note = server.root / "out" / ".writer-1-of-1.json"
    note.parent.mkdir()
    note.write_text('{"id": "x", "pid": 1, "host": "elsewhere", "command": "vlp data …"}')
    pauses = []

    def ends_meanwhile(seconds: float) -> None:
        pauses.append(seconds)
        note.unlink(missing_ok=True)

    monkeypatch.setattr(writers.time, "sleep", ends_meanwhile)
    folder = stored.destination("s3://bucket/out")
    writers._wait_for_others(folder, (1, 1), "Wait")
    assert pauses == [writers.BEAT_S / 4]


# ---- what lies on this machine meanwhile


def test_a_file_that_grows_is_sent_before_what_is_made_of_it(server, monkeypatch):
    folder = stored.destination("s3://bucket/out")
    kept = Kept(folder / "_answers" / "0.jsonl")
    kept.complete(["a", "b"], 1, lambda batch: [batch[0] * 2])
    assert not (server.root / "out").exists()  # not yet
    # Nor by the note of who writes, which another thread brings up to date meanwhile.
    write_atomically(folder / ".writer-1-of-1.json", b"{}")
    assert not (server.root / "out" / "_answers").exists()
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
    scratch = stored._scratch[str(folder)]
    forget_all(monkeypatch)
    other = stored.destination("s3://bucket/out")  # another call, beside the one that works
    assert scratch.exists() and stored._scratch[str(other)] != scratch


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
    put = [one for one in server.requests[before:] if "PUT" in one and ".writer" not in one]
    assert sum(request.endswith(".tar") for request in put) == 4 - n_sent
    assert put[-1].endswith("_index.bin")

    # Another's folder stays as it is, unless it is to be replaced.
    assert vlp(*call, *to) == 1 and "is not empty" in capsys.readouterr().err
    assert vlp(*call, *to[2:], "--overwrite") == 0
    assert len(list((server.root / "packed_photos").glob("*.tar"))) == 1
    assert not (server.root.parent / "cache" / "packs").exists() or not list(
        (server.root.parent / "cache" / "packs").iterdir()
    )


@pytest.mark.parametrize("method", ["DELETE", pytest.param("PUT", marks=pytest.mark.slow)])
def test_a_stopped_pack_neither_leaves_earlier_shards_nor_sends_earlier_input(
    method, material, server, tmp_path, monkeypatch
):
    call = ("pack", "s3://bucket/photos.tar", "--captions", "s3://bucket/photos.csv", "--to")
    again = ("--overwrite",)
    for name in ("dry", "out"):
        assert vlp(*call, f"s3://bucket/made/{name}", "--samples-per-shard", 1) == 0

    # Stopped while it removes the earlier pack, or while it sends its own.
    here = ("pack", material / "photos.tar", "--captions", material / "photos.csv")
    forget_all(monkeypatch)
    server.requests.clear()
    assert vlp(*call, "s3://bucket/made/dry", *again) == 0
    stops = [
        i
        for i, request in enumerate(server.requests)
        if request.startswith(method) and ".writer" not in request
    ]
    forget_all(monkeypatch)
    server.requests.clear()
    server.refused_from = stops[1]
    assert vlp(*call, "s3://bucket/made/out", *again) == 1

    server.refused_from = None
    captions = material / "photos.csv"
    captions.write_text(captions.read_text().replace(",a ", f",{method} "))
    forget_all(monkeypatch)
    assert vlp(*call, "s3://bucket/made/out", *again) == 0
    assert vlp(*here, "--to", tmp_path / method) == 0
    there = content(server.root / "made" / "out")
    there.pop(".writer-1-of-1.json", None)
    assert there == content(tmp_path / method)


def test_unfinished_shards_of_any_layout_are_counted(server):
    target = stored.destination("s3://bucket/pack")
    draft = StoredDraft(target, "of these settings", overwrite=False)
    draft.make_room()
    # clip_benchmark's lie in the split's folder.
    for path in (target / "00000.tar", target / "test" / "0.tar"):
        write_atomically(path, b"a shard")
    assert len(draft.finished()) == 2
    draft.discard()
    assert content(server.root / "pack") == {}
