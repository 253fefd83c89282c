"""A path in a store behaves as a path of `pathlib` does, in every Python: their insides differ."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import fsspec
import pytest

from tests.data.plain_store import Plain
from vlp.data import stored, stores
from vlp.data.stored import StoredPath
from vlp.files import write_atomically

PLACE = "plain://in/a b/ä#1?.tar"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Plain, "root", str(tmp_path / "root"))
    for module, name in ((stored, "_scratch"), (stored, "_growing"), (stores, "_listed")):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(stored, "_compared", set())
    fsspec.register_implementation("plain", Plain, clobber=True)
    file = tmp_path / "root" / "in" / "a b" / "ä#1?.tar"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"shard")
    return tmp_path / "root"


def test_names():
    path = StoredPath(PLACE)
    folder = StoredPath("plain://in")
    expected = {
        str(path): PLACE,
        path.name: "ä#1?.tar",
        path.suffix: ".tar",
        str(path.parent): "plain://in/a b",
        str(path.parents[1]): "plain://in",
        str(folder / "a b" / "ä#1?.tar"): PLACE,
        str(folder.joinpath("a b", "x.json")): "plain://in/a b/x.json",
        str(folder / "/".join(["a", "b"])): "plain://in/a/b",
        str(path.with_name("00001.tar")): "plain://in/a b/00001.tar",
        str(path.with_suffix(".parquet")): "plain://in/a b/ä#1?.parquet",
        str(path.relative_to(folder)): "a b/ä#1?.tar",
        str(folder / path.relative_to(folder)): PLACE,
        str(StoredPath(path)): PLACE,
        str(StoredPath(*path.parts)): PLACE,
        path.as_posix(): PLACE,
        str(path.absolute()): PLACE,
        str(path.resolve()): PLACE,
        str(path.expanduser()): PLACE,
        f"{path}": PLACE,
        repr(path): f"StoredPath('{PLACE}')",
    }
    assert list(expected) == list(expected.values()) and len(expected) > 10
    assert all(type(made) is StoredPath for made in (path.parent, path / "x", path.with_name("x")))
    assert path.is_relative_to(folder) and not folder.is_relative_to(path)
    assert path == StoredPath(PLACE) and hash(path) == hash(StoredPath(PLACE))
    assert path != folder and sorted([path, folder]) == [folder, path]
    assert path.is_absolute()


def test_files_of_a_source(root):
    path, folder = StoredPath(PLACE), StoredPath("plain://in")
    assert path.exists() and path.is_file() and not path.is_dir()
    assert folder.exists() and folder.is_dir() and not folder.is_file()
    assert path.stat().st_size == 5
    assert path.stat().st_mtime_ns == path.stat().st_mtime_ns > 0
    assert path.read_bytes() == b"shard" and path.read_text() == "shard"
    with path.open("rb") as by_path, open(path, "rb") as by_name:
        assert by_path.read() == by_name.read() == b"shard"
    assert os.path.exists(os.fspath(path))

    assert list(folder.iterdir()) == [path.parent]
    assert list(path.parent.glob("*.tar")) == list(folder.rglob("*.tar")) == [path]
    assert list(folder.glob("*.tar")) == []
    assert pickle.loads(pickle.dumps(path)) == path

    absent = path.with_name("none.tar")
    assert not absent.exists()
    for ask in (absent.stat, absent.read_bytes):
        with pytest.raises(FileNotFoundError):
            ask()


def test_files_of_a_destination(root):
    folder = stored.destination("plain://out/x y")
    note = folder / "_made.json"
    assert not note.exists() and not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, b"{}")
    assert (root / "out" / "x y" / "_made.json").read_bytes() == b"{}"
    assert note.exists() and folder.is_dir() and note.read_text(encoding="utf-8") == "{}"
    assert note.stat().st_size == 2 and list(folder.glob("*.json")) == [note]

    sent = pickle.loads(pickle.dumps([folder, note]))
    assert sent == [folder, note] and sent[1].read_bytes() == b"{}"
    note.unlink()
    assert not note.exists() and not (root / "out" / "x y" / "_made.json").exists()
    note.unlink(missing_ok=True)


def test_no_name_of_a_store_leads_out_of_the_scratch_folder(root):
    folder = stored.destination("plain://bucket/out")
    path = folder / ".." / ".." / ".." / "person.json"
    assert path.local().resolve().is_relative_to(stored._scratch[str(folder)].resolve())
    assert path.local() != (folder / ".." / ".." / "person.json").local()
    with pytest.raises(ValueError, match="no folder above another"):
        stored.destination("plain://bucket/out/../in")
