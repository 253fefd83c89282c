"""What img2dataset fetched, with the parquet files beside it: `pack`, `filter` and training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.folder_material import pack, packed, put
from tests.data.material import data_of, encoded, loader_of, picture, write_tar
from vlp.cli import main


def row(i: int) -> dict:
    """A row of img2dataset's parquet; every fourth address failed."""
    is_fetched = i % 4 != 1
    return {
        "similarity": 0.25 + i / 8,
        "tags": ["a", f"b{i}"],
        "caption": f"text {i}",
        "url": f"https://example.org/{i}.jpg?w=3",
        "key": f"0000{i // 4}{i % 4:04d}",
        "status": "success" if is_fetched else "failed_to_download",
        "error_message": None if is_fetched else "HTTP Error 404: Not Found",
        "width": 40 if is_fetched else None,
    }


ROWS = [row(i) for i in range(8)]
FETCHED = [row for row in ROWS if row["status"] == "success"]


def write_tables(root: Path) -> None:
    root.mkdir(exist_ok=True)
    for shard in range(2):
        rows = pyarrow.Table.from_pylist(ROWS[4 * shard : 4 * shard + 4])
        parquet.write_table(rows, root / f"0000{shard}.parquet")
        (root / f"0000{shard}_stats.json").write_text('{"count": 4, "successes": 3}')


@pytest.mark.parametrize("named", ["", "folder", "file"])
def test_pictures_without_texts_take_captions_and_typed_columns_from_the_tables(
    tmp_path, capsys, named
):
    root = tmp_path / "my laion"
    write_tables(root)
    for i, one in enumerate(FETCHED):
        name = f"{one['key'][:5]}/{one['key']}.jpg"
        put(root, name, data=encoded(picture(i), "JPEG"))

    table = {"": [], "folder": ["--captions", root], "file": ["--captions", root / "00001.parquet"]}
    assert pack(root, "--to", tmp_path / "out", *table[named]) == 0
    printed = capsys.readouterr().out
    n_lost = 1 if named == "file" else 2
    assert f"{n_lost} rows were not fetched (failed_to_download {n_lost})" in printed

    expected = FETCHED[3:] if named == "file" else FETCHED
    samples = packed(tmp_path / "out")
    assert [sample.captions for sample in samples] == [(one["caption"],) for one in expected]
    for sample, one in zip(samples, expected, strict=True):
        assert sample.meta["similarity"] == one["similarity"]
        assert sample.meta["tags"] == one["tags"] and sample.meta["width"] == 40

    # Training reads the same table; without it the numbered folders are no classes.
    source = {"name": "folder", "path": str(root)}
    tables = loader_of(data_of(source | {"captions": str(root)}), 6)
    assert len(next(tables).text) == 6
    with pytest.raises(ValueError, match="name its tables: --captions"):
        loader_of(data_of({"name": "classes", "path": str(root)}), 6)


def test_tools_complete_shards_by_the_parquet_beside_them(tmp_path, capsys):
    """Columns that were added to it after the fetch, and captions that the shard lacks; what a
    sample says itself goes before, and a damaged file costs nothing but itself."""
    write_tables(tmp_path / "laion")
    for shard in range(3):
        members = []
        for i, one in enumerate(FETCHED[3 * (shard % 2) :][:3]):
            key = f"0000{shard}{one['key'][5:]}"
            record = {"key": key, "width": 41, "caption": None if i else "its own"}
            members.append((f"{key}.jpg", encoded(picture(i), "JPEG")))
            members.append((f"{key}.json", json.dumps(record).encode()))
        write_tar(tmp_path / "laion" / f"0000{shard}.tar", members)
    (tmp_path / "laion" / "00002.parquet").write_bytes(b"PAR1")

    command = (
        f"data filter {tmp_path}/laion --to {tmp_path}/out --keep similarity>=0.5 --min-side 1"
    )
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert re.search(r"completed from the parquet file beside the shard +6\n", printed)
    assert re.search(r"unreadable: parquet files beside shards +1\n", printed)
    samples = packed(tmp_path / "out")
    captions = ["text 2", "text 3", "its own", "text 6", "text 7"]
    assert [sample.captions for sample in samples] == [(caption,) for caption in captions]
    assert samples[0].meta["tags"] == ["a", "b2"] and samples[0].meta["width"] == 41
