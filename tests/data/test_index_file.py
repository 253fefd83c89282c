"""The index at scale: a start reads its header only, processes share it, and what happens to the
file while a run goes on costs nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from tests.data.material import data_of, encoded, loader_of, picture, write_shards, write_tar
from vlp.config import Captions
from vlp.data import index as index_module
from vlp.data import index_file
from vlp.data.captions import form_of
from vlp.data.format import ShardWriter
from vlp.data.index import index
from vlp.data.index_file import NAME, open_index, parse_index, save_index
from vlp.data.rows import EXTENT, READER, ROW
from vlp.data.sources import _stored_rows
from vlp.data.sources._remote_index import list_shards
from vlp.data.sources.remote import Options as RemoteOptions
from vlp.data.sources.remote import open as open_remote
from vlp.data.sources.shards import Options, Shards
from vlp.data.sources.shards import open as open_shards
from vlp.data.summary import summarize

# Of constant bytes: what earlier versions kept of it is written down here.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

# A loader's state at step 2, and the samples that followed, as the version before gave them.
STATE_BEFORE: dict[str, Any] = {
    "step": 2,
    "samples": 25,
    "batch": 6,
    "seed": 3,
    "shuffle": True,
    "weights": [None],
    "sources": "d3ffe111c75ecc3d",
    "captions": "654774edc4ed332e",
    "together": 1,
    "replacement": False,
    "content": ["a1a2b883fb240dbe862a8748"],
}
SAMPLES_BEFORE = [10, 2, 19, 14, 15, 18]


def constant_shards(folder: Path, n: int, per_shard: int) -> Path:
    with ShardWriter(folder, per_shard) as writer:
        for i in range(n):
            writer.add(f"k{i}", PIXEL, "png", [f"caption {i}", "other"], {"score": i / 2})
    return folder


def opened(folder: Path, **options) -> Shards:
    return open_shards(Options(str(folder)), Captions(**options))


def keys_of(source: Shards) -> list[str]:
    return [source[i].key for i in range(len(source))]


def write_version_5(folder: Path) -> None:
    """The index of a folder as the version before wrote it."""
    place = folder / index_file.NAME
    header, body = [], b""
    for shard in parse_index(place.read_bytes()).values():
        kept = {name: value for name, value in vars(shard).items() if value or name == "count"}
        for name in ("rows", "extents", "kinds", "order", "stored"):
            kept.pop(name, None)
        header.append({**kept, "n_extents": len(shard.extents) // EXTENT.size})
        body += shard.rows + shard.extents
    encoded = json.dumps(header).encode()
    content = len(encoded).to_bytes(8, "little") + encoded + body
    magic = index_file._magic(5)
    place.write_bytes(magic + hashlib.sha256(content).digest() + content)


def test_a_run_of_the_version_before_goes_on(tmp_path):
    folder = constant_shards(tmp_path, 25, 10)
    loader = loader_of(data_of(folder), 6)
    assert {name for name, value in loader.state_dict().items() if value != STATE_BEFORE[name]} == {
        "sources",
        "step",
    }

    loader.load_state_dict(STATE_BEFORE)
    assert next(loader).sample_id.tolist() == SAMPLES_BEFORE

    # What was compared then is compared now: here the texts are others of the same length.
    write_tar(folder / "00002.tar", [("k20.png", PIXEL), ("k20.txt", b"x")])
    (folder / "00002_stats.json").unlink()
    changed = loader_of(data_of(folder), 6)
    with pytest.raises(Exception, match="sources was"):
        changed.load_state_dict(STATE_BEFORE)


def test_an_index_of_the_version_before_is_read_and_written_anew(tmp_path, monkeypatch, capsys):
    folder = constant_shards(tmp_path, 25, 10)
    paths = sorted(folder.glob("*.tar"))
    expected, written = index(paths), (folder / index_file.NAME).read_bytes()
    write_version_5(folder)

    monkeypatch.setattr(index_module, "scan", lambda path: pytest.fail(f"{path} was read"))
    assert index(paths) == expected
    assert "of an older version; it is written anew" in capsys.readouterr().err
    assert (folder / index_file.NAME).read_bytes() == written
    assert index(paths) == expected
    assert not capsys.readouterr().err


def test_a_start_reads_no_rows(tmp_path):
    folder = constant_shards(tmp_path, 25, 10)
    place = folder / index_file.NAME
    source, data = opened(folder), bytearray(place.read_bytes())
    rows_at = len(data) - 25 * 24
    data[rows_at:] = bytes(25 * 24)
    place.write_bytes(data)

    blind = opened(folder)
    assert (len(blind), blind.labels) == (25, {"score"}) and blind.counts().tolist() == [10, 10, 5]
    assert blind.fingerprint() == source.fingerprint()
    # Their check sums tell, and the tars are scanned.
    assert keys_of(blind) == keys_of(source)


def test_rows_that_no_index_holds_are_found_in_the_tar_or_refused(tmp_path):
    folder = constant_shards(tmp_path, 25, 10)
    source = opened(folder)
    expected = keys_of(source)
    (folder / index_file.NAME).unlink()

    # As in a loader process, which has not opened the index yet.
    received = pickle.loads(pickle.dumps(source))
    index_file._handles.clear()
    assert keys_of(received) == expected

    write_tar(folder / "00001.tar", [("a.png", PIXEL), ("a.txt", b"one")])
    received = pickle.loads(pickle.dumps(source))
    index_file._handles.clear()
    assert received[0].key == expected[0]
    with pytest.raises(ValueError, match=r"00001\.tar is not what was indexed when the run began"):
        received[10]


def damage_rows(place: Path, n_samples: int) -> None:
    data = place.read_bytes()
    place.write_bytes(data[: -n_samples * 24] + bytes(n_samples * 24))


def test_damaged_rows_are_mended_where_they_are_met(tmp_path, capsys):
    folder = constant_shards(tmp_path, 25, 10)
    place = folder / index_file.NAME
    expected, good = keys_of(opened(folder)), place.read_bytes()
    damage_rows(place, 25)
    assert keys_of(opened(folder)) == expected and place.read_bytes() == good
    assert capsys.readouterr().err.count("the index mended") == 1

    # Nothing is left to mend.
    assert keys_of(opened(folder)) == expected
    assert "mended" not in capsys.readouterr().err


def test_damaged_rows_are_never_used_however_many_shards_have_them(tmp_path, monkeypatch, capsys):
    """Of an index that cannot be written. What was read from the tars instead may make room."""
    folder = constant_shards(tmp_path, 25, 10)
    place = folder / index_file.NAME
    expected = keys_of(opened(folder))
    damage_rows(place, 25)
    damaged = place.read_bytes()

    monkeypatch.setattr(_stored_rows, "_KEPT_SHARDS", 1)
    source = opened(folder)
    index_file._handles.clear()
    # Root may write whatever the mode says, but to no folder.
    aside = place.rename(tmp_path / "aside")
    in_turn = [0, 10, 20, 1, 11, 21]
    assert [source[i].key for i in in_turn] == [expected[i] for i in in_turn]
    assert capsys.readouterr().err.count("the tar is read again") == 1
    assert aside.read_bytes() == damaged and not place.exists()


def test_damaged_rows_of_remote_shards_go_so_that_the_next_start_has_whole_ones(
    tmp_path, monkeypatch
):
    folder = constant_shards(tmp_path / "data", 5, 5)
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    options = RemoteOptions(f"file://{folder}/")
    open_remote(options, Captions())
    (copy,) = (tmp_path / "cache" / "index").glob("*.bin")
    damage_rows(copy, 5)

    # Where a shard is here already, its rows are written back.
    index_file._handles.clear()
    assert open_remote(options, Captions())[3].key == "k3"
    assert open_remote(options, Captions()).n_captions().tolist() == [2] * 5

    damage_rows(copy, 5)
    index_file._handles.clear()
    damaged = open_remote(options, Captions())
    with pytest.raises(ValueError, match=rf"{copy} is of no use .* its copy is removed; start"):
        damaged.n_captions()
    assert not copy.exists()
    index_file._handles.clear()
    assert open_remote(options, Captions()).n_captions().tolist() == [2] * 5


def test_shards_of_a_machine_whose_clock_is_ahead_are_indexed_once(tmp_path, monkeypatch):
    """Times are compared with those that the index noted, not with this machine's clock."""
    folder = constant_shards(tmp_path, 25, 10)
    (folder / index_file.NAME).unlink()
    for path, time_s in zip(sorted(folder.glob("*.tar")), (4e9, 0, 1e9), strict=True):
        os.utime(path, (time_s, time_s))
    expected = keys_of(opened(folder))
    os.utime(folder / index_file.NAME, (0, 0))
    monkeypatch.setattr(index_module, "scan", lambda path: pytest.fail(f"{path} was read"))
    assert keys_of(opened(folder)) == expected


