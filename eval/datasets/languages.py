"""Published sets of captions in several languages, told by the layout of their folders.

Crossmodal-3600   captions.jsonl (`image/key`, and for each language `caption`), images/KEY.jpg
XTD               test_image_names.txt and test_1kcaptions_LANG.txt, at any depth: line by line
tables            one a language, NAME-LANG.json, .jsonl, .csv or .tsv, of any form that retrieval
                  reads: multilingual COCO, Flickr30k-CN, COCO-CN and Flickr30k-200 after conversion
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlp.data.tables import TableOptions
from vlp.eval import choices
from vlp.eval.datasets import tables
from vlp.eval.datasets.source import Record, Source
from vlp.eval.pictures import Collection, DataError, refuse_missing

_XTD = re.compile(r"test_1kcaptions_(\w+)\.txt")
_TABLE = re.compile(r".+[-_.]([a-z]{2,3}(?:[-_][A-Za-z0-9]{2,8})?)\.(?:json|jsonl|csv|tsv)")


def read(
    folder: Path, images: str | None, split: str, missing: str, options: TableOptions
) -> dict[str, Source]:
    """{language: its captions}; a DataError where the folder is none of the layouts."""
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}; expected one with captions in several languages")
    if (folder / "captions.jsonl").is_file():
        return _crossmodal(folder, images, missing)

    xtd = {match[1]: path for path, match in _matching(folder.rglob("*.txt"), _XTD)}
    if xtd:
        return _xtd(folder, xtd, images, missing)
    named = {match[1]: path for path, match in _matching(folder.iterdir(), _TABLE)}
    if not named:
        raise DataError(
            f"{folder} has neither captions.jsonl (Crossmodal-3600) nor test_1kcaptions_*.txt "
            "(XTD) nor tables such as captions-de.json"
        )
    sources: dict[str, Source] = {}
    for language, path in sorted(named.items()):
        pairs = _clip_benchmark(path)
        if pairs is not None:
            sources |= _sources(folder, images or str(folder), {language: pairs}, missing)
        else:
            place = images or str(folder)
            sources[language] = tables.from_table(path, place, split, missing, options)
    return sources


def _clip_benchmark(path: Path) -> list[tuple[str, Sequence[str]]] | None:
    """The pairs of clip_benchmark's files, {image_paths, annotations}; None for other tables."""
    value = choices.read_json(path) if path.suffix == ".json" else None
    if not isinstance(value, dict) or not {"image_paths", "annotations"} <= value.keys():
        return None

    # One caption an image stands there as a text.
    captions = [[entry] if isinstance(entry, str) else entry for entry in value["annotations"]]
    if len(captions) != len(value["image_paths"]):
        raise DataError(
            f"{path} has {len(captions)} annotations for {len(value['image_paths'])} image_paths"
        )
    return list(zip(value["image_paths"], captions))


def _matching(paths: Iterable[Path], pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    """The paths whose names the pattern matches, in their order."""
    matches = [(path, pattern.fullmatch(path.name)) for path in sorted(paths)]
    return [(path, match) for path, match in matches if match]


def _crossmodal(folder: Path, images: str | None, missing: str) -> dict[str, Source]:
    rows = tables.read_rows(folder / "captions.jsonl")
    captions: dict[str, list[tuple[str, Sequence[str]]]] = {}
    for number, row in enumerate(rows):
        key = row.get("image/key")
        if not isinstance(key, str):
            raise DataError(f"{folder / 'captions.jsonl'}: item {number} lacks image/key")
        for language, value in row.items():
            texts = value.get("caption") if isinstance(value, dict) else None
            if texts:
                captions.setdefault(language, []).append((key, texts))
    return _sources(folder, images or str(folder / "images"), captions, missing)


def _xtd(
    folder: Path, files: dict[str, Path], images: str | None, missing: str
) -> dict[str, Source]:
    lists = sorted(folder.rglob("test_image_names.txt"))
    if not lists:
        raise DataError(f"{folder} has no test_image_names.txt, which says whose the captions are")
    names = _lines(lists[0])

    captions: dict[str, list[tuple[str, Sequence[str]]]] = {}
    for language, path in sorted(files.items()):
        texts = _lines(path)
        if len(texts) != len(names):
            raise DataError(f"{path} has {len(texts)} captions for {len(names)} images")
        captions[language] = [(name, [text]) for name, text in zip(names, texts)]
    return _sources(folder, images or str(folder), captions, missing)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]


def _sources(
    folder: Path, images: str, captions: dict[str, list[tuple[str, Sequence[str]]]], missing: str
) -> dict[str, Source]:
    """The captions of each language whose images are there."""
    collection = Collection(images)
    sources = {}
    for language, pairs in captions.items():
        pictured: list[tuple[Any, Sequence[str]]] = []
        absent = []
        for name, texts in pairs:
            picture = collection.find(name)
            if picture is None:
                absent.append(name)
            else:
                pictured.append((picture, texts))
        refuse_missing(absent, len(pairs), collection, missing)
        records = [Record(picture, tuple(texts)) for picture, texts in pictured]
        sources[language] = Source(f"{folder}/{language}", records, skipped=absent)
    return sources
