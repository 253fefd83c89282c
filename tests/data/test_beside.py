"""Captions that stand beside one another in a row: how many, of which roles, whole or by sentences;
and what is refused.
"""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from tests.data.material import TEXT, data_of, encoded, loader_of, picture
from tests.data.test_captions import shards
from vlp.config import Captions
from vlp.data.format import ShardWriter
from vlp.data.loader import Loader
from vlp.data.sentences import first_sentence, sentences
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards
from vlp.data.text import ClipTokenizer, build
from vlp.schema import ConfigError
from vlp.types import Batch

READS = frozenset({"captions"})


def loader(source: dict, **captions) -> Loader:
    return loader_of(data_of(source, captions=captions), 8, reads=READS)


@cache
def tokenizer() -> ClipTokenizer:
    """One for all: building it takes half a second."""
    return build(TEXT)


def words(batch: Batch) -> list[dict]:
    """Each row as texts: its own, and those beside it, None where they do not count."""
    decoder = tokenizer()._slow.decoder

    def text(ids) -> str:
        pieces = "".join(decoder[i] for i in ids.tolist() if 0 < i < 49406)
        return pieces.replace("</w>", " ").strip()

    rows = []
    for row in range(len(batch)):
        beside = [
            text(ids) if counts else None
            for ids, counts in zip(batch.captions[row], batch.captions_valid[row])
        ]
        number = int("".join(filter(str.isdigit, batch.key[row])))
        rows.append({"i": number, "text": text(batch.text[row]), "beside": beside})
    return rows


# Sentences


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", ["a dog"]),
        ("A dog. A cat!  Two birds?", ["A dog.", "A cat!", "Two birds?"]),
        ("Mr. J. Smith sees a dog. It runs.", ["Mr. J. Smith sees a dog.", "It runs."]),
        ("Fruit, e.g. apples, at 3.5 m. and more.", ["Fruit, e.g. apples, at 3.5 m. and more."]),
        ('He said "stop." Then he ran.', ['He said "stop."', "Then he ran."]),
        ("Wait... what? Yes", ["Wait...", "what?", "Yes"]),
        ("one line\n\n- another", ["one line", "- another"]),
        ("一只狗。两只猫！", ["一只狗。", "两只猫！"]),
        (". .", [".", "."]),
        (" ", [" "]),
    ],
)
def test_sentences_end_where_a_reader_ends_them(caption, expected):
    assert sentences(caption) == expected
    assert first_sentence(caption) == expected[0]


def stories(folder) -> dict:
    """Samples of one caption with i mod 3 + 1 sentences."""
    with ShardWriter(folder, 5) as writer:
        for i in range(8):
            caption = " ".join(f"{word} {i}." for word in ("One", "Two", "Three")[: i % 3 + 1])
            writer.add(f"k{i}", encoded(picture(i)), "png", [caption])
    return {"name": "shards", "path": str(folder)}


def test_sentences_are_drawn_alone_or_stand_beside_one_another(tmp_path):
    source = stories(tmp_path)
    alone = loader_of(data_of(source, captions={"choose": "sentences"}), 8)
    beside = loader(source, choose="sentences", n=2)
    drawn = set()
    for _ in range(4):
        assert next(alone).captions is None
        for row in words(next(beside)):
            i, n = row["i"], row["i"] % 3 + 1
            parts = [f"{word} {i} ." for word in ("one", "two", "three")[:n]]
            there = [text for text in row["beside"] if text is not None]
            assert len(there) == min(n, 2) and there == sorted(there, key=parts.index)
            assert row["text"] in there
            drawn.add((i, *there))
    assert len(drawn) > 8, "others at another visit"


def test_the_first_sentence_is_the_text_or_stands_beside_the_whole(tmp_path):
    source = stories(tmp_path)
    alone = next(loader_of(data_of(source, captions={"choose": "first_sentence"}), 8))
    for row, key in enumerate(alone.key):
        assert alone.text[row].equal(tokenizer()([f"One {key[1:]}."])[0])

    for row in words(next(loader(source, choose="first_sentence", n=1))):
        i = row["i"]
        whole = " ".join(f"{word} {i} ." for word in ("one", "two", "three")[: i % 3 + 1])
        assert row["text"] == whole and row["beside"] == [f"one {i} ."]


