"""`vlp data validate` and `vlp data inspect`."""

from __future__ import annotations

import json
import os

import pytest

from tests.data.material import encoded, picture, write_shards, write_tar
from tests.data.test_hostile import corrupt
from vlp.cli import main
from vlp.data.index import index


@pytest.mark.parametrize("processes", ["1", "2"])
def test_validate_passes_good_shards_and_names_everything_wrong(tmp_path, capsys, processes):
    write_shards(tmp_path / "s", 60, 10)
    assert main(["data", "validate", str(tmp_path / "s"), "--processes", processes]) == 0
    assert "6 shards, 60 good samples, 0 problems in 0 shards" in capsys.readouterr().out

    bad = corrupt(tmp_path / "s", every=15)
    path = tmp_path / "s" / "00001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    image = encoded(picture(1))
    names = ("a.png", "a.txt", "b.png", "c.txt", "a.png")
    write_tar(
        tmp_path / "s" / "00006.tar",
        [(name, image if name.endswith("png") else b"x") for name in names],
    )
    report = tmp_path / "report.json"
    assert (
        main(
            [
                "data",
                "validate",
                str(tmp_path / "s"),
                "--processes",
                processes,
                "--json",
                str(report),
            ]
        )
        == 1
    )

    said, found = capsys.readouterr().out, json.loads(report.read_text())
    for number in bad - set(range(10, 20)):
        assert f"{number // 10:05d}{number % 10:04d}: no readable image" in said
    for reason in (
        "the file ends",
        "left out: it lies beside damage",
        "00001_stats.json says 10,",
        "a: a second sample of this key",
        "b: neither caption nor class",
        "c: no image member",
    ):
        assert reason in said, reason
    by_name = {r["shard"].rpartition("/")[2]: r for r in found["reports"]}
    assert (
        found["shards"] == 7
        and by_name["00006.tar"]["samples"] == 1
        and by_name["00006.tar"]["n_problems"] == 3
    )
    assert found["problems"] == sum(r["n_problems"] for r in found["reports"]) > 8


def test_inspect_names_a_sample_that_changed_after_it_was_indexed(tmp_path, capsys):
    write_shards(tmp_path / "s", 60, 60)
    path = tmp_path / "s" / "00000.tar"
    [shard] = index([path])
    before = path.stat()

    # Sample 1 is none of those that are looked at where the inode changed.
    data = bytearray(path.read_bytes())
    [(offset, length)] = shard.places(1)
    data[offset + length // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert main(["data", "inspect", str(tmp_path / "s"), "--json", str(tmp_path / "i.json")]) == 0

    summary = json.loads((tmp_path / "i.json").read_text())
    assert summary["samples_read"] == 59
    [altered] = summary["altered_samples"]
    assert altered.startswith(f"{path}: the members of ") and altered in capsys.readouterr().out


def test_inspect_tells_counts_and_distributions(tmp_path, capsys):
    write_shards(tmp_path / "s", 25, 10)
    assert main(["data", "inspect", str(tmp_path / "s"), "--json", str(tmp_path / "i.json")]) == 0

    found = json.loads((tmp_path / "i.json").read_text())
    assert (found["shards"], found["samples"], found["samples_read"], found["left_out"]) == (
        3,
        25,
        25,
        0,
    )
    assert (
        found["width_px"]["median"] == 40
        and found["height_px"]["max"] == 36
        and found["image_types"] == {"png": 25}
    )
    assert found["captions_a_sample"]["min"] == 2 and found["words_a_caption"]["max"] == 3
    assert (
        found["json_fields"] == {"captions": 25, "key": 25, "number": 25}
        and found["unreadable_images"] == []
    )
    assert "words a caption" in capsys.readouterr().out
