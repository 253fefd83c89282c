"""Files have the user's rights, and a disk without room leaves neither parts nor holes."""

import errno
import json
import os
import resource
import stat
from pathlib import Path

import pytest
import torch

from vlp import files, log
from vlp.cli import main
from vlp.data.format import ShardWriter

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def small_files():
    """No file may grow beyond 20,000 bytes: a full disk, for users who may mount nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_writer_names_its_file_and_takes_back_what_it_began(tmp_path, small_files):
    (tmp_path / "kept").write_bytes(b"old")
    (tmp_path / "metrics.jsonl").write_text("")
    metrics = log.Metrics(tmp_path / "metrics.jsonl")
    writer = ShardWriter(tmp_path)

    def shard():
        with writer:
            for _ in range(9):
                writer.add(None, b"x" * 5000, "jpg", ["a caption"])

    def lines():
        for step in range(9):
            metrics.write(step, "train", {"text": "x" * 5000})

    writers = {
        "kept": lambda: files.write_atomically(tmp_path / "kept", bytes(30_000)),
        "a.safetensors": lambda: files.save_tensors(
            {"a": torch.zeros(9000)}, tmp_path / "a.safetensors"
        ),
        "00000.tar": shard,
        "metrics.jsonl": lines,
    }
    for name, write in writers.items():
        with pytest.raises(OSError) as caught:
            write()
        assert caught.value.errno == errno.EFBIG and Path(caught.value.filename).name == name, name
    assert (tmp_path / "kept").read_bytes() == b"old"
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "metrics.jsonl"}


@pytest.mark.parametrize("umask", [0o027, 0o002, 0o077])
def test_all_that_is_written_has_the_users_rights(small_world, tmp_path, umask, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        commands = [
            ["train", str(small_world["config"]), f"out={tmp_path / 'run'}"],
            ["export", str(tmp_path / "run"), "--to", str(tmp_path / "export")],
            [
                "data",
                "embed",
                str(small_world["shards"]),
                "--model",
                str(tmp_path / "run"),
                "--to",
                str(tmp_path / "embed"),
            ],
            [
                "data",
                "filter",
                str(small_world["shards"]),
                "--min-words",
                "1",
                "--to",
                str(tmp_path / "filter"),
            ],
            ["data", "pack", str(small_world["pictures"]), "--to", str(tmp_path / "pack")],
            ["data", "stats", str(small_world["shards"]), "--to", str(tmp_path / "stats")],
            ["report", str(tmp_path / "run"), "--no-model"],
        ]
        assert [main(command) for command in commands] == [0] * 7
    finally:
        os.umask(before)
    written = list(tmp_path.rglob("*"))
    wrong = {
        str(path): oct(stat.S_IMODE(path.stat().st_mode))
        for path in written
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong and len(written) > 40
    assert sum(path.suffix == ".safetensors" for path in written) >= 7


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    for name in (".metrics.jsonl.0123.tmp", ".hidden", "mine.tmp"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "mine.tmp"]
