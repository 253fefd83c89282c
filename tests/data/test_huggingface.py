"""The source `huggingface`: local data sets in every form, its columns, exact batches over ranks,
workers and resuming.
"""

from __future__ import annotations

import json
import sys

import datasets
import pytest
import torch

from tests.data.material import data_of, encoded, loader_of, picture
from tests.data.test_loader import joined, same, take
from vlp.config import Captions
from vlp.data.sources.huggingface import Options
from vlp.data.sources.huggingface import open as open_set

N = 40


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def table(n: int = N, **columns) -> datasets.Dataset:
    """n rows: a picture that tells its number, two captions and whatever else is asked for."""
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(n)]
    texts = [[f"caption {i} one", f" caption {i} two ", ""] for i in range(n)]
    made = datasets.Dataset.from_dict({"photo": images, "captions": texts, **columns})
    return made.cast_column("photo", datasets.Image())


def opened(path, captions: Captions | None = None, **options):
    return open_set(Options(str(path), **options), captions or Captions())


@pytest.mark.parametrize("form", ["save_to_disk", "split", "parquet", "images"])
def test_every_local_form_gives_the_same_samples(tmp_path, form):
    if form == "save_to_disk":
        table().save_to_disk(tmp_path)
    elif form == "split":
        datasets.DatasetDict({"test": table(3), "train": table()}).save_to_disk(tmp_path)
    elif form == "parquet":
        (tmp_path / "data").mkdir()
        table().to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    else:
        for i in range(N):
            (tmp_path / f"{i:03d}.png").write_bytes(encoded(picture(i)))
        rows = [
            {"file_name": f"{i:03d}.png", "captions": [f"caption {i} one", f"caption {i} two"]}
            for i in range(N)
        ]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(tmp_path)
    assert len(source) == N and source.n_left_out == 0 and source.n_captions().tolist() == [2] * N
    for i in (0, 17, N - 1):
        sample = source[i]
        assert (sample.sample_id, sample.image, sample.image_type) == (
            i,
            encoded(picture(i)),
            "png",
        )
        assert (
            sample.captions == (f"caption {i} one", f"caption {i} two") and sample.key == f"{i:09d}"
        )


@pytest.mark.parametrize("kind", ["bytes", "mappings"])
def test_pictures_that_are_stored_as_plain_bytes_are_read(tmp_path, kind):
    import pyarrow
    from pyarrow import parquet

    images = [encoded(picture(i)) for i in range(4)]
    if kind == "mappings":
        images = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    columns = {
        "image": images,
        "thumbnail": [b"x"] * 4,
        "caption": [f"caption {i}" for i in range(4)],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "train-00000-of-00001.parquet")
    source = opened(tmp_path)
    assert [(source[i].image, source[i].captions) for i in range(4)] == [
        (encoded(picture(i)), (f"caption {i}",)) for i in range(4)
    ]

    parquet.write_table(
        pyarrow.table({"n": [1], "caption": ["x"]}), tmp_path / "train-00000-of-00001.parquet"
    )
    with pytest.raises(ValueError, match="has no image column, only 'n', 'caption'; name the one"):
        opened(tmp_path)


