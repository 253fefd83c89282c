"""What img2dataset fetched, with the parquet files beside it: `pack`, `filter` and training."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.folder_material import pack, packed, put
from tests.data.material import data_of, encoded, loader_of, picture, write_tar
from vlp.cli import main
from vlp.data.tables import fetched, pictured
from vlp.data_tools.pack.write import WriteShard


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


def write_tables(root: Path, rows: list[dict] = ROWS, **pictures: list[bytes | None]) -> Path:
    """The tables of two shards; `pictures`: a column of bytes by its name, as `output_format:
    parquet` has one."""
    root.mkdir(exist_ok=True)
    for shard in range(2):
        part = slice(4 * shard, 4 * shard + 4)
        table = pyarrow.Table.from_pylist(rows[part])
        for name, data in pictures.items():
            table = table.append_column(name, pyarrow.array(data[part], pyarrow.binary()))
        # Of several row groups, as img2dataset writes a hundred rows each.
        parquet.write_table(table, root / f"0000{shard}.parquet", row_group_size=3)
        (root / f"0000{shard}_stats.json").write_text('{"count": 4, "successes": 3}')
    return root


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


def test_pictures_in_the_tables_are_packed_as_those_in_files(tmp_path, capsys):
    """Of `output_format: parquet`; a picture that is damaged or absent costs itself."""
    images = [encoded(picture(i), "WEBP") if "success" in one["status"] else None
              for i, one in enumerate(ROWS)]  # fmt: skip
    in_rows = write_tables(tmp_path / "rows", webp=images)
    in_files = write_tables(tmp_path / "files")
    for one, image in zip(ROWS, images, strict=True):
        if image:
            put(in_files, f"{one['key'][:5]}/{one['key']}.webp", data=image)

    assert pack(in_files, "--to", tmp_path / "of files") == 0
    capsys.readouterr()
    for named in ([], ["--captions", in_rows], ["--processes", "2", "--max-side", "20"]):
        to = tmp_path / f"of rows {len(named)}"
        assert pack(in_rows, "--to", to, *named) == 0
        printed = capsys.readouterr().out
        assert "2 rows were not fetched (failed_to_download 2)" in printed
        assert "left out" not in printed and "holds bytes" not in printed

        samples = packed(to)
        assert [sample.captions for sample in samples] == [(one["caption"],) for one in FETCHED]
        if "--max-side" not in named:
            assert (to / "00000.tar").read_bytes() == (
                tmp_path / "of files" / "00000.tar"
            ).read_bytes()

    # A row that says "success" and holds none, or one that does not open.
    damaged = write_tables(tmp_path / "damaged", webp=[None, None, b"RIFF", *images[3:]])
    assert pack(damaged, "--to", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "'00000/000000000.webp' cannot be used: " in error and "found 0 bytes" in error
    assert "'00000/000000002.webp' cannot be used: " in error
    assert pack(damaged, "--to", tmp_path / "out", "--on-missing", "skip") == 0
    assert len(packed(tmp_path / "out")) == 4


def test_a_pack_of_pictures_in_tables_goes_on_and_knows_another_input(
    tmp_path, monkeypatch, capsys
):
    images = [encoded(picture(i), "PNG") for i in range(8)]
    rows = [one | {"status": "success"} for one in ROWS]
    root = write_tables(tmp_path / "rows", rows, png=images)
    states = [path.stat().st_mtime_ns for path in fetched.files_in(root)]
    whole = ["--to", tmp_path / "whole", "--samples-per-shard", "2"]
    assert pack(root, *whole) == 0

    # A call that ends after its second shard, of four.
    real, n_written = WriteShard.__call__, 0

    def interrupted(work: WriteShard, part: Any) -> Any:
        nonlocal n_written
        n_written += 1
        if n_written == 3:
            raise KeyboardInterrupt
        return real(work, part)

    monkeypatch.setattr(WriteShard, "__call__", interrupted)
    arguments = ["--to", tmp_path / "out", "--samples-per-shard", "2"]
    assert pack(root, *arguments) == 128 + signal.SIGINT

    # Tables that were written again may hold other pictures.
    os.utime(root / "00001.parquet", ns=(0, 0))
    assert pack(root, *arguments) == 1
    assert "2 finished shards of other input or settings" in capsys.readouterr().err
    os.utime(root / "00001.parquet", ns=(0, states[1]))
    n_written = 3
    assert pack(root, *arguments) == 0 and n_written == 5
    for shard in range(4):
        name = f"0000{shard}.tar"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_rows_are_read_in_any_order_and_by_threads(tmp_path):
    values = [f"picture {i}".encode() * (i % 7) for i in range(500)]
    table = pyarrow.table({"jpg": values, "n": list(range(500))})
    order = [*range(500), *random.Random(1).sample(range(500), 60)]
    for size in (1, 45, 500):
        path = str(tmp_path / f"{size}.parquet")
        parquet.write_table(table, path, row_group_size=size)
        with ThreadPoolExecutor(8) as threads:
            read = list(threads.map(lambda row, path=path: pictured.read(path, "jpg", row), order))
        assert read == [values[row] for row in order]

    for column, row in (("jpg", 500), ("jpg", -1), ("png", 0)):
        with pytest.raises(ValueError, match=f"row {row + 1} of the column '{column}'"):
            pictured.read(path, column, row)
    assert pictured.read(path, "jpg", 499) == values[499]


def test_a_row_without_a_status_is_told_so():
    rows = [(1, row(0)), (2, row(0) | {"status": None}), (3, row(1))]
    kept, lost = fetched.succeeded(rows)
    assert kept == rows[:1] and lost == "no status 1, failed_to_download 1"


def test_pairs_are_completed_by_the_tables_beside_them(tmp_path, capsys):
    """With columns that their JSON lacks; a row of another address, and a damaged table, say
    nothing."""
    root = write_tables(tmp_path / "laion")
    for i, one in enumerate(FETCHED):
        url = "https://example.org/other.jpg" if i == 1 else one["url"]
        record = {"caption": f"its own {i}", "url": url, "width": 41}
        put(root, f"{one['key'][:5]}/{one['key']}.jpg", data=encoded(picture(i), "JPEG"))
        put(root, f"{one['key'][:5]}/{one['key']}.json", data=json.dumps(record).encode())

    assert pack(root, "--to", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "note: 5 images were completed from img2dataset's parquet files" in printed
    assert ".parquet" not in printed.partition("left out")[2]
    samples = packed(tmp_path / "out")
    assert [sample.captions for sample in samples] == [(f"its own {i}",) for i in range(6)]
    expected = [None if i == 1 else one["similarity"] for i, one in enumerate(FETCHED)]
    assert [sample.meta.get("similarity") for sample in samples] == expected
    assert {sample.meta["width"] for sample in samples} == {41}

    (root / "00001.parquet").write_bytes(b"PAR1")
    assert pack(root, "--to", tmp_path / "out", "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "2 images were completed" in printed and "is no whole parquet file" in printed
    assert "1 .parquet (00001.parquet)" in printed


def test_a_folder_without_pictures_is_told_what_to_do_with_what_it_holds(tmp_path, capsys):
    shards = tmp_path / "shards"
    write_tables(shards)
    write_tar(shards / "00000.tar", [("000000000.jpg", encoded(picture(0), "JPEG"))])
    for named in ([], ["--captions", shards]):
        assert pack(shards, "--to", tmp_path / "out", *named) == 1
        error = capsys.readouterr().err
        assert "may be shards already: train on them with {name: shards}" in error
        assert "vlp data reshard" in error and "right folder" not in error

    # Training reads pictures from any place, which the rows of a parquet file have not.
    in_rows = write_tables(tmp_path / "rows", jpg=[b"x"] * 8)
    for source in ({}, {"captions": str(in_rows)}):
        with pytest.raises(ValueError, match=f"vlp data pack {in_rows} --to DIR"):
            loader_of(data_of({"name": "folder", "path": str(in_rows)} | source), 2)
