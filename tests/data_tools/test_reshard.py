"""`vlp data reshard`: pictures that are shrunk on the way, and the parquet files beside shards."""

import io
import json
import re

import pyarrow
import pytest
from PIL import ExifTags, Image
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


def test_what_the_json_says_of_a_picture_s_size_is_what_is_written(shards, tmp_path):
    """img2dataset's width and height, by which rules choose; others of these names stay."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = encoded(picture(7, (96, 40)), "JPEG", exif=exif)
    metas = {
        "a": {"width": 96, "height": 40, "original_width": 500},
        "b": {"width": 3, "height": 40},
        "c": {"width": "wide", "height": None},
    }
    (tmp_path / "in").mkdir()
    content = [*members("t", turned, {"caption": "a", "width": 96, "height": 40})]
    for key, meta in metas.items():
        content += members(key, encoded(picture(1, (96, 40))), {"caption": "a", **meta})
    write_tar(tmp_path / "in" / "0.tar", content)
    assert reshard(tmp_path / "in", "--to", tmp_path / "out", "--max-side", 48) == 0
    after = {sample.key: sample.meta for sample in packed(tmp_path / "out")}
    sizes = {key: (meta["width"], meta["height"]) for key, meta in after.items()}
    assert sizes == {"t": (20, 48), "a": (48, 20), "b": (3, 40), "c": ("wide", None)}
    assert after["a"]["original_width"] == 500


def test_a_picture_that_its_new_format_cannot_hold_stays(tmp_path, capsys):
    """AVIF of longer sides is written, and then read by nobody; JPEG ends in an error."""
    (tmp_path / "in").mkdir()
    wide = encoded(Image.new("RGB", (65_501, 1)))
    write_tar(tmp_path / "in" / "0.tar", [*members("w", wide, {"caption": "a"})])
    for kind in ("webp", "avif", "jpeg"):
        assert reshard(tmp_path / "in", "--to", tmp_path / kind, "--format", kind) == 0
        assert [sample.image for sample in packed(tmp_path / kind)] == [wide]
        line = "pictures left as they came, of more pixels a side than their format holds +1\n"
        assert re.search(line, capsys.readouterr().out)


def test_an_unfinished_call_of_a_version_before_goes_on(shards, tmp_path):
    """Settings name pictures only where they change."""
    out = tmp_path / "out"
    assert reshard(shards, "--to", out) == 0
    settings = json.loads((out / "_reshard.json").read_text())["settings"]
    assert set(settings) == {"n_samples", "n_bytes", "shuffle", "renumber"}