# Roles


def long_and_short(folder) -> dict:
    """Every third sample lacks its long caption, the last one its short one."""

    def record(i: int) -> dict:
        meta = {"caption_long": f"long {i}", "caption": f"short {i}", "url": "http://x"}
        lacking = "caption_long" if i % 3 == 0 else "caption" if i == 7 else "url"
        del meta[lacking]
        return meta

    path = shards(folder, json=record)
    names = {"long": "caption_long", "short": "caption"}
    return {"name": "shards", "path": path, "captions": names}


def expected_roles(i: int) -> list[str | None]:
    return [None if i % 3 == 0 else f"long {i}", None if i == 7 else f"short {i}"]


@pytest.mark.parametrize("kind", ["shards", "remote", "webdataset"])
def test_columns_are_roles_and_a_missing_one_does_not_count(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    source = long_and_short(tmp_path)
    path = source.pop("path")
    paths = {
        "shards": {"path": path},
        "remote": {"path": f"file://{path}"},
        "webdataset": {"urls": path, "samples": 8},
    }
    batch = next(
        loader(source | {"name": kind} | paths[kind], choose="all", roles=["long", "short"])
    )
    rows = words(batch)
    assert sorted(row["i"] for row in rows) == list(range(8))
    for row in rows:
        beside = expected_roles(row["i"])
        assert row["beside"] == beside
        assert row["text"] == next(text for text in beside if text), "that of the first role"

    swapped = loader(source | {"name": kind} | paths[kind], choose="all", roles=["short", "long"])
    assert all(row["beside"] == expected_roles(row["i"])[::-1] for row in words(next(swapped)))


def test_which_samples_lack_a_role_is_said_at_the_start(tmp_path):
    source = long_and_short(tmp_path)
    problems = loader(source, choose="all", roles=["long", "short"]).problems()
    assert sum("samples have no text under" in problem for problem in problems) == 2
    assert any("3 of 8 samples have no text under 'caption_long'" in p for p in problems)
    source["captions"] = {"long": "caption_lnog", "short": "caption"}
    with pytest.raises(ValueError, match=r"no sample of .* has a text under 'caption_lnog'"):
        loader(source, choose="all", roles=["long", "short"])


@pytest.mark.parametrize("kind", ["folder", "huggingface"])
def test_columns_of_a_table_are_roles(tmp_path, kind):
    """An empty cell is a missing caption, and does not move the others to another role."""
    rows = []
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(i)))
        long, short = (text or "" for text in expected_roles(i))
        rows.append({"image": f"{i}.png", "caption_long": long, "caption": short})
    source = {"caption_columns": ["caption_long", "caption"]}
    if kind == "folder":
        (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source |= {"name": kind, "path": str(tmp_path), "captions": str(tmp_path / "table.jsonl")}
    else:
        import datasets

        for row in rows:
            row["image"] = str(tmp_path / row["image"])
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        table.save_to_disk(tmp_path / "set")
        source |= {"name": kind, "path": str(tmp_path / "set")}

    found = words(next(loader(source, choose="all", roles=["long", "short"])))
    assert len(found) == 8
    for row in found:
        assert row["beside"] == expected_roles(row["i"])
    with pytest.raises(ValueError, match=r"name a column of each role, in their order"):
        loader(source, choose="all", roles=["long", "short", "raw"])


def test_lines_and_lists_have_their_roles_by_their_order(tmp_path):
    def record(i: int) -> list[str]:
        return [f"first {i}", f"second {i}", f"third {i}"][: i % 3 + 1]

    path = shards(tmp_path / "list", json=record)
    lines = shards(tmp_path / "lines", txt=lambda i: "\n".join(record(i)).encode())
    for source, more in ((path, {}), (lines, {"lines": "each"})):
        steps = loader({"name": "shards", "path": source}, choose="all", roles=["a", "b"], **more)
        for row in words(next(steps)):
            there = record(row["i"])[:2]
            assert row["beside"] == there + [None] * (2 - len(there))
            assert row["text"] == there[0]


def test_of_several_captions_of_a_role_one_is_drawn_at_each_visit(tmp_path):
    path = shards(tmp_path, json=lambda i: {"re": [f"one {i}", f"two {i}"], "caption": f"raw {i}"})
    names = {"rewritten": "re", "raw": "caption"}
    source = {"name": "shards", "path": path, "captions": names}
    steps, again = (loader(source, choose="all", roles=["rewritten", "raw"]) for _ in range(2))
    seen = set()
    for _ in range(4):
        rows = words(next(steps))
        assert rows == words(next(again)), "by the seed"
        for row in rows:
            assert row["beside"][1] == f"raw {row['i']}"
            seen.add(row["beside"][0])
    assert len(seen) > 8


def test_another_field_of_a_role_is_another_run(tmp_path):
    path = shards(tmp_path, json=lambda i: {"a": "x", "b": "y", "caption": "z"})
    config = Captions(choose="all", roles=["long", "short"])
    mappings = (
        {"long": "a", "short": "b"},
        {"long": "b", "short": "a"},
        {"short": "a", "long": "b"},
    )
    prints = [open_shards(Options(path, captions=m), config).fingerprint() for m in mappings]
    assert len(set(prints)) == 3


def test_hard_negatives_belong_to_the_drawn_text_alone(tmp_path):
    with ShardWriter(tmp_path, 8) as writer:
        for i in range(8):
            meta = {"negatives": [f"not a {i}", f"not b {i}"], "negatives_of": [0, 1]}
            writer.add(f"k{i}", encoded(picture(i)), "png", [f"a {i}", f"b {i}"], meta)
    data = data_of(tmp_path, captions={"choose": "all", "n": 2})
    steps = loader_of(data, 8, reads=frozenset({"captions", "negatives"}))
    texts = set()
    for _ in range(3):
        batch = next(steps)
        assert batch.captions_valid.all() and batch.negatives_valid[:, 0].all()
        for row, said in enumerate(words(batch)):
            expected = tokenizer()([f"not {said['text']}"])[0]
            assert torch.equal(batch.negatives[row, 0], expected)
            texts.add(said["text"])
    assert len(texts) > 8, "another caption at another visit"


# Refusals


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({"choose": "random", "n": 4}, "choose: random takes one caption of a sample"),
        ({"choose": "first", "n": 4}, "choose: first takes one caption of a sample"),
        ({"choose": "all", "n": 1}, "n is 1; expected at least 2"),
        ({"choose": "first_sentence", "n": 2}, "n is 2; expected 1 with choose: first_sentence"),
        ({"roles": ["long"]}, "roles belong to choose: all, not random"),
        ({"choose": "all", "roles": ["a", "a"]}, "expected different names"),
        ({"choose": "all", "n": 2, "roles": ["a", "b"]}, "n is 2 beside 2 roles"),
        ({"choose": "every"}, "'every' is not a choice"),
        ({"carried": 4}, "'carried' is called 'n' now; write that"),
    ],
)
def test_captions_that_make_no_sense_are_refused(tmp_path, captions, message):
    with pytest.raises(ConfigError, match=message):
        data_of({"name": "shards", "path": str(tmp_path)}, captions=captions)


def test_roles_of_a_source_must_be_those_of_the_run(tmp_path):
    source = long_and_short(tmp_path)
    for captions in ({}, {"choose": "all", "n": 2}, {"choose": "all", "roles": ["long", "raw"]}):
        with pytest.raises(ValueError, match=r"have the roles long, short, and data\.captions"):
            loader(source, **captions)


def test_samples_of_one_origin_may_bring_several_captions(tmp_path):
    with ShardWriter(tmp_path, 8) as writer:
        for i in range(8):
            meta = {"origin": f"o{i // 2}"}
            writer.add(f"k{i}", encoded(picture(i)), "png", [f"a {i}", f"b {i}"], meta)
    data = data_of(tmp_path, captions={"choose": "all", "n": 2}, together=2)
    batch = next(loader_of(data, 8, reads=READS))
    assert batch.captions_valid.all() and batch.captions.shape[:2] == (8, 2)
    with pytest.raises(ConfigError, match="take one of the two"):
        data_of(tmp_path, captions={"choose": "all"}, together=2)
