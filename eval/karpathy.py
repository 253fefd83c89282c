"""Caption annotations as published: Karpathy's splits, clip_benchmark's excerpts of them, COCO's own files.

    dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json     Karpathy and Fei-Fei 2015: one file, all splits
    captions_val2014.json, coco_test_karpathy.json                        COCO's form: images[], annotations[]
    coco_karpathy_test.json, flickr30k_test.json                          a list of {image, caption: […]} (BLIP, ARO)
    flickr30k_test_karpathy.txt                                           "name.jpg,caption" lines under a header

The images lie elsewhere: a folder (searched in depth) or a .tar.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from vlp.eval.datasets import Record, Source
from vlp.eval.pictures import Collection, DataError, refuse_missing

SUFFIXES = (".json", ".txt", ".csv")


def read(path: Path, images: str | None, split: str, missing: str) -> Source:
    """The images of `split` with all their captions, in the annotations' order."""
    if not path.exists():
        raise DataError(f"no annotations at {path}")
    captions = _lines(path) if path.suffix != ".json" else _json(path, split)
    empty = [name for name, texts in captions if not texts]
    if empty:
        raise DataError(f"{path}: {len(empty)} images have no caption, e.g. {', '.join(empty[:5])}; remove them or annotate them")
    collection = Collection(Path(images) if images else path.parent)
    found = [(collection.find(name), name, texts) for name, texts in captions]
    absent = [name for picture, name, _ in found if picture is None]
    refuse_missing(absent, len(found), collection, missing)
    records = [Record(picture, tuple(texts)) for picture, _, texts in found if picture]
    return Source(path.stem, records, skipped=absent)


def _json(path: Path, split: str) -> list[tuple[str, list[str]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if isinstance(content, list):
        return _merged((row["image"], _texts(row["caption"])) for row in content)
    if isinstance(content, dict) and "annotations" in content and "images" in content:
        return _coco(content)
    if isinstance(content, dict) and content.get("images") and "sentences" in content["images"][0]:
        return _karpathy(content["images"], path, split)
    raise DataError(
        f"{path} is no known caption file: expected Karpathy's (images[].sentences), COCO's (images, annotations) or a list "
        "of {image, caption}"
    )


def _karpathy(rows: list[dict[str, Any]], path: Path, split: str) -> list[tuple[str, list[str]]]:
    splits = Counter(row["split"] for row in rows)
    if split not in splits:
        raise DataError(f"{path} has no split {split!r}; it has {dict(splits)}; pass split=…")
    chosen = [row for row in rows if row["split"] == split]
    return [
        ("/".join(p for p in (row.get("filepath", ""), row["filename"]) if p), [s["raw"].strip() for s in row["sentences"]])
        for row in chosen
    ]


def _coco(content: dict[str, Any]) -> list[tuple[str, list[str]]]:
    captions: dict[Any, list[str]] = {row["id"]: [] for row in content["images"]}
    for row in content["annotations"]:
        if row["image_id"] not in captions:
            raise DataError(f"annotation {row.get('id')} names image {row['image_id']}, which the file's images do not list")
        captions[row["image_id"]].append(row["caption"].strip())
    return [(row["file_name"], captions[row["id"]]) for row in content["images"]]


def _lines(path: Path) -> list[tuple[str, list[str]]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], 2):
        name, separator, caption = line.strip().partition(".jpg,")  # captions hold commas too
        if line.strip() and not separator:
            raise DataError(f"{path}:{number} is not of the form name.jpg,caption: {line[:80]!r}")
        if line.strip():
            rows.append((name + ".jpg", [caption.strip().strip('"')]))
    return _merged(rows)


def _merged(rows: Any) -> list[tuple[str, list[str]]]:
    merged: dict[str, list[str]] = {}
    for name, texts in rows:
        merged.setdefault(name, []).extend(texts)
    return list(merged.items())


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
