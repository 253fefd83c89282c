"""Evaluation sets in tables: every kind of file and column, rows of one image, equal pictures, what
is missing.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.eval import material
from vlp import plugin
from vlp.cli import main
from vlp.eval import evaluation, models
from vlp.eval.datasets.tables import read_rows
from vlp.eval.embed import Context
from vlp.eval.pictures import Collection, Contents, DataError

N = 12
CLASSES = ("cat", "dog", "hot dog")
KINDS = ("png", "JPG", "webp")


def evaluate(task: str, encoder: models.Encoder, **options: Any) -> dict[str, Any]:
    tasks = plugin.keyed("vlp.eval.tasks", {task: options})
    return evaluation.evaluate(encoder, tasks, Context(batch=5, workers=2, contents=Contents()))[0][
        0
    ]


def perfect() -> models.Encoder:
    """Knows every picture by its number, and captions by the number in them."""
    return material.known_encoder(
        lambda n: material.direction(n),
        lambda text: material.direction(int(text.split()[1]) if text[:1] == "p" else text),
    )


def knows_classes() -> models.Encoder:
    def of_sentence(sentence: str) -> Any:
        name = max((name for name in CLASSES if sentence.endswith((name, f"{name}."))), key=len)
        return material.direction(CLASSES.index(name))

    return material.known_encoder(lambda n: material.direction(n % 3), of_sentence)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures of several kinds; all lossless, so that a picture still tells its number."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(N):
        kind = KINDS[i % 3]
        data = io.BytesIO()
        material.picture(i, (16, 16)).save(data, "WEBP" if kind == "webp" else "PNG", lossless=True)
        (folder / f"{i:02d}.{kind}").write_bytes(data.getvalue())
    return folder


def name(i: int) -> str:
    return f"{i:02d}.{KINDS[i % 3]}"


def write(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv", ".txt"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else separator
            )
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_zeroshot_reads_every_kind_of_table_alike(tmp_path, photos):
    rows = [{"class": CLASSES[i % 3], "n": i, "image": name(i)} for i in range(N)]
    renamed = [{"Breed": row["class"], "Bild": row["image"]} for row in rows]
    labelled = [{"img": row["image"], "label": row["class"]} for row in rows]
    captioned = [{"image": row["image"], "caption": "x", "label": row["class"]} for row in rows]
    images = {"images": str(photos)}
    cases = [
        (write(tmp_path / "a.csv", rows), {}),
        (write(tmp_path / "a.tsv", rows), {}),
        (write(tmp_path / "a.jsonl", rows), {}),
        (write(tmp_path / "a.json", rows), {}),
        (write(tmp_path / "a.parquet", rows), {}),
        (write(tmp_path / "b.csv", rows, ";"), {}),
        (write(tmp_path / "d.csv", labelled), {}),
        (write(tmp_path / "c.csv", renamed), {"image_column": "Bild", "class_column": "breed"}),
        (write(tmp_path / "e.csv", captioned), {"class_column": "label"}),
        (write(photos / "beside.csv", rows), {"images": None}),
    ]
    records = [
        evaluate("zeroshot", knows_classes(), data=str(path), **(images | options))
        for path, options in cases
    ]
    assert len(records) == 10 and all(record["metrics"]["acc1"] == 1 for record in records)
    assert all(
        record["data_sha256"] == records[0]["data_sha256"] and record["counts"]["classes"] == 3
        for record in records[:9]
    )
    with pytest.raises(DataError, match=r"have no class.*class_column=NAME"):
        evaluate("zeroshot", knows_classes(), data=str(cases[8][0]), **images)
    with pytest.raises(
        DataError,
        match=r"c\.csv: no column is known to hold captions or classes; it has 'Breed', 'Bild'",
    ):
        evaluate("zeroshot", knows_classes(), data=str(tmp_path / "c.csv"), **images)


def test_class_numbers_of_a_table_need_names(tmp_path, photos):
    path = write(tmp_path / "t.csv", [{"image": name(i), "label": i % 3} for i in range(N)])
    record = evaluate(
        "zeroshot", knows_classes(), data=str(path), images=str(photos), classes=list(CLASSES)
    )
    assert record["metrics"]["acc1"] == 1 and record["counts"]["classes"] == 3
    with pytest.raises(DataError, match="numbers its classes"):
        evaluate("zeroshot", knows_classes(), data=str(path), images=str(photos))


def test_probes_and_splits_are_read_from_tables(tmp_path, photos):
    rows = [
        {"image": name(i), "class": CLASSES[i % 3], "Split": "train" if i < 6 else "test"}
        for i in range(N)
    ]
    path = write(tmp_path / "t.csv", rows)
    record = evaluate("knn", knows_classes(), data=str(path), images=str(photos), k=1)
    assert (
        record["metrics"]["acc1"] == 1
        and record["counts"]["train_images"] == record["counts"]["images"] == 6
    )
    record = evaluate(
        "zeroshot", knows_classes(), data=str(path), images=str(photos), where={"Split": "train"}
    )
    assert record["counts"]["images"] == 6
    with pytest.raises(
        DataError, match=r"no row with Split = 'val'; Split holds train \(6\), test \(6\)"
    ):
        evaluate("zeroshot", knows_classes(), data=str(path), images=str(photos), split="val")


def test_rows_of_one_image_are_one_image_in_every_kind_of_table(tmp_path, photos):
    """One line a caption: were each line an image, equal pictures would tie, and no model would
    find any.
    """
    rows = [
        {"file": name(i), "comment": f"p {i} says {k}", "k": k} for i in range(N) for k in range(5)
    ]
    for file in ("t.jsonl", "t.csv", "t.tsv", "t.json", "t.parquet"):
        record = evaluate(
            "retrieval", perfect(), data=str(write(tmp_path / file, rows)), images=str(photos)
        )
        assert record["counts"] == {"images": N, "captions": 5 * N, "skipped": 0}, file
        assert all(value == 1 for value in record["metrics"].values()), file


def test_equal_pictures_are_one_picture(tmp_path, photos):
    """Under other names in a table, and under other keys in shards."""
    for i in range(N):
        (photos / f"copy_{name(i)}").write_bytes((photos / name(i)).read_bytes())
    names = [copy + name(i) for copy in ("", "copy_") for i in range(N)]
    rows = [{"image": file, "caption": f"p {i % N} says {i}"} for i, file in enumerate(names)]
    table = evaluate(
        "retrieval", perfect(), data=str(write(tmp_path / "t.csv", rows)), images=str(photos)
    )
    assert (
        main(
            [
                "data",
                "pack",
                str(photos),
                "--captions",
                str(tmp_path / "t.csv"),
                "--to",
                str(tmp_path / "shards"),
            ]
        )
        == 0
    )
    shards = evaluate("retrieval", perfect(), data=str(tmp_path / "shards"))
    for record in (table, shards):
        assert record["counts"] == {
            "images": N,
            "captions": 2 * N,
            "skipped": 0,
            "equal_pictures_joined": N,
        }
        assert (
            record["metrics"]["image_retrieval_recall@1"]
            == record["metrics"]["text_retrieval_recall@1"]
            == 1
        )


def test_what_cannot_be_used_is_refused_or_counted(tmp_path, photos):
    rows = [f"{name(i)},p {i} says" for i in range(N)]
    path = tmp_path / "t.csv"
    path.write_text(
        "\n".join(
            [
                "image,caption,n",
                *(f"{row},1" for row in rows),
                "gone.png,p 3,1",
                f"{name(0)}",
                ",p 4,1",
            ]
        )
    )
    with pytest.raises(
        DataError, match=r"2 rows cannot be used; .*missing=skip.*\n.*t\.csv:15: found 1 field"
    ):
        evaluate("retrieval", perfect(), data=str(path), images=str(photos))
    record = evaluate("retrieval", perfect(), data=str(path), images=str(photos), missing="skip")
    assert record["counts"] == {"images": N, "captions": N, "skipped": 3}


def test_images_without_a_caption_are_refused_or_counted(tmp_path, photos):
    images = [{"id": i, "file_name": name(i)} for i in range(N)]
    annotations = [{"image_id": i, "caption": f"p {i} says"} for i in range(N - 2)]
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    with pytest.raises(DataError, match=r"2 of 12 images have no caption.*missing=skip"):
        evaluate("retrieval", perfect(), data=str(path), images=str(photos))
    record = evaluate("retrieval", perfect(), data=str(path), images=str(photos), missing="skip")
    assert record["counts"] == {"images": N - 2, "captions": N - 2, "skipped": 2}


def test_texts_beyond_the_context_are_counted(tmp_path, photos):
    path = write(
        tmp_path / "t.csv",
        [{"image": name(i), "caption": f"p {i} " + "says " * i} for i in range(N)],
    )
    short = dataclasses.replace(
        perfect(), n_truncated=lambda texts: sum(len(text) > 30 for text in texts)
    )
    record = evaluate("retrieval", short, data=str(path), images=str(photos))
    assert (
        record["counts"]["truncated_texts"]
        == sum(len(f"p {i} " + "says " * i) - 1 > 30 for i in range(N))
        > 2
    )
    assert (
        "truncated_texts"
        not in evaluate("retrieval", perfect(), data=str(path), images=str(photos))["counts"]
    )


def test_a_model_of_ours_counts_its_truncated_texts():
    from tests.models.tiny import tiny

    encoder = models.from_model(tiny())
    assert encoder.n_truncated(["a cat", "a dog " * 200, "word " * 300]) == 2


def test_annotations_of_choices_are_read_by_the_same_reader(tmp_path):
    rows = [{"image": "a.png", "text": "two cats", "number": 2, "note": ""}]
    expected = [{"image": "a.png", "text": "two cats", "number": 2}]
    for file in ("t.csv", "t.tsv"):
        assert read_rows(write(tmp_path / file, rows), ("image", "text")) == expected
    with_separator = tmp_path / "u.jsonl"
    with_separator.write_text(
        '{"image": "a.png", "text": "two\u2028cats\x0c"}\n', encoding="utf-16"
    )
    assert read_rows(with_separator) == [{"image": "a.png", "text": "two\u2028cats\x0c"}]
    for content, message in (
        ("[1", "not valid JSON"),
        ('"x"', "found str"),
        ("[3]", "item 0 is '3', expected a mapping"),
    ):
        (tmp_path / "add_att.json").write_text(content)
        with pytest.raises(DataError, match=message):
            evaluate("sugarcrepe", perfect(), data=str(tmp_path))


def test_options_of_tables_reach_the_command(tmp_path, photos, capsys):
    """A separator that YAML cannot read, and a wrong column: an answer before a model is loaded."""
    path = tmp_path / "t.csv"
    path.write_text("Bild,Worte\n" + "".join(f"{name(i)},p {i}\n" for i in range(N)))
    ask = [
        "eval",
        "ViT-B-32-quickgelu:openai",  # weights that no test fetches
        "--task",
        "retrieval",
        "--data",
        str(path),
        f"images={photos}",
        "separator=,",
        "image_column=bild",
    ]
    assert main([*ask, "caption_columns=Wrote"]) == 1
    assert "no column 'Wrote', did you mean 'Worte'" in capsys.readouterr().err
    every = ("caption_columns=Worte", "quoting=none", "header=yes", "where={Worte: p 1}")
    assert main([*ask, *every, "rows=9:"]) == 1
    assert "rows" in capsys.readouterr().err  # the columns are right, and no row is left
    assert main([*ask, "columns=x"]) == 1
    assert "unknown key 'columns'" in capsys.readouterr().err


def test_parquet_of_a_folder_takes_usual_columns(tmp_path):
    rows = [
        {
            "Picture": {"bytes": material.png(material.picture(i)), "path": None},
            "txt": [f"p {i} says"],
            "split": "st"[i % 2],
        }
        for i in range(N)
    ]
    folder = tmp_path / "set"
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    record = evaluate("retrieval", perfect(), data=str(folder), split="s")
    assert (
        record["counts"]["images"] == N // 2 and record["metrics"]["image_retrieval_recall@1"] == 1
    )
    (folder / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="no whole parquet file"):
        evaluate("retrieval", perfect(), data=str(folder))


def parquet_set(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test-00000.parquet")
    return folder


def test_images_are_looked_for_where_the_user_says_in_every_form(tmp_path, photos):
    """images= in tables of all kinds, folders of parquet, and sets with a place of their own."""
    captions = [{"image": name(i), "caption": f"p {i}", "negatives": ["no"]} for i in range(N)]
    (tmp_path / "tables").mkdir()
    tables = [write(tmp_path / "tables" / f"t.{kind}", captions) for kind in ("json", "jsonl")]
    tables += [parquet_set(tmp_path / "named", captions)]
    tables += [tmp_path / "named" / "test-00000.parquet"]

    # Names as `datasets` keeps them when it does not embed the pictures.
    unembedded = [row | {"image": {"bytes": None, "path": row["image"]}} for row in captions]
    tables += [parquet_set(tmp_path / "unembedded", unembedded)]

    # A set whose images usually lie in a folder of its own.
    docci = tmp_path / "docci"
    docci.mkdir()
    lines = [{"image_file": name(i), "description": f"p {i}", "split": "test"} for i in range(N)]
    (docci / "docci_descriptions.jsonlines").write_text("\n".join(map(json.dumps, lines)))
    urban = tmp_path / "urban"
    (urban / "image").mkdir(parents=True)
    (urban / "caption").mkdir()
    for i in range(N):
        (urban / "caption" / f"{i:02d}.txt").write_text(f"p {i}")

    for data in [*tables, docci, urban]:
        record = evaluate("retrieval", perfect(), data=str(data), images=str(photos))
        assert record["counts"]["images"] == N, data
        assert record["metrics"]["image_retrieval_recall@1"] == 1, data
    assert len(tables) == 5
    for data in tables:
        record = evaluate("negatives", perfect(), data=str(data), images=str(photos))
        assert record["counts"]["images"] == N, data


def test_images_beside_data_that_hold_their_own_are_refused(tmp_path, photos):
    held = [
        {"image": {"bytes": photos.joinpath(name(i)).read_bytes(), "path": None}, "text": f"p {i}"}
        for i in range(N)
    ]
    folder = parquet_set(tmp_path / "held", held)
    (file,) = folder.iterdir()
    # One file of such a set is a set.
    record = evaluate("retrieval", perfect(), data=str(file))
    assert record["counts"]["images"] == N

    material.write_tar(tmp_path / "shards" / "0.tar", [("0.png", b"x"), ("0.txt", b"a cat")])
    for data in (photos, tmp_path / "shards"):
        with pytest.raises(DataError, match="holds its own; leave it out"):
            evaluate("retrieval", perfect(), data=str(data), images=str(photos))

    named = parquet_set(tmp_path / "named", [{"image": name(0), "text": "p 0"}])
    with pytest.raises(DataError, match=r"holds no image bytes but a name, '00.png'; say where"):
        evaluate("retrieval", perfect(), data=str(named))
    named = parquet_set(
        tmp_path / "named", [{"image": n, "text": "p 0"} for n in (name(0), "gone")]
    )
    with pytest.raises(DataError, match=r"1 of 2 annotations name images that are not in"):
        evaluate("retrieval", perfect(), data=str(named), images=str(photos))
    options = {"data": str(named), "images": str(photos), "missing": "skip"}
    assert evaluate("retrieval", perfect(), **options)["counts"]["skipped"] == 1


def test_a_relative_path_goes_before_a_file_of_its_name(tmp_path):
    """Files of one name in several folders are no error where the annotation says which."""
    stored = ("a/1.png", "b/1.png", "1.png", "train 2014/1.png")
    for i, path in enumerate(stored):
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / path).write_bytes(material.png(material.picture(i)))
    collection = Collection(tmp_path / "photos")

    written = [*stored, "photos/a/1.png", "x/photos/b/1.png", "b\\1.png", "a/1.jpg"]
    places = [0, 1, 2, 3, 0, 1, 1, 0]
    for spelling, place in zip(written, places):
        picture = collection.find(spelling)
        assert picture is not None and picture.path.endswith(f"photos/{stored[place]}"), spelling
    assert len(written) == len(places)
