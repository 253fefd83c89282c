"""One little set of photos with captions, in every form that people bring."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from vlp.data.tables import TableOptions, items

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
