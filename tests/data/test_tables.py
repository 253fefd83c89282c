"""One little set of photos with captions, in every form that people bring; and tables that must be
refused.
"""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.material import data_of, encoded, loader_of, picture, write_tar
from vlp.cli import main
from vlp.config import Captions
from vlp.data.archives import Archive
from vlp.data.captions import texts_of
from vlp.data.listing import settle
from vlp.data.sources.folder import Options as FolderOptions
from vlp.data.sources.folder import open as open_folder
from vlp.data.sources.shards import Options as ShardOptions
from vlp.data.sources.shards import open as open_shards
from vlp.data.tables import TableOptions, items, read
from vlp.data.tables.values import converter, equals, texts

PHOTOS = {
    "a.jpg": ["A dog runs, fast .", "Two dogs"],
    "b.jpg": ["Ein großer Hund ; naß"],
    "c.png": ['a sign says "stop" now', "x | y"],
}
PAIRS = [(name, caption) for name, captions in PHOTOS.items() for caption in captions]


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def lines(separator: str, header: str = "", quote: bool = False, end: str = "\n") -> str:
    """A row for each caption."""
    cell = quoted if quote else str
    rows = [f"{cell(name)}{separator}{cell(caption)}" for name, caption in PAIRS]
    return end.join([*([header] if header else []), *rows]) + end


def token() -> str:
    return "".join(
        f"{name}#{number}\t{caption}\n"
        for name, captions in PHOTOS.items()
        for number, caption in enumerate(captions)
    )


def numbered() -> str:
    """Kaggle's results.csv of Flickr30k."""
    rows = [
        f"{name}| {number}| {caption.replace('|', '/')}"
        for name, captions in PHOTOS.items()
        for number, caption in enumerate(captions)
    ]
    return "\n".join(["image_name| comment_number| comment", *rows]) + "\n\n\n"


def wide(first: str = "caption1", second: str = "caption2") -> str:
    rows = [
        f"{name},{quoted(captions[0])},{[*captions, ''][1]}" for name, captions in PHOTOS.items()
    ]
    return "\n".join([f"image, {first} ,{second}", *rows]) + "\n"


def rows(image: str = "image", caption: str = "caption") -> list[dict[str, Any]]:
    return [{image: name, caption: text} for name, text in PAIRS]


def jsonl(content: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)


def coco() -> str:
    ids = {name: number for number, name in enumerate(PHOTOS, 100)}
    images = [{"id": number, "file_name": name} for name, number in ids.items()]
    annotations = [
        {"id": i, "image_id": ids[name], "caption": f"{text}\n"}
        for i, (name, text) in enumerate(PAIRS)
    ]
    return json.dumps({"info": {}, "images": images, "annotations": annotations, "licenses": []})


def karpathy() -> str:
    images = [
        {
            "filename": name,
            "imgid": i,
            "split": "train",
            "sentences": [{"raw": text, "tokens": text.split()} for text in captions],
        }
        for i, (name, captions) in enumerate(PHOTOS.items())
    ]
    return json.dumps({"images": images, "dataset": "flickr8k"})


def llava() -> str:
    talk = [
        {
            "id": str(i),
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe it."},
                {"from": "gpt", "value": text},
            ],
        }
        for i, (name, text) in enumerate(PAIRS)
    ]
    return json.dumps(talk)


def chats() -> str:
    """The form of chats with images in a list."""
    talk = [
        {
            "messages": [
                {"role": "user", "content": "<image>"},
                {"role": "assistant", "content": text},
            ],
            "images": [name],
        }
        for name, text in PAIRS
    ]
    return jsonl(talk)


def hub_csv() -> str:
    """A list in JSON inside a CSV cell, as Flickr30k's table on the hub has it."""
    rows = [
        f'{quoted(json.dumps(captions, ensure_ascii=False))},"[0, 1]",train,{name}'
        for name, captions in PHOTOS.items()
    ]
    return "\n".join(["raw,sentids,split,filename", *rows])


def pandas_csv() -> str:
    return ",img,description\n" + "".join(
        f"{i},{name},{quoted(text)}\n" for i, (name, text) in enumerate(PAIRS)
    )


def in_parquet(image: str, caption: str, as_list: bool) -> pyarrow.Table:
    if as_list:
        return pyarrow.Table.from_pylist(
            [{image: name, caption: captions} for name, captions in PHOTOS.items()]
        )
    return pyarrow.Table.from_pylist(rows(image, caption))


