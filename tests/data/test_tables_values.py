"""What stands in the cells of a table: numbers, dates, lists, dialogues and unusual characters."""

from __future__ import annotations

import json
import time

import pyarrow
import pytest

from tests.data.material import encoded, picture, write_tar
from tests.data.table_layouts import jsonl, pairs_of, write
from vlp.config import Captions
from vlp.data.captions import texts_of
from vlp.data.sources.shards import Options as ShardOptions
from vlp.data.sources.shards import open as open_shards
from vlp.data.tables import TableOptions, items, read
from vlp.data.tables.values import converter, equals, texts

CELLS = [
    (["0.31", "2", ""], [0.31, 2]),
    (["1", "20"], [1, 20]),
    (["007", "12"], ["007", "12"]),
    (["-3", "+4"], ["-3", "+4"]),
    (["9007199254740993", "1"], ["9007199254740993", "1"]),
    (["12345678901234567890"], ["12345678901234567890"]),
    (["1e5", "2e3"], ["1e5", "2e3"]),
    (["1e-05", "0.5"], [1e-05, 0.5]),
    (["nan", "0.5"], [None, 0.5]),
    (["nan", "x"], ["nan", "x"]),
    (["True", "false"], [True, False]),
    (["true", "yes"], ["true", "yes"]),
    (["1.", ".5"], [1.0, 0.5]),
    (["1_000"], ["1_000"]),
    (['["a", "b"]', "[]"], [["a", "b"], []]),
    (["[a]", "[b]"], ["[a]", "[b]"]),
    (["1,5"], ["1,5"]),
    (["NaN"], ["NaN"]),
    (["0x10"], ["0x10"]),
    (["1e999", "2.0"], ["1e999", "2.0"]),
    (["-0.5", "1E+2"], [-0.5, 100.0]),
    (["２"], ["２"]),
]


def test_a_column_is_numeric_only_if_every_value_is():
    assert len(CELLS) == 22
    for cells, expected in CELLS:
        convert = converter(cells)
        found = [convert(cell) for cell in cells if cell]
        assert found == expected and list(map(type, found)) == list(map(type, expected)), cells


def test_values_of_parquet_become_json(tmp_path):
    import datetime
    import decimal

    table = pyarrow.table(
        {
            "image": ["a.jpg"],
            "caption": ["x"],
            "score": pyarrow.array([0.31], pyarrow.float32()),
            "nothing": [float("nan")],
            "far": [float("inf")],
            "price": [decimal.Decimal("1.50")],
            "whole": [decimal.Decimal("3")],
            "day": [datetime.date(2026, 1, 2)],
            "at": [datetime.datetime(2026, 1, 2, 3, 4)],
            "kind": pyarrow.array(["dog"]).dictionary_encode(),
            "raw": [b"123"],
            "deep": [{"a": [1, None]}],
            "ns": pyarrow.array([1], pyarrow.timestamp("ns")),
            "picture": [{"bytes": None, "path": "p.jpg"}],
        }
    )
    listing = items(write(tmp_path, "t.parquet", table), TableOptions())
    expected = {
        "image": "a.jpg",
        "score": 0.31,
        "price": 1.5,
        "whole": 3,
        "day": "2026-01-02",
        "at": "2026-01-02T03:04:00",
        "kind": "dog",
        "deep": {"a": [1, None]},
        "ns": "1970-01-01T00:00:00",
        "picture": "p.jpg",
    }
    assert listing.items[0].meta == expected and "column 'raw' holds bytes" in listing.notes[0]

    json.dumps(listing.items[0].meta, allow_nan=False)
    with_pictures = pyarrow.table({"image": [{"bytes": b"x", "path": "a.jpg"}], "text": ["x"]})
    with pytest.raises(
        ValueError, match=r"column 'image' holds the pictures themselves.*huggingface"
    ):
        items(write(tmp_path, "p.parquet", with_pictures), TableOptions())


