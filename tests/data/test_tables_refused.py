"""Quotes that do not quote, damaged files, and tables that must be refused with what to do."""

from __future__ import annotations

import random
import time

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.table_layouts import LAYOUTS, pairs_of, write
from vlp.data.tables import TableOptions, items

QUOTES = [
    # A TSV has no quoting, unless every field that begins with a quote also ends with one.
    ("t.tsv", 'a.jpg\t"Stop" it says\nb.jpg\ty\n', {"a.jpg": ['"Stop" it says'], "b.jpg": ["y"]}),
    (
        "t.tsv",
        'a.jpg\t"open\nb.jpg\ty\nc.jpg\tz"\n',
        {"a.jpg": ['"open'], "b.jpg": ["y"], "c.jpg": ['z"']},
    ),
    ("t.tsv", 'a.jpg\t"open\nb.jpg\t"y\n', {"a.jpg": ['"open'], "b.jpg": ['"y']}),
    ("t.tsv", 'a.jpg\t"two\nlines"\nb.jpg\t"y"\n', {"a.jpg": ["two\nlines"], "b.jpg": ["y"]}),
    (
        "t.csv",
        'a.jpg,"two\nlines, with a comma"\nb.jpg,y\n',
        {"a.jpg": ["two\nlines, with a comma"], "b.jpg": ["y"]},
    ),
    (
        "t.csv",
        'a.jpg,"Stop", it says, loudly\nb.jpg,"y, z"\n',
        {"a.jpg": ['"Stop", it says, loudly'], "b.jpg": ["y, z"]},
    ),
    ("t.csv", 'a.jpg,a 5" nail\nb.jpg,"a ""b"""\n', {"a.jpg": ['a 5" nail'], "b.jpg": ['a "b"']}),
    ("t.csv", 'a.jpg, "x, y" \nb.jpg,y,\n', {"a.jpg": ["x, y"], "b.jpg": ["y,"]}),
]


def test_quotes_that_do_not_quote_are_text(tmp_path):
    assert len(QUOTES) == 8
    for name, content, expected in QUOTES:
        header = "image\tcaption\n" if name.endswith("tsv") else "image,caption\n"
        assert pairs_of(write(tmp_path, name, header + content)) == expected, content


def test_quotes_can_be_said_to_mean_nothing_or_everything(tmp_path):
    path = write(tmp_path, "t.csv", 'image,caption\na.jpg,"open\nb.jpg,x"\nc.jpg,y\n')
    assert pairs_of(path, quoting="csv") == {"a.jpg": ["open\nb.jpg,x"], "c.jpg": ["y"]}
    assert pairs_of(path, quoting="none") == {"a.jpg": ['"open'], "b.jpg": ['x"'], "c.jpg": ["y"]}

    unnamed = write(tmp_path, "ids.csv", "12,A dog\n13,A cat, asleep\n")
    assert pairs_of(unnamed, header=False) == {"12": ["A dog"], "13": ["A cat, asleep"]}
    with pytest.raises(
        ValueError,
        match=r"no column is known to hold image names; it has '12', 'A dog'.*--header no",
    ):
        items(unnamed, TableOptions())


REFUSED = [
    (
        "t.csv",
        'image,caption\na.jpg,"open\nb.jpg,x\nc.jpg,y"\n',
        r"t\.csv:2: a quoted field begins here and takes 2 lines",
    ),
    (
        "t.csv",
        'image,caption\na.jpg,x\nb.jpg,"open\nc.jpg,y\n',
        r"t\.csv:3: a quote opens .*--quoting none",
    ),
    (
        "t.csv",
        'id,caption\n12,"open\n13,x"\n14,y\n',
        r"t\.csv:2: a quoted field begins here and takes 1 lines",
    ),
    (
        "t.csv",
        "image,caption\na.jpg,hallé\n".encode("cp1252"),
        r"t\.csv:2: byte 0xe9 in column 11 is no UTF-8.*--encoding cp1252",
    ),
    ("t.csv", "image,caption\na.jpg,x\0y\n", r"t\.csv:2: found a zero byte"),
    (
        "t.csv",
        "Bild,Worte\na.jpg,x\n",
        r"no column is known to hold captions or classes; it has 'Bild', 'Worte'.*--caption-column",
    ),
    (
        "t.csv",
        "x,y\n1,2\n",
        r"no column is known to hold image names; it has 'x', 'y'.*--image-column",
    ),
    ("t.csv", "image,caption\n", "has no rows below .*image, caption"),
    ("t.csv", "", "t.csv is empty"),
    (
        "t.csv",
        "image,id,caption\na.jpg,x\n",
        r"t\.csv:2: found 2 fields, expected 3 separated by commas.*--separator",
    ),
    ("t.txt", "a.jpg\nb.jpg\n", "holds image names only.*--only"),
    ("t.csv.gz", b"\x1f\x8b\x08abc", "damaged gzip"),
    ("t.xlsx", "x", "is a spreadsheet; save it as CSV"),
    ("t.csv", b"PK\x03\x04xx", "zip archive or a spreadsheet"),
    ("t.doc", "x", r"a table ends in \.csv, "),
    ("t.jsonl", '{"image": "a"}\nno\n', r"t\.jsonl:2: found 'no', which is not valid JSON"),
    ("t.jsonl", '{"image": "a"}\n3\n', r"t\.jsonl:2: found '3', expected a mapping"),
    ("t.json", '{\n"a": }', r"t\.json:2: not valid JSON.*column"),
    ("t.json", "3", "found int, expected rows of captions"),
    ("t.json", "[" * 100_000, "not valid JSON"),
    ("t.json", '{"a": 1}', "is no known caption file: it holds a"),
    ("t.json", '[{"image": "a"}, 3]', "found '3' among the rows"),
    ("t.json", '{"image": ["a"], "caption": []}', "columns differ in length"),
    (
        "t.json",
        '{"images": [{"id": 1, "file_name": "a"}]}',
        r"without annotations .*captions_\*\.json",
    ),
    (
        "instances_val2017.json",
        '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}',
        r"COCO's instances form .*give captions_\*\.json",
    ),
    (
        "t.json",
        '[{"image": "a", "conversations": ['
        '{"from": "gpt", "value": "x"}, {"from": "gpt", "value": "y"}]}]',
        r"row 1: conversations is a dialogue with 2 answers.*--caption-column conversations",
    ),
    ("t.parquet", b"PAR1 nothing", "no whole parquet file"),
    (
        "t.jsonl",
        '{"image": "a", "caption": 5}',
        r"no row can be used:\n.*t\.jsonl:1: caption: found '5', expected a text",
    ),
]