# (file, content, options); all hold PHOTOS.
LAYOUTS: list[tuple[str, Any, dict[str, Any]]] = [
    ("plain.csv", lines(",", "image,caption", quote=True), {}),
    ("crlf.csv", lines(",", "image,caption", quote=True, end="\r\n"), {}),
    ("old_mac.csv", lines("\t", "image\tcaption", end="\r"), {}),
    ("kaggle_captions.txt", lines(",", "image,caption"), {}),
    ("no_header.csv", lines(","), {}),
    ("no_header.tsv", lines("\t"), {}),
    (
        "caption_first.csv",
        "caption,image\n" + "".join(f"{text},{name}\n" for name, text in PAIRS),
        {},
    ),
    ("open_clip.csv", lines("\t", "filepath\ttitle"), {}),
    ("plain.tsv", lines("\t", "image\tcaption"), {}),
    ("quoted.tsv", lines("\t", "image\tcaption", quote=True), {}),
    ("german.csv", lines(";", "Image;Text", quote=True), {}),
    ("excel.csv", "sep=;\n" + lines(";", "image;caption", quote=True), {}),
    (
        "unknown_names.csv",
        lines(";", "Bild;Beschreibung", quote=True),
        {"caption_columns": "Beschreibung"},
    ),
    ("said.csv", lines("~", "image~caption"), {"separator": "~"}),
    ("results.csv", lines("|", "image_name| comment", quote=True), {}),
    ("Flickr8k.token.txt", token(), {}),
    ("results_20130124.token", token(), {}),
    ("blanks.csv", lines(",", " image , Caption ", quote=True), {}),
    ("upper.csv", lines(",", "IMAGE,TEXT", quote=True), {}),
    ("image_path.csv", lines(",", "image_path,txt", quote=True), {}),
    ("camel.csv", lines(",", "imageName,Sentence", quote=True), {}),
    ("pandas.csv", pandas_csv(), {}),
    ("wide.csv", wide(), {}),
    ("wide_zero.csv", wide("caption_0", "caption_1"), {}),
    ("twice.csv", wide("caption", "caption"), {}),
    ("two_names.csv", wide("long", "short"), {"caption_columns": ["long", "short"]}),
    ("hub.csv", hub_csv(), {}),
    ("bom.csv", lines(",", "image,caption", quote=True).encode("utf-8-sig"), {}),
    ("utf16.csv", lines(",", "image,caption", quote=True).encode("utf-16"), {}),
    ("utf16_no_mark.csv", lines("\t", "image\tcaption").encode("utf-16-le"), {}),
    ("utf16_big.tsv", lines("\t", "image\tcaption").encode("utf-16-be"), {}),
    (
        "windows.csv",
        lines(",", "image,caption", quote=True).encode("cp1252"),
        {"encoding": "cp1252"},
    ),
    ("packed.csv.gz", gzip.compress(lines(",", "image,caption", quote=True).encode()), {}),
    ("packed.jsonl.gz", gzip.compress(jsonl(rows()).encode()), {}),
    ("a_line_a_caption.jsonl", jsonl(rows()), {}),
    (
        "a_line_an_image.ndjson",
        jsonl([{"file_name": n, "captions": c} for n, c in PHOTOS.items()]),
        {},
    ),
    ("pairs.jsonl", jsonl([list(pair) for pair in PAIRS]), {}),
    ("list_in.jsonl", json.dumps(rows(), indent=1), {}),
    ("crlf.jsonl", jsonl(rows("Image_Name", "TEXT")).replace("\n", "\r\n") + "\r\n", {}),
    ("lines_in.json", jsonl(rows()), {}),
    (
        "blip.json",
        json.dumps([{"image": n, "caption": c, "image_id": n} for n, c in PHOTOS.items()]),
        {},
    ),
    ("albef.json", json.dumps(rows()), {}),
    ("pairs.json", json.dumps([list(pair) for pair in PAIRS]), {}),
    (
        "map_of_texts.json",
        json.dumps({n: c if len(c) > 1 else c[0] for n, c in PHOTOS.items()}),
        {},
    ),
    (
        "map_of_rows.json",
        json.dumps({n: {"caption": c, "split": "train"} for n, c in PHOTOS.items()}),
        {},
    ),
    (
        "columns.json",
        json.dumps({"image": [n for n, _ in PAIRS], "caption": [c for _, c in PAIRS]}),
        {},
    ),
    (
        "pandas.json",
        json.dumps(
            {
                k: {str(i): p[j] for i, p in enumerate(PAIRS)}
                for j, k in enumerate(("image", "text"))
            }
        ),
        {},
    ),
    ("wrapped.json", json.dumps({"version": 1, "data": rows("image_name", "caption_str")}), {}),
    (
        "raws.json",
        json.dumps(
            [{"filename": n, "sentences": [{"raw": t} for t in c]} for n, c in PHOTOS.items()]
        ),
        {},
    ),
    ("captions_val2017.json", coco(), {}),
    ("dataset_flickr8k.json", karpathy(), {}),
    ("llava.json", llava(), {}),
    ("chats.jsonl", chats(), {}),
    ("rows.parquet", in_parquet("image", "caption", False), {}),
    ("lists.parquet", in_parquet("file_name", "captions", True), {}),
]


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if isinstance(content, pyarrow.Table):
        parquet.write_table(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs_of(path: Path, **options: Any) -> dict[str, list[str]]:
    listing = items(path, TableOptions(**options))
    assert listing.problems == []
    return {item.image: item.captions for item in listing.items}


def test_there_are_many_layouts():
    assert len(LAYOUTS) == 55 and len({name for name, _, _ in LAYOUTS}) == 55


@pytest.mark.parametrize(
    ("name", "content", "options"), LAYOUTS, ids=[name for name, _, _ in LAYOUTS]
)
def test_every_layout_gives_the_same_images_and_captions(tmp_path, name, content, options):
    assert pairs_of(write(tmp_path, name, content), **options) == PHOTOS


def test_kaggles_numbered_comments_are_read(tmp_path):
    expected = {
        name: [text.replace("|", "/") for text in captions] for name, captions in PHOTOS.items()
    }
    assert pairs_of(write(tmp_path, "results.csv", numbered())) == expected


TEN = ("plain.csv", "kaggle_captions.txt", "open_clip.csv", "Flickr8k.token.txt", "wide.csv", "a_line_a_caption.jsonl",
       "captions_val2017.json", "dataset_flickr8k.json", "map_of_texts.json", "lists.parquet")  # fmt: skip


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(PHOTOS):
        (folder / name).write_bytes(
            encoded(picture(number), "PNG" if name.endswith("png") else "JPEG")
        )
    return folder


def pack(*arguments: str | Path) -> int:
    return main(["data", "pack", *map(str, arguments)])


def test_a_newcomers_ten_layouts_pack_and_train_alike(tmp_path, photos, capsys):
    contents = {name: content for name, content, _ in LAYOUTS}
    for name in TEN:
        table = write(tmp_path, name, contents[name])
        assert pack(photos, "--captions", table, "--to", tmp_path / f"packed {name}") == 0, name
        packed = open_shards(ShardOptions(str(tmp_path / f"packed {name}")), Captions())
        direct = open_folder(FolderOptions(path=str(photos), captions=str(table)), Captions())
        for source in (packed, direct):
            assert [list(source[i].captions) for i in range(len(source))] == list(
                PHOTOS.values()
            ), name
    assert capsys.readouterr().out.count("3 images with 5 captions") == len(TEN) == 10


def test_pack_says_which_columns_it_took_and_what_it_left_out(tmp_path, photos, capsys):
    table = write(
        tmp_path,
        "t.csv",
        "filepath;title;id;score\na.jpg;x;007;0.31\nb.jpg;;8;1\ngone.jpg;z;9;\nb;c\n",
    )
    assert pack(photos, "--captions", table, "--to", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "t.csv: image ← filepath, captions ← title; left in the JSON: id, score" in printed.out
    assert (
        "t.csv:3: image 'b.jpg' has neither caption nor class" in printed.err
        and "t.csv:5: found 2 fields" in printed.err
    )
    assert pack(photos, "--captions", table, "--to", tmp_path / "out", "--on-missing", "skip") == 0
    said = "left out: 1 rows that cannot be read, 1 without their image, 1 with neither caption nor class"
    assert said in capsys.readouterr().out
    meta = open_shards(ShardOptions(str(tmp_path / "out")), Captions())[0].meta
    assert meta["id"] == "007" and meta["score"] == 0.31


def test_split_lists_and_conditions_choose_rows(tmp_path, photos, capsys):
    """Flickr8k's lists of names; a column of splits; both for pack and for the source."""
    table = write(tmp_path, "Flickr8k.token.txt", token())
    chosen = write(tmp_path, "Flickr_8k.trainImages.txt", "a.jpg\nc.png\nnowhere.jpg\n")
    assert pack(photos, "--captions", table, "--only", chosen, "--to", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert (
        "2 images with 4 captions" in printed and "1 names in" in printed and "'nowhere'" in printed
    )
    source = open_folder(
        FolderOptions(path=str(photos), captions=str(table), only=str(chosen)), Captions()
    )
    assert len(source) == 2
    stems = write(tmp_path, "stems.txt", "b\nphotos/c\n")
    assert list(pairs_of(table, only=str(stems))) == ["b.jpg", "c.png"]
    with pytest.raises(ValueError, match=r"no name in .*none\.txt is that of an image"):
        items(table, TableOptions(only=str(write(tmp_path, "none.txt", "x.jpg\n"))))

    split = write(
        tmp_path,
        "split.csv",
        "image,caption,Split,fold,ok\na.jpg,x,train,1,True\nb.jpg,y,test,2,False\n",
    )
    for where, image in [
        ({"split": "test"}, "b.jpg"),
        ({"fold": 1}, "a.jpg"),
        ({"ok": True}, "a.jpg"),
        ({"fold": "2.0"}, "b.jpg"),
        ({"split": ["val", "train"]}, "a.jpg"),
    ]:
        assert list(pairs_of(split, where=where)) == [image]
    assert (
        "rows of all splits are taken together (train (1), test (1))"
        in items(split, TableOptions()).notes[0]
    )
    assert (
        pack(
            photos,
            "--captions",
            split,
            "--where",
            "split=train",
            "--where",
            "split=test",
            "--to",
            tmp_path / "both",
        )
        == 0
    )
    assert "2 images with 2 captions" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"no row with Split = 'tset'; Split holds train \(1\), test \(1\)"
    ):
        items(split, TableOptions(where={"split": "tset"}))
    with pytest.raises(
        ValueError, match=r"no column 'part'.*columns: 'image', 'caption', 'Split', 'fold', 'ok'"
    ):
        items(split, TableOptions(where={"part": "x"}))


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
        '[{"image": "a", "conversations": [{"from": "gpt", "value": "x"}, {"from": "gpt", "value": "y"}]}]',
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


def test_rows_that_cannot_be_used_are_named_each(tmp_path):
    content = [
        {"image": 3, "caption": "x"},
        {"image": "a", "caption": 5},
        {"caption": "x"},
        {"image": ["b", "c"], "caption": "y"},
    ]
    listing = items(write(tmp_path, "t.jsonl", jsonl(content)), TableOptions())
    assert [item.image for item in listing.items] == ["3"]
    places = [problem.split(": ", 1)[0] for problem in listing.problems]
    assert places == [f"{tmp_path}/t.jsonl:{line}" for line in (2, 3, 4)]
    classes = items(
        write(tmp_path, "c.csv", "image,class\na.jpg,cat\na.jpg,dog\nb.jpg,10\nc.jpg,9\n"),
        TableOptions(),
    )
    assert (
        "c.csv:3: image 'a.jpg' is of the class 'dog' here and of 'cat' in row 2"
        in classes.problems[0]
    )
    assert classes.classes == ["9", "10", "cat", "dog"]


def test_rows_of_one_image_are_joined_and_equal_captions_kept_once(tmp_path):
    content = [
        {"image": "a", "caption": "x", "n": 1},
        {"image": "b", "caption": "z"},
        {"image": "a", "caption": "y", "n": 2},
        {"image": "a", "caption": "x", "n": 1},
        {"image": "./b", "captions": None, "caption": "w"},
    ]
    listing = items(
        write(tmp_path, "t.jsonl", jsonl(content)), TableOptions(caption_columns="caption")
    )
    assert {item.image: item.captions for item in listing.items} == {
        "a": ["x", "y"],
        "b": ["z"],
        "./b": ["w"],
    }
    assert "rows of one image differ in n; the first row's values are kept" in listing.notes[0]


@pytest.mark.parametrize(
    "content",
    [
        "a one\thttps://x.y/z/p1.jpg?w=3&h=2\na two\thttps://x.y/z/p2.jpg?w=3&h=2\n",
        "image_url\tcaption\nhttps://x.y/p1.jpg?w=3\ta one\nhttp://x.y/p%32.jpg\ta two\n",
        "image\tcaption\n./photos/p1.jpg?raw=true\ta one\np2.jpg\ta two\n",
    ],
)
def test_addresses_are_found_by_the_name_in_them(tmp_path, content):
    for name in ("p1.jpg", "p2.jpg"):
        (tmp_path / name).write_bytes(b"x")
    archive = Archive(tmp_path)
    listing = items(write(tmp_path, "t.tsv", content), TableOptions())
    named = [(archive.find(item.image), item.captions) for item in listing.items]
    assert named == [("p1.jpg", ["a one"]), ("p2.jpg", ["a two"])]
    assert all(archive.agrees(item.image, name) for item, (name, _) in zip(listing.items, named))


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


def test_ids_of_coco_may_be_numbers_here_and_texts_there(tmp_path):
    content = {
        "images": [{"id": "1", "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": "2", "caption": "y"}],
    }
    listing = items(write(tmp_path, "c.json", json.dumps(content)), TableOptions())
    assert [(item.image, item.captions) for item in listing.items] == [
        ("a.jpg", ["x"]),
        ("b.jpg", ["y"]),
    ]


def test_annotations_of_images_that_cocos_file_does_not_list_are_refused_or_counted(
    tmp_path, photos, capsys
):
    content = json.loads(coco())
    content["images"] = content["images"][1:]  # a.jpg, with two captions
    table = write(tmp_path, "captions.json", json.dumps(content))
    refusal = r"captions\.json: annotations\[0\] names image 100, which .* remove the annotation"
    source = {"name": "folder", "path": str(photos), "captions": str(table)}
    with pytest.raises(ValueError, match=rf"2 rows cannot be used(.|\n)*{refusal}"):
        loader_of(data_of(source), 2)
    loader = loader_of(data_of({**source, "on_missing": "skip"}), 2)
    assert (loader.n_samples, loader.counters()["left_out_samples"]) == (2, 2)

    pack = ["data", "pack", str(photos), "--captions", str(table), "--to", str(tmp_path / "out")]
    assert main(pack) == 1
    assert "annotations[1] names image 100" in capsys.readouterr().err
    assert main([*pack, "--on-missing", "skip"]) == 0
    said = capsys.readouterr().out
    assert "left out: 2 rows that cannot be read" in said
    assert "2 images with 3 captions" in said


def test_columns_that_were_never_named_lead_to_no_header_option(tmp_path):
    with pytest.raises(ValueError, match="it has 'column 1', 'column 2'") as refusal:
        items(write(tmp_path, "t.csv", ",\nz.w,a two\n"), TableOptions())
    assert "--header" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"Or of classes: --class-column NAME \(configuration"):
        items(write(tmp_path, "t.csv", "image,x\na.jpg,one\n"), TableOptions())


def test_spellings_of_one_image_are_one_item_and_may_not_contradict_each_other(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"x")
    content = [
        {"image": "a/1.png", "caption": "x", "class": "cat", "negatives": ["n"]},
        {"image": "./a/1.png", "caption": "y", "class": "cat", "negatives_of": [0]},
        {"image": "A/1.PNG", "caption": "z", "class": "dog"},
    ]
    archive = Archive(tmp_path)
    listing = items(write(tmp_path, "t.jsonl", jsonl(content)), TableOptions())
    named = [(item, archive.find(item.image)) for item in listing.items]
    ((item, name),), problems = settle(named, archive)
    assert (name, item.captions, item.class_name) == ("a/1.png", ["x", "y", "z"], "cat")
    assert problems == ["image 'a/1.png' is of the class 'dog' here and of 'cat' in row 1"]
    assert "negatives_of" not in item.meta  # it would number the captions of another row


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


def test_the_folder_source_takes_what_the_table_reader_takes(tmp_path, photos):
    table = write(
        tmp_path, "t.csv", 'Bild;Worte;score\na.jpg;"x; y";0.5\nb.jpg;z;0.25\ngone.jpg;w;1\n'
    )
    source = {
        "name": "folder",
        "path": str(photos),
        "captions": str(table),
        "image_column": "bild",
        "caption_columns": ["worte"],
    }
    with pytest.raises(
        ValueError, match=r"1 rows cannot be used, 1 of them .*\n.*t\.csv:4: no image 'gone\.jpg'"
    ):
        loader_of(data_of(source), 2)
    batch = next(loader_of(data_of({**source, "on_missing": "skip", "separator": ";"}), 2))
    assert sorted(batch.score.tolist()) == [0.25, 0.5]


def test_reading_leaves_a_json_table_as_it_is(tmp_path):
    assert read(write(tmp_path, "t.json", '[{"a": "007", "b": 1.50}]')).records() == [
        {"a": "007", "b": 1.5}
    ]
    assert read(write(tmp_path, "t.csv", "a,b\n007,1.50\n")).records(texts=["b"]) == [
        {"a": "007", "b": "1.50"}
    ]