def test_unusual_characters_stay_in_their_captions(tmp_path):
    odd = [
        "line\u2028separator",
        "next\u0085line",
        "form\x0cfeed",
        "tab\there",
        "nul\u0000",
        "emoji 🐕",
    ]
    content = jsonl([{"image": "a.jpg", "caption": text} for text in odd])
    assert pairs_of(write(tmp_path, "t.jsonl", content)) == {"a.jpg": odd}

    raw = "".join(f'{{"image": "a.jpg", "caption": "{text}"}}\n' for text in odd[:4])
    assert pairs_of(write(tmp_path, "raw.jsonl", raw)) == {"a.jpg": odd[:4]}
    assert pairs_of(
        write(tmp_path, "t.csv", "image,caption\n" + "".join(f"a.jpg,{t}\n" for t in odd[:3]))
    ) == {"a.jpg": odd[:3]}

    halves = '{"image": "a.jpg", "caption": "x \\ud83d\\udc15 \\ud800 y", "k\\ud800": "\\udc00"}'
    item = items(write(tmp_path, "s.jsonl", halves), TableOptions()).items[0]
    assert item.captions == ["x 🐕 \ufffd y"] and item.meta == {
        "image": "a.jpg",
        "k\ufffd": "\ufffd",
    }


def test_entries_of_a_list_say_the_same_in_tables_and_shards():
    entries = ["a", {"raw": "b", "caption": "c"}, {"sentence": " d "}, {"text": "e", "id": 1}]
    assert texts(entries) == texts_of(entries) == ["a", "c", "d", "e"]


WRITTEN_LISTS = [
    ('["a dog", "a cat"]', ("a dog", "a cat")),
    ("['a dog', \"a cat's\"]", ("a dog", "a cat's")),
    (' [ "a dog" ] ', ("a dog",)),
    ("[a dog]", ("[a dog]",)),
    ('["a dog", 3]', ('["a dog", 3]',)),
    ('["a dog"', ('["a dog"',)),
    ('["a dog"] ["a cat"]', ('["a dog"] ["a cat"]',)),
]


def test_a_list_that_is_written_into_a_text_is_that_list_in_tables_and_shards(tmp_path):
    members = []
    for i, (value, captions) in enumerate(WRITTEN_LISTS):
        assert tuple(texts(value)) == captions
        members.append((f"{i}.png", encoded(picture(i))))
        members.append((f"{i}.json", json.dumps({"captions": value}).encode()))

    source = open_shards(ShardOptions(str(write_tar(tmp_path / "0.tar", members))), Captions())
    assert [source[i].captions for i in range(len(source))] == [c for _, c in WRITTEN_LISTS]
    assert source.n_captions().tolist() == [2, 2, 1, 1, 1, 1, 1]


def test_a_text_that_only_looks_like_a_list_is_read_in_no_time():
    longest = "[" + "'a'," * (1 << 18) + "]"
    started = time.perf_counter()
    assert texts(longest) == texts_of(longest) == [longest]
    assert time.perf_counter() - started < 1


def test_captions_come_from_texts_lists_and_mappings():
    for value, expected in [
        ("x ", ["x"]),
        (["x", "", " y"], ["x", "y"]),
        ('["x", "y"]', ["x", "y"]),
        ("['x']", ["x"]),
        ("[Music]", ["[Music]"]),
        ("[1, 2]", ["[1, 2]"]),
        ([{"raw": "x"}, {"caption": "y"}], ["x", "y"]),
        (None, []),
        ("", []),
        (["x", None], ["x"]),
        (
            [{"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}],
            ["x"],
        ),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}], ["x"]),
    ]:
        assert texts(value) == expected
    assert (
        equals("a", "a")
        and not equals("a", "b")
        and equals(1.0, "1")
        and equals(None, "")
        and not equals("x", 1)
    )


def test_reading_leaves_a_json_table_as_it_is(tmp_path):
    assert read(write(tmp_path, "t.json", '[{"a": "007", "b": 1.50}]')).records() == [
        {"a": "007", "b": 1.5}
    ]
    assert read(write(tmp_path, "t.csv", "a,b\n007,1.50\n")).records(texts=["b"]) == [
        {"a": "007", "b": "1.50"}
    ]