def test_what_cannot_be_read_is_refused_with_what_to_do(tmp_path):
    assert len(REFUSED) == 28
    for name, content, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            items(write(tmp_path, name, content), TableOptions())
    with pytest.raises(
        FileNotFoundError, match=r"no table at .*captoins\.csv, did you mean 'captions\.csv'"
    ):
        write(tmp_path, "captions.csv", "image,caption\n")
        items(tmp_path / "captoins.csv", TableOptions())
    with pytest.raises(FileNotFoundError, match=r"no table at .*/countbench"):
        items(tmp_path / "countbench", TableOptions())
    with pytest.raises(
        ValueError, match=r"is a folder, expected a table; it holds .*captions\.csv"
    ):
        items(tmp_path.rename(tmp_path.with_suffix(".csv")), TableOptions())


def test_damaged_files_are_refused_or_read_and_never_end_in_a_foreign_error(tmp_path):
    chance = random.Random(0)
    pieces = [
        b'"',
        b",",
        b"\n",
        b"\t",
        b"[",
        b"{",
        b"}",
        b"null",
        b"1",
        b"\0",
        b"\xff",
        b'""',
        b":",
        b"[]",
        b"{}",
    ]
    n_refused = n_read = 0
    for name, content, options in LAYOUTS:
        whole = write(tmp_path, name, content).read_bytes()
        for _ in range(8):
            place = chance.randrange(len(whole))
            change = chance.choice(
                [b"", chance.choice(pieces), chance.choice(pieces), chance.randbytes(1)]
            )
            path = write(
                tmp_path, name, whole[:place] + change + whole[place + chance.randrange(3) :]
            )
            try:
                items(path, TableOptions(**options))
                n_read += 1
            except ValueError as error:
                assert type(error) is ValueError and str(path) in str(error), error
                n_refused += 1
    assert n_refused + n_read == 8 * 55 and min(n_refused, n_read) > 100


def test_wrong_options_are_refused(tmp_path):
    path = write(tmp_path, "t.csv", "image,caption\na.jpg,x\n")
    wrong = [
        ({"separator": "xx"}, "is not one character"),
        ({"encoding": "utf9"}, "no encoding is called 'utf9'"),
        ({"image_column": "imgae"}, "no column 'imgae', did you mean 'image'"),
        ({"caption_columns": ["x"]}, "no column 'x'"),
        ({"class_column": "y"}, "no column 'y'"),
        ({"encoding": "ascii", "where": {}}, None),
    ]
    for options, message in wrong:
        if message is None:
            assert pairs_of(path, **options) == {"a.jpg": ["x"]}
            continue
        with pytest.raises(ValueError, match=message):
            items(path, TableOptions(**options))


def test_columns_that_were_never_named_lead_to_no_header_option(tmp_path):
    with pytest.raises(ValueError, match="it has 'column 1', 'column 2'") as refusal:
        items(write(tmp_path, "t.csv", ",\nz.w,a two\n"), TableOptions())
    assert "--header" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"Or of classes: --class-column NAME \(configuration"):
        items(write(tmp_path, "t.csv", "image,x\na.jpg,one\n"), TableOptions())


def test_a_parquet_file_without_rows_says_so(tmp_path):
    names = pyarrow.array([], pyarrow.string())
    parquet.write_table(pyarrow.table({"image": names, "text": names}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet has no rows$"):
        items(tmp_path / "t.parquet", TableOptions())


def test_an_image_that_stands_twice_among_many_is_found_soon(tmp_path):
    rows = ", ".join(f'"{i}.jpg": "a text"' for i in [*range(20_000), 19_999])
    path = write(tmp_path, "t.json", f"{{{rows}}}")
    started = time.process_time()
    with pytest.raises(ValueError, match=r"the key '19999\.jpg' stands twice"):
        items(path, TableOptions())
    assert time.process_time() - started < 2
