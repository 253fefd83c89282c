"""Published sets of long captions, told by the layout of their folders.

Urban1k      image/1.jpg and caption/1.txt, whose first line is the caption (Long-CLIP)
DOCCI        docci_descriptions.jsonlines (image_file, description, split) and images/
DCI          splits.json, photos/ and complete/ or annotations/, also in densely_captioned_images/;
             an image's caption is its short_caption and its extra_caption, one under the other

ShareGPT4V's is a table of dialogues, which `tables` reads; its validation set is the first 1,000
rows, `rows=:1000`. IIW-400 is a table too, data.jsonl with DOCCI's images_aar/:
`image_column=image/key caption_columns=IIW`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vlp.data.captions import MAX_TEXT_BYTES
from vlp.data.tables import TableOptions
from vlp.eval.datasets import tables
from vlp.eval.datasets.source import Record, Source
from vlp.eval.pictures import Collection, DataError, refuse_missing

_DOCCI = "docci_descriptions.jsonlines"
_ALL = "all"  # instead of a split


class _Pair(NamedTuple):
    """An image by its name in the set, and its caption."""

    image: str
    caption: str


Reader = Callable[[str, str, "str | None"], Source]  # of split, missing and images


def reader_of(root: Path, options: TableOptions) -> Reader | None:
    """What reads the set in a folder; None for other layouts.

    options: of the set that is a table.
    """
    base = root / "densely_captioned_images"
    base = base if base.is_dir() else root
    if (root / _DOCCI).is_file():
        return lambda split, missing, images: tables.from_table(
            root / _DOCCI, images or str(root / "images"), split, missing, options
        )
    if (base / "splits.json").is_file() and (base / "photos").is_dir():
        return lambda split, missing, images: _dci(base, split, missing, images)
    if (root / "image").is_dir() and any((root / "caption").glob("*.txt")):
        return lambda split, missing, images: _urban1k(root, missing, images)
    return None


def _urban1k(root: Path, missing: str, images: str | None) -> Source:
    """One split, whatever it is called."""
    pairs = []
    for path in sorted((root / "caption").glob("*.txt")):
        lines = _text(path).strip().splitlines()
        if not lines:
            raise DataError(f"{path} is empty, expected a caption")
        pairs.append(_Pair(path.stem, lines[0].strip()))
    return _source(root, Path(images or root / "image"), pairs, missing)


def _dci(root: Path, split: str, missing: str, images: str | None) -> Source:
    splits = _json(root / "splits.json")
    lists = list(splits.values()) if split == _ALL else [splits.get(split)]
    names: list[str] = []
    for one in lists:
        if not isinstance(one, list):
            raise DataError(
                f"{root / 'splits.json'} lists {', '.join(splits)}, no {split!r}; pass split=… of "
                f"these, or {_ALL}"
            )
        names += map(str, one)

    folder = root / "complete"
    folder = folder if folder.is_dir() else root / "annotations"
    # Only names: what a stranger lists must not lead out of the folder.
    pairs = [_described(folder / Path(name).name) for name in names]
    return _source(root, Path(images or root / "photos"), pairs, missing)


def _described(path: Path) -> _Pair:
    """The image and the caption of one of DCI's annotations."""
    annotation = _json(path)
    texts = [annotation.get(name) for name in ("short_caption", "extra_caption")]
    image = annotation.get("image")
    if not isinstance(image, str) or not isinstance(texts[0], str):
        raise DataError(
            f"{path} has no image or no short_caption; it holds {', '.join(annotation)}"
        )
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    return _Pair(image, "\n".join(captions))


def _source(root: Path, images: Path, pairs: list[_Pair], missing: str) -> Source:
    """The pairs whose images are there; a DataError where some are not, unless they may be
    missing.
    """
    collection = Collection(images)
    pictured = [(pair, collection.find(pair.image)) for pair in pairs]
    absent = [pair.image for pair, picture in pictured if picture is None]
    refuse_missing(absent, len(pairs), collection, missing)

    records = [
        Record(picture, (pair.caption,)) for pair, picture in pictured if picture is not None
    ]
    return Source(str(root), records, skipped=absent)


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {str(error)[:80]}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, expected a mapping")
    return value


def _text(path: Path) -> str:
    """A text file, of a size that a caption or an annotation may have."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    # An annotation of DCI holds masks as text, some megabytes of them.
    if len(data) > 64 * MAX_TEXT_BYTES:
        raise DataError(f"{path} has {len(data):,} bytes, too many for a caption")
    return data.decode("utf-8-sig", "replace")
