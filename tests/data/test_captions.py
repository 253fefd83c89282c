"""What a sample's text members say, whatever their encoding and form, and which of its texts are
trained on.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from tests.data.material import data_of, encoded, loader_of, picture, write_tar
from tests.data.test_loader import take
from tests.data_tools.tools import call, read
from vlp.config import Captions
from vlp.data.captions import Choice, Texts, cut, form_of, read_texts
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards
from vlp.data.text import build
from vlp.data_tools import filter as filter_tool
from vlp.data_tools import reshard
from vlp.eval.datasets import open_source
from vlp.schema import ConfigError
from vlp.types import TextSpec

MARKDOWN = "The image shows a cat.\r\n\r\n- Main object: cat\r\n- Mood: calm\r\n"


def shards(folder, n: int = 8, **texts) -> str:
    """n samples; `texts` are functions from a sample's number to its .txt, .json and so on, or None
    for none.
    """
    members = []
    for i in range(n):
        members.append((f"{i}.png", encoded(picture(i))))
        for kind, text in texts.items():
            if (value := text(i)) is not None:
                members.append(
                    (
                        f"{i}.{kind}",
                        value if isinstance(value, bytes) else json.dumps(value).encode(),
                    )
                )
    return str(write_tar(folder / "0.tar", members))


def captions_of(path: str, **options) -> list[tuple[str, ...]]:
    config = Captions(**options.pop("config", {}))
    source = open_shards(Options(path, **options), config)
    return [source[i].captions for i in range(len(source))]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"caption": "a"}, ("a",)),
        ({"caption": ["a", " b "]}, ("a", "b")),
        ({"captions": "a"}, ("a",)),
        ({"captions": ["a", None, "", "b"]}, ("a", "b")),
        (["a", "b"], ("a", "b")),
        ("a", ("a",)),
        (
            {"captions": [{"raw": "a", "sentid": 3}, {"caption": "b", "id": 1}, {"text": "c"}]},
            ("a", "b", "c"),
        ),
        ({"caption": {"raw": "a"}}, ("a",)),
        ({"captions": [], "caption": "a"}, ("a",)),
        ({"caption": None}, ("the text file",)),
        ({"captions": []}, ("the text file",)),
        ({"caption": 7}, ("the text file",)),
        ({"caption": float("nan")}, ("the text file",)),
        ([], ("the text file",)),
        (None, ("the text file",)),
        ([{"bbox": [1, 2]}], ("the text file",)),
        ({"caption": "a \ud800"}, ("a \ufffd",)),
        ({"caption": "\U0001f600"}, ("\U0001f600",)),
    ],
)
def test_captions_in_a_json_are_read_in_every_usual_form(tmp_path, value, expected):
    path = shards(
        tmp_path, 2, txt=lambda i: b"the text file", json=lambda i: json.dumps(value).encode()
    )
    assert captions_of(path) == [expected] * 2
    assert [record.captions for record in open_source(path).records] == [expected] * 2


@pytest.mark.parametrize(
    ("data", "expected", "note"),
    [
        ("café".encode(), "café", ""),
        ("\ufeffcafé\r\n".encode(), "café", ""),
        ("café".encode("latin-1"), "café", "Windows-1252"),
        ("a “b”".encode("cp1252"), "a “b”", "Windows-1252"),
        ("café".encode("utf-16"), "café", "UTF-16"),
        ("cafe".encode("utf-16-be"), "cafe", "UTF-16-BE"),
        (b"ca\0fe", "cafe", "NUL"),
        ("日本".encode() + b"\xe6", "日本\ufffd", "U+FFFD"),
    ],
)
def test_encodings_are_recognised_and_noted(data, expected, note):
    texts = read_texts({"txt": data})
    assert (
        texts.captions == (expected,)
        and note in "".join(texts.notes)
        and bool(texts.notes) == bool(note)
    )


def test_a_json_in_utf_16_or_with_a_mark_is_a_json():
    encodings = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le")
    assert [read_texts({"json": '{"caption": "é"}'.encode(e)}).captions for e in encodings] == [
        ("é",)
    ] * 4


def test_a_text_of_several_lines_is_one_caption_unless_told_otherwise(tmp_path):
    path = shards(tmp_path, 2, txt=lambda i: MARKDOWN.encode())
    whole = "The image shows a cat.\n\n- Main object: cat\n- Mood: calm"
    lines = ("The image shows a cat.", "- Main object: cat", "- Mood: calm")
    assert captions_of(path) == [(whole,)] * 2
    assert (
        captions_of(path, lines="each")
        == captions_of(path, config={"lines": "each"})
        == [lines] * 2
    )
    assert captions_of(path, lines="one", config={"lines": "each"}) == [(whole,)] * 2
    said = [
        open_shards(Options(path, lines=lines), Captions()).problems() for lines in ("one", "each")
    ]
    assert "of several lines are one caption each in 2 samples" in said[0][0] and not said[1]
    every = loader_of(
        data_of({"name": "shards", "path": path, "lines": "each"}, captions={"choose": "all"}), 6
    )
    assert every.steps_per_epoch == 1 and len(set(map(tuple, next(every).text.tolist()))) == 3
    assert open_source(path).records[0].captions == (whole,)
    assert open_source(path, texts=Texts(lines="each")).records[0].captions == lines


def better(folder) -> str:
    """Eight samples with an old caption, a better one in six of them, two of a third kind, and a
    text file.
    """

    def record(i: int) -> dict:
        meta = {"caption": f"old {i}", "url": "http://x", "TEXT": [f"one {i}", f"two {i}"]}
        return meta | ({"re_caption": f"better {i}"} if i < 6 else {})

    return shards(folder, json=record, txt=lambda i: b"file %d" % i)


def test_captions_are_chosen_by_name(tmp_path, capsys):
    path = better(tmp_path)
    assert captions_of(path) == [(f"old {i}",) for i in range(8)]
    chosen = captions_of(path, captions=["re_caption", "TEXT", "txt"])
    assert chosen == [
        (*([f"better {i}"] if i < 6 else []), f"one {i}", f"two {i}", f"file {i}") for i in range(8)
    ]
    source = open_shards(Options(path, captions=["re_caption", "txt"]), Captions())
    assert source.problems() == [f"{path}: 2 of 8 samples have no text under 're_caption'"]
    assert source.n_captions().tolist() == [2] * 6 + [1] * 2
    with pytest.raises(
        ValueError,
        match=r"no sample of .* under 're_captoin'.*there are TEXT \(8\), .*re_caption \(6\)",
    ):
        captions_of(path, captions=["re_captoin"])
    with pytest.raises(
        ValueError, match=r"2 of 8 samples have no caption under re_caption .*under TEXT \(8\)"
    ):
        captions_of(path, captions=["re_caption"])
    assert len(captions_of(path, captions=["re_caption"], config={"missing": "drop"})) == 6
    assert open_source(path, texts=Texts(captions=["TEXT"])).records[3].captions == (
        "one 3",
        "two 3",
    )
    with pytest.raises(ValueError, match="under 'nothing'"):
        open_source(path, texts=Texts(captions=["nothing"]))


def drawn(
    path: str, steps: int, captions=None, name: str = "shards", **chosen
) -> list[tuple[str, list[int]]]:
    options = {"path": path} if name != "webdataset" else {"urls": path, "samples": 8}
    loader = loader_of(
        data_of({"name": name, **options, "captions": captions or []}, captions=chosen), 8
    )
    return [
        (key, row)
        for batch in take(loader, steps)
        for key, row in zip(batch.key, batch.text.tolist())
    ]


@pytest.mark.parametrize("name", ["shards", "remote", "webdataset"])
def test_choosing_goes_with_every_way_of_drawing(tmp_path, monkeypatch, name):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    path = better(tmp_path)
    address = f"file://{path}" if name == "remote" else path
    ids = build(TextSpec("clip", 16))
    texts = [
        (text.format(i), text)
        for text, i in itertools.product(("better {}", "old {}", "file {}", "one {}"), range(8))
    ]
    kinds = {
        tuple(row): text for row, (_, text) in zip(ids([said for said, _ in texts]).tolist(), texts)
    }

    def count(*args, **options) -> Counter:
        return Counter(kinds[tuple(row)] for _, row in drawn(address, *args, name=name, **options))

    names = ["re_caption", "txt"]
    assert count(1, names, choose="first") == {"better {}": 6, "file {}": 2}
    seeded = count(40, names)
    assert abs(seeded["better {}"] - 120) < 35 and sum(seeded.values()) == 320
    assert count(20, names, choose="weights", weights=[1.0]) == {"better {}": 120, "file {}": 40}
    shared = count(40, {"re_caption": 0.75, "txt": 0.25})
    # All of the two that have no better.
    assert abs(shared["better {}"] - 180) < 35 and abs(shared["file {}"] - 140) < 35
    if name != "webdataset":
        epoch = loader_of(
            data_of({"name": name, "path": address, "captions": names}, captions={"choose": "all"}),
            14,
        )
        assert epoch.steps_per_epoch == 1 and len(set(map(tuple, next(epoch).text.tolist()))) == 14


def test_choices_that_do_not_agree_are_refused(tmp_path):
    path = better(tmp_path)
    for choose in ({"choose": "first"}, {"choose": "all"}, {"choose": "weights", "weights": [1.0]}):
        with pytest.raises(
            ValueError, match=r"drawn by their shares, which data\.captions\.choose"
        ):
            captions_of(path, captions={"re_caption": 1.0}, config=choose)
    for wrong in (["a", "a"], {"a": 0.0}, {"a": -1.0}):
        with pytest.raises(ConfigError, match="different names, with shares above 0"):
            data_of({"name": "shards", "path": path, "captions": wrong})


def test_another_choice_is_another_run(tmp_path):
    path = better(tmp_path)
    options = (
        {},
        {"captions": ["TEXT"]},
        {"captions": ["txt"]},
        {"captions": {"txt": 1.0}},
        {"lines": "each"},
    )
    assert len({open_shards(Options(path, **o), Captions()).fingerprint() for o in options}) == 5


def test_the_index_counts_what_reading_finds(tmp_path):
    values = [
        {"caption": ["a", 3, {"raw": "b"}]},
        ["x"] * 300,
        {"captions": "", "caption": " "},
        {"txt": ["p", "q"]},
        5,
        {"a": {"text": "t"}},
    ]
    path = shards(
        tmp_path,
        len(values),
        json=lambda i: values[i],
        txt=lambda i: MARKDOWN.encode() if i % 2 else None,
    )
    n_checked = 0
    for names in ([], ["txt"], ["caption", "txt"], ["a", "captions", "txt"]):
        for lines in ("one", "each"):
            source = open_shards(
                Options(path, captions=names, lines=lines), Captions(missing="drop")
            )
            assert source.n_captions().tolist() == [
                len(source[i].captions) for i in range(len(source))
            ], (names, lines)
            n_checked += len(source)
    assert n_checked > 25


def test_forms_stay_small_whatever_a_json_holds():
    meta = {f"field {i}": "text" for i in range(1000)} | {"x" * 1000: "text", "caption": "a"}
    form = cut(form_of(meta, "text"))
    assert len(form) <= 66 and form["caption"] == form[".txt"] == 1 and "x" * 1000 not in form
    assert Choice().count(form) == 1 and cut({"caption": 1}) == {"caption": 1}


def test_what_tools_write_is_read_again(tmp_path):
    """Class numbers that a .cls cannot hold, and halves of surrogate pairs, cost nothing on the way
    through two tools.
    """
    odd = [-1, True, 10**9, 3, None, "cat", 2.5, 0]
    path = shards(
        tmp_path / "in",
        json=lambda i: {"caption": f"two dogs and a cat {i} \ud800", "cls": odd[i], "x": "\udfff"},
    )
    call(reshard, path, "--to", tmp_path / "a")
    call(filter_tool, tmp_path / "a", "--to", tmp_path / "b", "--min-words", 1)
    samples = list(read(tmp_path / "b").values())
    assert [sample.meta["cls"] for sample in samples] == odd
    assert [sample.captions for sample in samples] == [
        (f"two dogs and a cat {i} \ufffd",) for i in range(8)
    ]
    assert open_shards(Options(str(tmp_path / "b")), Captions()).n_left_out == 0


def test_another_usual_field_stands_in_where_there_is_no_caption_and_no_class(tmp_path):
    records = [
        {"url": "http://x", "TEXT": "by case", "title": "later"},
        {"title": "later", "description": ["one", "two"]},  # a title may be the file's name
        {"caption": "", "alt-text": "by marks"},
        {"caption": "a caption", "text": "not this"},
        {"class": "cat", "title": "a title"},
        {"url": "http://x", "key": "7"},
    ]
    path = shards(tmp_path, len(records), json=records.__getitem__)
    source = open_shards(Options(path), Captions(missing="drop", class_templates=["a {}"]))
    assert [source[i].captions for i in range(len(source))] == [
        ("by case",),
        ("one", "two"),
        ("by marks",),
        ("a caption",),
        ("a cat",),
    ]
    said = "there is no captions, caption, txt: captions are taken from the field "
    assert said + "TEXT (1), alt-text (1), description (1)" in " ".join(source.problems())
    assert captions_of(path, captions=["title"], config={"missing": "drop"}) == [
        ("later",),
        ("later",),
        ("a title",),
    ]
