"""Labels by which terms know pairs of one kind: of the caption, the origin, or a field."""

from __future__ import annotations

import json
import math

import pytest

from tests.data.material import data_of, encoded, loader_of, picture
from vlp.config import load
from vlp.data import labels
from vlp.data.format import ShardWriter
from vlp.data.loader import DataError
from vlp.fields import supplier
from vlp.train import train

READS = frozenset({"label"})


def write(folder, n=8, **fields):
    """Sample i says one of three things, in other words; `fields` of its JSON by i."""
    captions = [
        "Two dogs.",
        "two  dogs",
        "A cat!",
        "a cat",
        "A CAT ",
        "a bird",
        "two dogs!",
        "A bird.",
    ]
    with ShardWriter(folder, 4) as writer:
        for i in range(n):
            meta = {name: value(i) for name, value in fields.items() if value(i) is not None}
            writer.add(f"k{i}", encoded(picture(i)), "png", [captions[i % 8]], meta)
    return folder


def groups(batch) -> set[frozenset[int]]:
    """The samples of each label."""
    by_label: dict[int, set[int]] = {}
    for key, label in zip(batch.key, batch.label.tolist()):
        assert 0 <= label < 2**48
        by_label.setdefault(label, set()).add(int(key[1:]))
    return {frozenset(members) for members in by_label.values()}


def test_captions_are_alike_but_for_case_blanks_and_the_stop(tmp_path):
    batch = next(loader_of(data_of(write(tmp_path), labels="caption"), 8, reads=READS))
    assert groups(batch) == {frozenset({0, 1, 6}), frozenset({2, 3, 4}), frozenset({5, 7})}
    assert labels.normalised(" A  dog, running… ") == "a dog, running"
    assert labels.of_text("a dog") == 169595832081577, "the same in every process and version"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("class", lambda i: f"class {i % 2}"),
        ("cls", lambda i: i % 2),
        ("origin", lambda i: f"{i % 2}"),
        ("number", lambda i: float(i % 2)),
    ],
)
def test_a_field_of_the_json_is_a_label(tmp_path, kind, value):
    folder = write(tmp_path, **{kind: value})
    batch = next(loader_of(data_of(folder, labels=kind), 8, reads=READS))
    assert groups(batch) == {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})}


def test_labels_are_the_same_on_every_rank_and_made_only_where_they_are_read(tmp_path):
    data = data_of(write(tmp_path), labels="caption")
    whole = next(loader_of(data, 8, reads=READS)).label
    parts = [next(loader_of(data, 8, reads=READS, rank=r, world=2)).label for r in range(2)]
    assert whole.tolist() == [*parts[0].tolist(), *parts[1].tolist()]
    assert next(loader_of(data, 8, reads=frozenset({"score"}))).label is None
    assert "label" not in loader_of(data_of(tmp_path), 8, reads=READS).carries
    assert supplier("label").startswith("labels of the samples (data.labels: caption, origin")


@pytest.mark.parametrize("odd", [None, "", " ", True, 2.5, [1]])
def test_a_label_on_every_second_sample_is_refused_by_name(tmp_path, odd):
    folder = write(tmp_path, **{"class": lambda i: "a" if i % 2 else odd})
    with pytest.raises(
        ValueError,
        match=r"data\.labels is 'class', and 4 of 8 samples of source 0 .* 'k\d' has .* under "
        r"'class', expected a text or a whole number",
    ):
        loader_of(data_of(folder, labels="class"), 8, reads=READS)


def test_a_label_that_is_missing_later_costs_its_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_PROBED", 0)  # as among millions, where none was looked at
    one = write(tmp_path / "one", **{"class": lambda i: "a" if i != 5 else None})
    steps = loader_of(data_of(one, labels="class"), 4, reads=READS)
    keys = [key for _ in range(2) for key in next(steps).key]
    assert "k5" not in keys and len(keys) == 8
    assert steps.bad[0][1] == "k5" and "under 'class', expected a text" in steps.bad[0][2]

    none = write(tmp_path / "none")
    with pytest.raises(DataError, match="under 'class', expected a text or a whole number"):
        next(loader_of(data_of(none, labels="class"), 8, reads=READS))


def test_what_terms_say_decides_where_the_data_say_nothing():
    assert labels.kind_of(None, [None, None]) is None
    assert labels.kind_of(None, [None, "none", "caption"]) == "caption"
    assert labels.kind_of(None, ["origin", "origin"]) == "origin"
    assert labels.kind_of("class", ["label"]) == "class"
    assert labels.kind_of("class", [None]) == "class"
    with pytest.raises(ValueError, match=r"labels of one kind, and .* name caption, origin"):
        labels.kind_of(None, ["origin", "caption"])
    with pytest.raises(ValueError, match=r"labels of one kind, and .* name caption, class"):
        labels.kind_of("class", ["caption"])
    with pytest.raises(ValueError, match=r"say which with data\.labels"):
        labels.kind_of(None, ["label"])


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("{infonce: {positives: caption}}", []),
        ("{siglip: {positives: caption}}", ["model.bias=-10"]),
        ("{infonce: {positives: label}}", ["data.labels=class"]),
        ("{infonce: {ignore: {same_label: true}}}", ["data.labels=caption"]),
    ],
)
def test_a_run_trains_with_shared_captions_by_one_line(tmp_path, objective, more):
    folder = write(tmp_path / "data", n=16, **{"class": lambda i: str(i % 3)})
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(out=tmp_path / "run", data=folder, objective=objective))
    run = train(load(path, more))
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


RUN = """
out: {out}
data: {{sources: [{{name: shards, path: {data}}}], workers: 0}}
model:
  image_tower: {{name: vit, image_size: 16, patch_size: 8, width: 16, layers: 1, head_width: 16}}
  text_tower: {{name: transformer, context_length: 16, width: 16, layers: 1, heads: 2}}
  embed_dim: 16
train: {{duration: 2, batch: 8, precision: float32, device: cpu}}
objective: {objective}
log: {{every: 1}}
"""
