"""`vlp data reshard`: pictures that are shrunk on the way, and the parquet files beside shards."""

import io
import json
import re

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from tests.data.folder_material import packed
from tests.data.material import encoded, picture, write_tar
from vlp.cli import main


def reshard(*arguments):
    return main(["data", "reshard", *map(str, arguments)])


def members(key, data, record):
    return [(f"{key}.jpg", data), (f"{key}.json", json.dumps(record).encode())]


def size(data):
    return Image.open(io.BytesIO(data)).size


@pytest.fixture
def shards(tmp_path):
    """Two shards with parquet files as img2dataset writes them; the second file is damaged."""
    folder = tmp_path / "my shards"
    folder.mkdir()
    for shard in range(3):
        keys = [f"0000{shard}{i:04d}" for i in range(4)]
        content = []
        for i, key in enumerate(keys):
            data = encoded(picture(i, (96, 40)), "JPEG")
            content += members(key, data, {"key": key, "caption": f"text {key}", "width": 96})
        write_tar(folder / f"0000{shard}.tar", content)
        rows = [
            {"key": key, "url": "u", "status": "success", "similarity": i / 8, "width": 5}
            for i, key in enumerate(keys)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"0000{shard}.parquet")
    (folder / "00001.parquet").write_bytes(b"PAR1")
    return folder


@pytest.mark.parametrize("shuffle", [[], ["--shuffle", 3]])
def test_samples_are_completed_from_the_parquet_beside_their_shard(
    shards, tmp_path, capsys, shuffle
):
    out = tmp_path / "out"
    assert reshard(shards, "--to", out, "--samples-per-shard", 5, *shuffle) == 0
    assert re.search(
        r"completed from the parquet file beside the shard +8\n", capsys.readouterr().out
    )
    samples = packed(out)
    n_compared = 0
    for sample in samples:
        expected = None if sample.key[4] == "1" else int(sample.key[-1]) / 8
        assert sample.meta.get("similarity") == expected
        assert sample.meta["width"] == 96  # what a sample says itself goes before
        n_compared += 1
    assert n_compared == 12
    assert ([sample.key for sample in samples] == sorted(s.key for s in samples)) == (not shuffle)


def test_pictures_are_shrunk_once_and_the_loss_is_stated(shards, tmp_path, capsys):
    broken = [*members("00003b", b"no picture", {"caption": "a"})]
    wrong = {"caption": "a", "negatives": ["b"]}
    png = encoded(picture(5, (64, 80)))
    small = encoded(picture(6, (30, 40)), "WEBP")
    with_negative = [*members("00003n", small, wrong), ("00003n.negative.0.png", png)]
    write_tar(shards / "00003.tar", [*broken, *with_negative])

    out = tmp_path / "out"
    assert reshard(shards, "--to", out, "--max-side", 48, "--quality", 80) == 0
    printed = capsys.readouterr().out
    before, after = 12 * 96 * 40 + 64 * 80 + 30 * 40, 12 * 48 * 20 + 38 * 48 + 30 * 40
    assert f"shrunk 13 of 15 images, encoded 13 anew; pixels {before:,} → {after:,}" in printed
    assert re.search(r"pictures left as they came, which do not open +1\n", printed)

    samples = {sample.key: sample for sample in packed(out)}
    assert len(samples) == 14
    assert {size(s.image) for key, s in samples.items() if key < "00003"} == {(48, 20)}
    # What fits keeps its bytes, and so does what does not open.
    assert samples["00003n"].image == small and samples["00003b"].image == b"no picture"
    assert size(samples["00003n"].negative_images[0]) == (38, 48)

    # Another call with other pictures would mix them.
    assert reshard(shards, "--to", out, "--max-side", 40) == 1
    assert "was made from other input or settings" in capsys.readouterr().err
    assert reshard(shards, "--to", tmp_path / "none", "--max-side", 0) == 1
    assert "--max-side 0 must be at least 1 pixel" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_unfinished_call_of_a_version_before_goes_on(shards, tmp_path):
    """Settings name pictures only where they change."""
    out = tmp_path / "out"
    assert reshard(shards, "--to", out) == 0
    settings = json.loads((out / "_reshard.json").read_text())["settings"]
    assert set(settings) == {"n_samples", "n_bytes", "shuffle", "renumber"}
