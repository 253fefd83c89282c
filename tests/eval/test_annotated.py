"""Every reader of annotated rows × every form of them: the same items and the same scores."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError
from vlp.eval.tasks import countbench, sugarcrepe

Row = dict[str, Any]


# --- what the readers read, with numbers for pictures ---------------------------------------------


def of_countbench() -> list[Row]:
    return [
        {"image": i, "text": f"see {word} cats", "number": i + 2}
        for i, word in enumerate(countbench.NUMBERS)
    ]


def of_choices() -> list[Row]:
    return [
        {"image": i, "text_1": f"yes {i}", "text_2": f"no {i}", "group": f"g{i % 2}"}
        for i in range(4)
    ]


def of_sugarcrepe() -> list[Row]:
    return [
        {"image": i, "subset": subset, "caption": f"yes {i}", "negative_caption": f"no {i}"}
        for i, subset in enumerate(sugarcrepe.SUBSETS)
    ]


def of_winoground() -> list[Row]:
    pairs = [(2 * i, 2 * i + 1) for i in range(3)]
    return [
        {"image_0": a, "image_1": b, "caption_0": f"yes {a}", "caption_1": f"yes {b}"}
        for a, b in pairs
    ]


READERS = {
    "countbench": of_countbench,
    "choices": of_choices,
    "sugarcrepe": of_sugarcrepe,
    "winoground": of_winoground,
}


def is_picture(key: str) -> bool:
    return key.startswith("image")


def with_pictures(rows: list[Row], cell: Any) -> list[Row]:
    """The rows with `cell` of its number for each picture."""
    return [
        {key: cell(value) if is_picture(key) else value for key, value in row.items()}
        for row in rows
    ]


def name(number: int) -> str:
    return f"{number}.png"


def data(number: int) -> bytes:
    return material.png(material.picture(number))


def images(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        for key, number in row.items():
            if is_picture(key):
                (folder / name(number)).write_bytes(data(number))
    return folder


# --- the forms ------------------------------------------------------------------------------------


def jsonl(root: Path, rows: list[Row]) -> dict:
    path = root / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, with_pictures(rows, name))))
    return {"data": path, "images": images(root / "some images", rows)}


def csv_beside(root: Path, rows: list[Row]) -> dict:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(with_pictures(rows, name))
    (root / "set.csv").write_text(file.getvalue())
    images(root, rows)
    return {"data": root / "set.csv"}


def parquet(path: Path, rows: list[Row], cell: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(with_pictures(rows, cell)), path)
    return path


def parquet_file_that_names(root: Path, rows: list[Row]) -> dict:
    path = parquet(root / "set.parquet", rows, name)
    return {"data": path, "images": images(root / "images", rows)}


def parquet_folder_that_names(root: Path, rows: list[Row]) -> dict:
    parquet(root / "set" / "test-00000.parquet", rows, name)
    return {"data": root / "set", "images": images(root / "images", rows)}


def parquet_folder_beside_images(root: Path, rows: list[Row]) -> dict:
    parquet(root / "test-00000.parquet", rows, name)
    images(root / "images", rows)
    return {"data": root}


def hub_names(root: Path, rows: list[Row]) -> dict:
    """As `datasets` stores what it has not embedded: a path and no bytes."""
    parquet(root / "test.parquet", rows, lambda n: {"bytes": None, "path": name(n)})
    images(root / "images", rows)
    return {"data": root}


def hub_folder(root: Path, rows: list[Row]) -> dict:
    """Two files, images inside."""
    half = len(rows) // 2
    for part, of_part in enumerate((rows[:half], rows[half:])):
        path = root / "data" / f"test-0000{part}-of-00002.parquet"
        parquet(path, of_part, lambda n: {"bytes": data(n), "path": name(n)})
    return {"data": root}


def parquet_file_of_bytes(root: Path, rows: list[Row]) -> dict:
    return {"data": parquet(root / "set.parquet", rows, data)}


def shard(root: Path, rows: list[Row]) -> dict:
    return {"data": write_shard(root / "set.tar", rows)}


def shards(root: Path, rows: list[Row]) -> dict:
    half = len(rows) // 2
    write_shard(root / "00000.tar", rows[:half])
    write_shard(root / "00001.tar", rows[half:])
    return {"data": root}


def write_shard(path: Path, rows: list[Row]) -> Path:
    """One picture a sample; its caption in the .txt, as `vlp data pack` writes it."""
    members = []
    for i, row in enumerate(rows):
        rest = {key: value for key, value in row.items() if not is_picture(key)}
        members.append((f"{i:04}.png", data(row["image"])))
        caption = rest.pop("text", rest.pop("caption", None))
        if caption:
            members.append((f"{i:04}.txt", caption.encode()))
        members.append((f"{i:04}.json", json.dumps(rest).encode()))
    material.write_tar(path, members)
    return path


NAMED = [
    jsonl, csv_beside, parquet_file_that_names, parquet_folder_that_names,
    parquet_folder_beside_images, hub_names,
]  # fmt: skip
INSIDE = [hub_folder, parquet_file_of_bytes, shard, shards]
CASES = [
    (reader, form)
    for reader in READERS
    for form in [*NAMED, *INSIDE]
    # A sample of a shard has one picture.
    if reader != "winoground" or form not in (shard, shards)
]


# --- the walk -------------------------------------------------------------------------------------


def evaluate(reader: str, options: dict) -> dict:
    """A picture is near its own text, and one that is its right answer in two cases of three."""

    def of_text(text: str):
        word, number = text.split()[0], text.split()[-1]
        if word == "see":
            return material.direction(countbench.NUMBERS.index(text.split()[1]))
        is_known = word == "yes" or int(number) % 3 == 0
        return material.direction(int(number)) if is_known else material.direction(text)

    encoder = material.known_encoder(material.direction, of_text)
    strings = {key: str(value) for key, value in options.items()}
    tasks = plugin.keyed("vlp.eval.tasks", {reader: strings})
    (record,), _ = evaluation.evaluate(encoder, tasks, Context(workers=0, contents=Contents()))
    return record


def test_every_reader_reads_every_form(tmp_path):
    expected = {}
    for number, (reader, form) in enumerate(CASES):
        root = tmp_path / f"{number}"
        root.mkdir()
        record = evaluate(reader, form(root, READERS[reader]()))
        scores = (record["metrics"], record["counts"])
        assert scores == expected.setdefault(reader, scores), (reader, form.__name__)
        assert record["counts"]["skipped"] == 0
    assert len(CASES) == 38 and len(expected) == 4

    # The scores are known, so that not all are nothing.
    assert expected["countbench"][0] == {"acc": 1, "mean_distance": 0}
    assert expected["winoground"][0] == {"text_acc": 1, "image_acc": 1, "acc": 1}
    assert expected["choices"][0] == {"acc": 1 / 2, "g0": 1 / 2, "g1": 1 / 2, "mean": 1 / 2}
    assert expected["sugarcrepe"][0]["mean"] == pytest.approx(4 / 7)


def of_retrieval() -> list[Row]:
    return [{"image": i, "caption": f"yes {i}"} for i in range(6)]


def of_zeroshot() -> list[Row]:
    return [{"image": i, "class": ("cat", "dog", "owl")[i % 3]} for i in range(6)]


@pytest.mark.parametrize("rows", [of_retrieval, of_zeroshot])
def test_other_sets_are_read_in_the_same_forms(tmp_path, rows):
    """hub_names, whose images lie nobody knows where, needs images=."""
    n_cases = 0
    for form in [*NAMED, *INSIDE]:
        root = tmp_path / form.__name__
        root.mkdir()
        options = {key: str(value) for key, value in form(root, rows()).items()}
        if form is hub_names:
            options["images"] = str(root / "images")
        (task,) = plugin.keyed("vlp.eval.tasks", {rows.__name__.removeprefix("of_"): options})
        opened = task.module.read(task.options)
        records = getattr(opened, "records", None) or opened.source.records
        read = {material.number_of(r.picture.open()): (*r.captions, r.label) for r in records}
        expected = {
            row["image"]: (row["caption"], None) if "caption" in row else (row["class"],)
            for row in rows()
        }
        assert read == expected, form.__name__
        n_cases += 1
    assert n_cases == 10


@pytest.mark.parametrize("form", NAMED)
def test_a_picture_that_is_not_there_is_named_or_skipped(tmp_path, form):
    options = form(tmp_path, of_countbench())
    (gone,) = tmp_path.rglob("4.png")
    gone.unlink()
    with pytest.raises(DataError, match=r"1 of 9 annotations name images that are not in"):
        evaluate("countbench", options)
    record = evaluate("countbench", options | {"missing": "skip"})
    assert (record["counts"]["images"], record["counts"]["skipped"]) == (8, 1)


def test_parquet_beside_tars_is_the_table_unless_it_is_their_index(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = of_countbench()
    shards(tmp_path, rows)
    for number in range(2):
        pq.write_table(pa.table({"url": ["x"]}), tmp_path / f"0000{number}.parquet")
    assert evaluate("countbench", {"data": tmp_path})["counts"]["images"] == 9

    packed = tmp_path / "set"
    parquet(packed / "test.parquet", rows[:4], name)
    members = [(name(row["image"]), data(row["image"])) for row in rows]
    material.write_tar(packed / "images.tar", members)
    options = {"data": packed, "images": packed / "images.tar"}
    assert evaluate("countbench", options)["counts"]["images"] == 4


def test_what_holds_no_rows_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("image", pa.binary()), ("text", pa.string()), ("number", pa.int64())])
    pq.write_table(schema.empty_table(), tmp_path / "none.parquet")
    for place in (tmp_path, tmp_path / "none.parquet"):
        with pytest.raises(DataError, match="holds no row in a"):
            evaluate("countbench", {"data": place})
    with pytest.raises(DataError, match="no annotations at"):
        evaluate("choices", {"data": tmp_path / "nowhere"})
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="no whole parquet file"):
        evaluate("choices", {"data": tmp_path / "broken.parquet"})
