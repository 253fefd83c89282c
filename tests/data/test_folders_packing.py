"""What `pack` does with unreadable pictures, an interruption, and families of one origin."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.data.folder_material import TEMPLATES, pack, packed, put
from tests.data.material import encoded, picture


@pytest.mark.parametrize(
    "broken",
    [b"", b"no picture at all", encoded(picture(1), "JPEG")[:200], encoded(picture(1))[:80]],
)
def test_a_picture_that_cannot_be_read_is_named_before_anything_is_written(
    tmp_path, capsys, broken
):
    root = put(tmp_path / "t", *(f"cat/{i}.png" for i in range(6)), "dog/1.png")
    put(root, "cat/3.png", data=broken)
    assert pack(root, "--to", tmp_path / "out") == 1

    said = capsys.readouterr().err
    assert "image 'cat/3.png' cannot be used" in said and "nothing was written" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t"]
    assert pack(root, "--to", tmp_path / "out", "--on-missing", "skip") == 0

    said = capsys.readouterr()
    assert (
        "image 'cat/3.png' cannot be used" in said.err
        and "6 images with 0 captions and 2 classes" in said.out
    )
    assert len(packed(tmp_path / "out", **TEMPLATES)) == 6


def test_an_interrupted_pack_leaves_the_earlier_output(tmp_path, monkeypatch):
    from vlp.data.format import ShardWriter

    root = put(tmp_path / "t", "cat/1.png", "dog/1.png")
    assert pack(root, "--to", tmp_path / "out") == 0

    before = (tmp_path / "out" / "00000.tar").read_bytes()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "add", interrupted)
    assert pack(root, "--to", tmp_path / "out", "--overwrite") == 128 + signal.SIGINT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "t"]
    assert (tmp_path / "out" / "00000.tar").read_bytes() == before

    monkeypatch.undo()

    # Killed between its two renames: the earlier output waits under another name and comes back.
    real, calls = Path.rename, []

    def killed(path, target):
        calls.append(path)
        if len(calls) == 2:
            os.kill(os.getpid(), 0)
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    assert pack(root, "--to", tmp_path / "out", "--overwrite") == 128 + signal.SIGINT
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "out", "t"]
    assert len(calls) == 3 and (tmp_path / "out" / "00000.tar").read_bytes() == before

    # What was finished waits for the same command, which writes no picture again.
    monkeypatch.undo()
    monkeypatch.setattr(ShardWriter, "add", interrupted)
    assert pack(root, "--to", tmp_path / "out", "--overwrite") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "t"]
    assert not list((tmp_path / "out").glob("_plan*"))


def test_families_stay_in_one_shard_and_in_one_part(tmp_path):
    rows = [
        {"image": f"{i}.png", "caption": f"c{i}", "origin": f"o{i % 4}" if i < 12 else None}
        for i in range(15)
    ]
    root = put(tmp_path / "p", *(row["image"] for row in rows))
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = ["--captions", tmp_path / "t.jsonl"]
    assert pack(root, *table, "--samples-per-shard", 4, "--to", tmp_path / "out") == 0

    homes: dict[str, set[str]] = {}
    for sample in packed(tmp_path / "out"):
        if sample.meta.get("origin"):
            homes.setdefault(sample.meta["origin"], set()).add(sample.key[:5])
    assert len(homes) == 4 and all(len(shards) == 1 for shards in homes.values())

    parts = []
    for part in ("1/2", "2/2"):
        out = tmp_path / part.replace("/", "of")
        if pack(root, *table, "--part", part, "--to", out) == 0:
            parts.append(packed(out))
    origins = [{sample.meta.get("origin") for sample in part} - {None} for part in parts]
    assert sum(map(len, parts)) == 15 and len(parts) == 2
    assert not origins[0] & origins[1]