def test_batches_are_the_same_over_ranks_and_workers_and_after_resuming(tmp_path):
    table().save_to_disk(tmp_path)
    source = {"name": "huggingface", "path": str(tmp_path)}
    reference = take(loader_of(data_of(source), 8), 12)
    assert len({i for batch in reference[:5] for i in batch.sample_id.tolist()}) == N

    running = loader_of(data_of(source, workers=1), 8)
    assert all(same(next(running), batch) for batch in reference[:3])

    state = json.loads(json.dumps(running.state_dict()))
    ranks = [loader_of(data_of(source), 8, rank=r, world=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    assert all(same(joined([next(rank) for rank in ranks]), batch) for batch in reference[3:])


def test_rows_without_text_are_refused_or_left_out_and_change_the_fingerprint(tmp_path):
    table(title=["" if i % 4 == 0 else f"title {i}" for i in range(N)]).save_to_disk(tmp_path)
    with pytest.raises(
        ValueError, match=r"10 of the 40 rows .* no caption in \['title'\]; set caption_columns"
    ):
        opened(tmp_path, caption_columns=["title"])

    source = opened(tmp_path, Captions(missing="drop"), caption_columns=["title"])
    assert (
        len(source) == 30
        and source.n_left_out == 10
        and source.problems()
        and source[0].captions == ("title 1",)
    )

    both = opened(tmp_path, caption_columns=["title", "captions"])
    assert both[1].captions == ("title 1", "caption 1 one", "caption 1 two")
    assert len({source.fingerprint(), both.fingerprint(), opened(tmp_path).fingerprint()}) == 3


def test_class_labels_fill_the_templates_and_fields_are_carried(tmp_path):
    labelled = table(
        label=[i % 3 for i in range(N)], negatives=[["a", "b"]] * N, score=[i / N for i in range(N)]
    )
    labelled = labelled.cast_column(
        "label", datasets.ClassLabel(names=["cat", "hot_dog", "elk"])
    ).remove_columns("captions")
    labelled.save_to_disk(tmp_path)
    source = opened(tmp_path, Captions(class_templates=["a photo of a {}."]))
    assert (
        source[1].captions == ("a photo of a hot dog.",)
        and source.n_negatives == 2
        and source.labels == {"score"}
    )

    data = data_of(
        {"name": "huggingface", "path": str(tmp_path)}, captions={"class_templates": ["a {}"]}
    )
    batch = next(loader_of(data, 8))
    assert batch.negatives.shape[:2] == (8, 2) and torch.allclose(
        batch.score * N, batch.sample_id.float()
    )


def test_bad_pictures_are_replaced_and_named(tmp_path):
    images = [
        {"bytes": b"no picture" if i == 5 else encoded(picture(i)), "path": None} for i in range(N)
    ]
    images[6] = None
    broken = datasets.Dataset.from_dict({"image": images, "text": [f"text {i}" for i in range(N)]})
    broken.cast_column("image", datasets.Image()).save_to_disk(tmp_path)
    loader = loader_of(data_of({"name": "huggingface", "path": str(tmp_path)}), 20)
    take(loader, 2)
    assert {sample_id for sample_id, _, _ in loader.bad} == {5, 6}
    assert any("row 6" in reason and "has no image" in reason for _, _, reason in loader.bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_columns": ["captoins"]}, "no column 'captoins'.*captions"),
        ({"image_column": "foto"}, "no column 'foto'"),
        ({"class_column": "x"}, "no column 'x'"),
    ],
)
def test_wrong_columns_are_named(tmp_path, options, message):
    table(2).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **options)


def test_conditions_choose_rows_and_a_column_of_splits_is_noted(tmp_path):
    labelled = table(
        split=[("train", "val", "test")[i % 3] for i in range(N)], kind=[i % 2 for i in range(N)]
    )
    labelled.cast_column("kind", datasets.ClassLabel(names=["cat", "dog"])).save_to_disk(tmp_path)
    whole = opened(tmp_path, Captions())
    assert len(whole) == N and whole.n_left_out == 0
    assert (
        "rows of all splits are taken together (train (14), val (13), test (13))"
        in whole.problems()[0]
    )

    train = opened(tmp_path, where={"split": "train"})
    assert len(train) == 14 and train[1].image == encoded(picture(3)) and train.problems() == []
    assert len(opened(tmp_path, where={"split": "train", "kind": "dog"})) == 7
    assert train.fingerprint() != whole.fingerprint()
    with pytest.raises(
        ValueError,
        match=r"no row with split = 'dev'; split holds train \(14\), val \(13\), test \(13\)",
    ):
        opened(tmp_path, where={"split": "dev"})
    with pytest.raises(ValueError, match=r"no column 'part'.*split"):
        opened(tmp_path, where={"part": "x"})


def test_captions_are_found_in_the_columns_that_tables_use(tmp_path):
    made = table(3).remove_columns("captions")
    for column, values in {
        "Caption 1": ["x", "y", "z"],
        "sentences": [[{"raw": text}] for text in "xyz"],
    }.items():
        made.add_column(column, values).save_to_disk(tmp_path / column)
        assert [opened(tmp_path / column)[i].captions for i in range(3)] == [("x",), ("y",), ("z",)]
    made.add_column("about", ["x", "y", "z"]).save_to_disk(tmp_path / "unknown")
    with pytest.raises(
        ValueError, match=r"no column is known to hold captions or classes; it has 'photo', 'about'"
    ):
        opened(tmp_path / "unknown")


def test_choices_that_a_saved_folder_cannot_follow_are_refused(tmp_path):
    table(2).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table(2), "test": table(3)}).save_to_disk(tmp_path / "split")
    for folder, options in (
        ("one", {"split": "test"}),
        ("one", {"revision": "v2"}),
        ("split", {"config": "large"}),
    ):
        [(name, value)] = options.items()
        with pytest.raises(
            ValueError, match=rf"written by save_to_disk.*{name}: {value}; leave it out"
        ):
            opened(tmp_path / folder, **options)
    assert len(opened(tmp_path / "split", split="test")) == 3


def test_wrong_splits_and_ambiguous_images_say_what_there_is(tmp_path):
    datasets.DatasetDict({"train": table(2)}).save_to_disk(tmp_path / "split")
    with pytest.raises(ValueError, match=r"no split 'trian'.*train"):
        opened(tmp_path / "split", split="trian")
    two = table(2, other=[None, None])
    two.cast_column("other", datasets.Image()).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"image columns 'other', 'photo'; name the one to use"):
        opened(tmp_path / "two")


def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'vlp\[datasets\]'"):
        opened(tmp_path)