def test_an_index_that_another_run_replaces_goes_on_to_be_read(tmp_path, monkeypatch):
    folder = constant_shards(tmp_path, 25, 10)
    source = opened(folder)
    expected = keys_of(source)

    # Another shard moves the rows of all others.
    write_tar(folder / "00000a.tar", [("new.png", PIXEL), ("new.txt", b"new")])
    assert len(opened(folder)) == 26
    monkeypatch.setattr(_stored_rows, "scan", lambda path: pytest.fail(f"{path} was read"))
    assert keys_of(source) == expected  # through the file that was opened before

    received = pickle.loads(pickle.dumps(source))
    index_file._handles.clear()
    assert keys_of(received) == expected  # through the new one


def test_samples_without_text_are_left_out_by_kind(tmp_path):
    members = []
    for i in range(9):
        members.append((f"{i}.png", PIXEL))
        members += [(f"{i}.txt", b"text")] if i % 3 else []
        members += [(f"{i}.json", b'{"class": "dog", "origin": %d}' % (i // 3))] if i % 2 else []
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", [("x.png", PIXEL), ("x.txt", b"text")])

    dropped = opened(tmp_path, missing="drop")
    assert keys_of(dropped) == ["1", "2", "4", "5", "7", "8", "x"] and dropped.n_left_out == 3
    named = opened(tmp_path, missing="drop", class_templates=["a {}"])
    assert keys_of(named) == ["1", "2", "3", "4", "5", "7", "8", "x"] and named.n_left_out == 2
    assert named[2].captions == ("a dog",)
    assert named.n_captions().tolist() == [1] * 8
    assert pickle.loads(pickle.dumps(named))[7].key == "x"


MAKE = """
import os, sys, time
from pathlib import Path
from vlp.data import index as module
folder, dies = Path(sys.argv[1]), sys.argv[2] == "True"
module._SAVED_AFTER_S, scan = 0.0, module.scan
def scan_one(path):
    print("scans", flush=True)
    time.sleep(0.5)
    if dies and path.name == "00001.tar":
        os._exit(9)
    return scan(path)
module.scan = scan_one
module.index(sorted(folder.glob("*.tar")))
"""


@pytest.mark.parametrize("dies", [False, True])
def test_one_process_makes_the_index_and_the_others_wait_for_it(
    tmp_path, monkeypatch, capsys, dies
):
    folder = constant_shards(tmp_path / "data", 10, 5)
    (folder / index_file.NAME).unlink()
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "_TOLD_AFTER_S", 0.0)
    scanned: list[str] = []
    scan = index_module.scan
    monkeypatch.setattr(index_module, "scan", lambda path: scanned.append(path.name) or scan(path))

    command = [sys.executable, "-c", MAKE, str(folder), str(dies)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"scans\n"
        assert [shard.count for shard in index(sorted(folder.glob("*.tar")))] == [5, 5]

    # What the other one did before it died is not done again: its lock ended with it.
    assert scanned == (["00001.tar"] if dies else [])
    told = capsys.readouterr().err
    assert re.search(r"waiting for the index of \S+data \(\d+ s\): ", told)
    assert "Ctrl-C ends this process only" in told and f"process {other.pid} on" in told


def test_a_copy_of_another_index_is_not_taken_for_damage(tmp_path):
    """Rows are copied from one file to the next without being read whole."""
    folder = constant_shards(tmp_path, 25, 10)
    shards = index_module.located(sorted(folder.glob("*.tar")))
    before = parse_index((folder / index_file.NAME).read_bytes())
    save_index(tmp_path / "copy.bin", {shard.name: shard for shard in shards})
    assert parse_index((tmp_path / "copy.bin").read_bytes()) == before
    assert all(not shard.rows and shard.stored for shard in shards)


def test_many_remote_shards_are_listed_at_once(monkeypatch):
    store = fsspec.filesystem("memory")
    for i in range(70):
        store.pipe(f"/many/{i:05d}.tar", bytes(i + 1))
    asked: list[str] = []
    info = type(store).info
    monkeypatch.setattr(
        type(store), "info", lambda self, path, **kw: asked.append(path) or info(self, path, **kw)
    )

    for path in ("memory://many/{00000..00069}.tar", "memory://many/"):
        urls, infos = list_shards(path, {})
        assert [entry["size"] for entry in infos] == list(range(1, 71)) and len(urls) == 70
    n_listed = len(asked)
    # A few of them: the folder may hold a million others.
    _, infos = list_shards("memory://many/{00000..00003}.tar", {})
    assert [entry["size"] for entry in infos] == [1, 2, 3, 4]
    assert n_listed < 10 and len(asked) == n_listed + 4
    with pytest.raises(ValueError, match="no shard at"):
        list_shards("memory://many/{00000..00070}.tar", {})


def test_a_store_that_may_not_be_listed_is_asked_for_each_shard(monkeypatch):
    store = fsspec.filesystem("memory")
    for i in range(70):
        store.pipe(f"/closed/{i:05d}.tar", bytes(i + 1))

    def refuse(self, path, **options):
        raise PermissionError(path)

    monkeypatch.setattr(type(store), "ls", refuse)
    _, infos = list_shards("memory://closed/{00000..00069}.tar", {})
    assert [entry["size"] for entry in infos] == list(range(1, 71))


def test_the_index_beside_remote_shards_is_copied_once(tmp_path, monkeypatch):
    folder = constant_shards(tmp_path / "data", 25, 10)
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    options = RemoteOptions(f"file://{folder}/")

    # Of the version before as of this one; another index is another copy.
    expected_copies = []
    for rewrite in (write_version_5, lambda folder: index(sorted(folder.glob("*.tar")))):
        rewrite(folder)
        sources = [open_remote(options, Captions()) for _ in range(2)]
        copies = sorted((tmp_path / "cache" / "index").glob("*.bin"))
        assert set(expected_copies) < set(copies) and len(copies) == len(expected_copies) + 1
        assert [[source[i].key for i in range(25)] for source in sources] == 2 * [
            [f"k{i}" for i in range(25)]
        ]
        expected_copies = copies
    assert len(expected_copies) == 2


def test_shards_of_samples_are_found_by_counts(tmp_path):
    source = opened(write_shards(tmp_path, 25, 10))
    shards = source.shards_of(np.arange(25)).tolist()
    assert shards == [0] * 10 + [1] * 10 + [2] * 5 == [source.shard_of(i) for i in range(25)]


def test_an_index_by_a_reader_that_passed_texts_over_is_made_anew(tmp_path):
    members = [("0.png", encoded(picture(0))), ("0.caption", b"a text")]
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", [("1.png", encoded(picture(1))), ("1.txt", b"plain")])
    paths = [tmp_path / "0.tar", tmp_path / "1.tar"]
    shards = index(paths)

    # As the reader before wrote it: the first tar without its caption.
    for shard in shards:
        shard.reader = 0
    shards[0].left_out = {"members .txt ": 1}
    assert shards[0].is_outdated() and not shards[1].is_outdated()
    shards[0].left_out = {"members .caption": 1}
    shards[0].rows, shards[0].forms = shards[0].rows[: ROW.size], [{}]
    save_index(tmp_path / NAME, {shard.name: shard for shard in shards})

    assert set(open_index(tmp_path / NAME)) == {"1.tar"}
    again = index(paths)
    assert again[0].reader == READER and again[0].left_out == {} and again[0].forms[0]
    assert again[1].reader == 0, "others are not read again"


def test_a_caption_of_an_earlier_reader_that_is_none_is_told(tmp_path):
    boxes = ("0.png", encoded(picture(0))), ("0.txt", b"0 0.5 0.5 0.25 0.125")
    path = write_tar(tmp_path / "0.tar", boxes)
    shards = index([path])
    shards[0].reader, shards[0].left_out = 0, {}
    # As if the boxes were a caption.
    shards[0].forms = [form_of({}, "0 0.5 0.5 0.25 0.125")]
    summarize(shards[0])
    save_index(tmp_path / NAME, {shard.name: shard for shard in shards})

    source = open_shards(Options(str(tmp_path)), Captions())
    with pytest.raises(
        ValueError, match=r"no caption any more \(a \.txt of boxes\); remove the ind"
    ):
        source[0]
