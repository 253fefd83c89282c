"""Published sets of captions in several languages, told by the layout of their folders.

Crossmodal-3600   captions.jsonl (`image/key`, and for each language `caption`), images/KEY.jpg
XTD               test_image_names.txt and test_1kcaptions_LANG.txt, at any depth: line by line
Flickr30k-200     filenames.txt, of XTD-200 test_image_names.txt, and LANG.txt by FLORES' codes
                  (zho_Hans.txt): line by line
tables            one a language, NAME-LANG.json, .jsonl, .csv or .tsv, of any form that retrieval
                  reads: the files that clip_benchmark writes (multilingual COCO, XTD-10,
                  Crossmodal-3600, …), or your own
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlp.data.tables import Listing, TableOptions
from vlp.eval.datasets import tables
from vlp.eval.datasets.source import Record, Source
from vlp.eval.pictures import Collection, DataError, refuse_missing

_XTD = re.compile(r"test_1kcaptions_(\w+)\.txt")
_FLORES = re.compile(r"([a-z]{3}_[A-Z][a-z]{3})\.txt")
_TABLE = re.compile(r".+[-_.]([a-z]{2,3}(?:[-_][A-Za-z0-9]{2,8})?)\.(?:json|jsonl|csv|tsv)")
_NAMES = ("test_image_names.txt", "filenames.txt")

Pairs = list[tuple[str, Sequence[str]]]  # an image's name and its captions
Captions = dict[str, Pairs | Listing]  # by language


def read(
    folder: Path, images: str | None, split: str, missing: str, options: TableOptions
) -> dict[str, Source]:
    """{language: its captions}; a DataError where the folder is none of the layouts."""
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}; expected one with captions in several languages")

    place = folder
    if (folder / "captions.jsonl").is_file():
        place = folder / "images"
        captions = _crossmodal(folder / "captions.jsonl")
    else:
        captions = _line_by_line(folder) or _tables(folder, split, missing, options)
    if not captions:
        raise DataError(
            f"{folder} has neither captions.jsonl (Crossmodal-3600) nor test_1kcaptions_*.txt "
            "(XTD) nor zho_Hans.txt and the like (Flickr30k-200) nor tables such as "
            "captions-de.json"
        )

    # The images are listed once: a folder of thousands would be walked 36 times otherwise.
    collection = Collection(images or place)
    sources: dict[str, Source] = {}
    for language, annotated in captions.items():
        name = f"{folder}/{language}"
        if isinstance(annotated, Listing):
            sources[language] = tables.with_pictures(Path(name), annotated, collection, missing)
        else:
            sources[language] = _with_pictures(name, annotated, collection.anew(), missing)
    return sources


def _with_pictures(name: str, pairs: Pairs, collection: Collection, missing: str) -> Source:
    """The pairs whose images are there, as an evaluation set."""
    records: list[Record] = []
    absent: list[str] = []
    for image, texts in pairs:
        picture = collection.find(image)
        if picture is None:
            absent.append(image)
        else:
            records.append(Record(picture, tuple(texts)))

    refuse_missing(absent, len(pairs), collection, missing)
    return Source(name, records, skipped=absent)


# --- the layouts ----------------------------------------------------------------------------------


def _crossmodal(path: Path) -> Captions:
    captions: dict[str, Pairs] = {}
    for number, row in enumerate(tables.read_rows(path)):
        key = row.get("image/key")
        if not isinstance(key, str):
            raise DataError(f"{path}: item {number} lacks image/key")
        for language, value in row.items():
            texts = value.get("caption") if isinstance(value, dict) else None
            if texts:
                captions.setdefault(language, []).append((key, texts))
    return dict(captions)


def _line_by_line(folder: Path) -> Captions:
    """XTD's and Flickr30k-200's captions; empty where there are none."""
    files = _matching(folder.rglob("*.txt"), _XTD) or _matching(folder.rglob("*.txt"), _FLORES)
    if not files:
        return {}

    lists = [path for name in _NAMES for path in sorted(folder.rglob(name))]
    if not lists:
        raise DataError(f"{folder} has no {' or '.join(_NAMES)}, which says whose the captions are")
    names = _lines(lists[0])

    captions: Captions = {}
    for language, path in files.items():
        texts = _lines(path)
        if len(texts) != len(names):
            raise DataError(f"{path} has {len(texts)} captions for {len(names)} images")
        captions[language] = [(name, [text]) for name, text in zip(names, texts)]
    return captions


def _tables(folder: Path, split: str, missing: str, options: TableOptions) -> Captions:
    """A table a language; empty where there are none."""
    captions: Captions = {}
    for language, path in _matching(folder.iterdir(), _TABLE).items():
        pairs = _clip_benchmark(path)
        if pairs is None:
            captions[language] = tables.read_items(path, split, missing, options)
        else:
            captions[language] = pairs
    return captions


def _clip_benchmark(path: Path) -> Pairs | None:
    """The pairs of clip_benchmark's files, {image_paths, annotations}; None for other tables."""
    value = tables.read_json(path) if path.suffix == ".json" else None
    if not isinstance(value, dict) or not {"image_paths", "annotations"} <= value.keys():
        return None

    # One caption an image stands there as a text.
    captions = [[entry] if isinstance(entry, str) else entry for entry in value["annotations"]]
    if len(captions) != len(value["image_paths"]):
        raise DataError(
            f"{path} has {len(captions)} annotations for {len(value['image_paths'])} image_paths"
        )
    return list(zip(value["image_paths"], captions))


def _matching(paths: Iterable[Path], pattern: re.Pattern[str]) -> dict[str, Path]:
    """{language: the file whose name the pattern matches}, by the alphabet of languages."""
    matches = [(path, pattern.fullmatch(path.name)) for path in sorted(paths)]
    by_language = {match[1]: path for path, match in matches if match}
    return dict(sorted(by_language.items()))


def _lines(path: Path) -> list[str]:
    """The lines that are not blank. Only line feeds end one: captions hold other separators."""
    lines = path.read_text("utf-8-sig").split("\n")
    return [line.strip() for line in lines if line.strip()]
