"""Published sets of Chinese captions, told by the layout of their folders.

Chinese-CLIP   SPLIT_texts.jsonl (`text_id, text, image_ids`) and SPLIT_imgs.tsv (number, tab, the
               image in base64); with images= their files by number. So are its releases of
               Flickr30k-CN and COCO-CN (OFA-Sys/Chinese-CLIP@31863c7, README_En.md)
COCO-CN        imageid.human-written-caption.txt (IMAGE#n, tab, caption) and coco-cn_SPLIT.txt, as
               coco-cn-version1805v1.1 unpacks; another of its caption files as data= takes the
               place of the first
Flickr30k-CN   flickr30kzhmbosontest/ and its like: TextData/seg.NAME.caption.txt, IMAGE#zhm#n and
               the caption in words with their parts of speech, which are put together again

A caption belongs to one image. One file a set, as clip_benchmark (flickr30k_test_zh.txt) and
Flickr30k-CNA have it, is a table that `tables` reads.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vlp.eval.datasets import tables
from vlp.eval.datasets.source import Record, Source
from vlp.eval.pictures import Collection, DataError, Picture, refuse_missing

_COCO_CN = "imageid.human-written-caption.txt"
_COCO_CN_FILE = re.compile(r"imageid\.[\w-]+-caption\.txt")
_PART_OF_SPEECH = re.compile(r":[A-Za-z]+$")
_SAME = {"val": "valid", "valid": "val"}  # one split, two names

Pairs = list[tuple[str, str]]  # an image's name and a caption
Reader = Callable[[str, str, "str | None"], Source]  # of split, missing and images


def reader_of(root: Path) -> Reader | None:
    """What reads the set in a folder, or COCO-CN's file; None for other layouts."""
    if root.is_file():
        if not _COCO_CN_FILE.fullmatch(root.name):
            return None
        return lambda split, missing, images: _coco_cn(root, split, missing, images)

    inner = next(iter(sorted(root.glob(f"coco-cn*/{_COCO_CN}"))), root / _COCO_CN)
    coco_cn = root / _COCO_CN if (root / _COCO_CN).is_file() else inner
    if coco_cn.is_file():
        return lambda split, missing, images: _coco_cn(coco_cn, split, missing, images)
    if any(root.glob("*_texts.jsonl")):
        return lambda split, missing, images: _chinese_clip(root, split, missing, images)
    if _segmented(root):
        return lambda split, missing, images: _flickr_cn(root, split, missing, images)
    return None


# --- Chinese-CLIP ---------------------------------------------------------------------------------


def _chinese_clip(root: Path, split: str, missing: str, images: str | None) -> Source:
    names = (split, _SAME.get(split, split))
    path = next((p for p in (root / f"{name}_texts.jsonl" for name in names) if p.is_file()), None)
    if path is None:
        splits = sorted(p.name.removesuffix("_texts.jsonl") for p in root.glob("*_texts.jsonl"))
        raise DataError(f"{root} has no split {split!r}, only {', '.join(splits)}; pass split=…")

    pairs = _texts(path)
    packed = path.with_name(path.name.replace("_texts.jsonl", "_imgs.tsv"))
    if images is not None or not packed.is_file():
        return _named(root, pairs, images or str(root), missing)

    # Images without a caption are candidates too, and a task that needs one for each says so.
    captions: dict[str, list[str]] = {}
    for image, text in pairs:
        captions.setdefault(image, []).append(text)
    records: list[Record] = []
    for number, picture in _packed(packed).items():
        records.append(Record(picture, tuple(captions.pop(number, ()))))
    if captions and missing != "skip":
        raise DataError(
            f"{path} names {len(captions)} images that are not in {packed}, e.g. "
            f"{next(iter(captions))}; fetch the whole set, or pass missing=skip (the score is then "
            "not comparable)"
        )
    return Source(str(root), records, skipped=list(captions))


def _texts(path: Path) -> Pairs:
    """The captions of a file of texts, each with its image."""
    rows = tables.read_rows(path, ("text",))
    tables.need_keys(rows, ("text_id", "text", "image_ids"), path)
    pairs: Pairs = []
    for row in rows:
        numbers = row["image_ids"]
        if not isinstance(numbers, list) or len(numbers) != 1:
            raise DataError(
                f"{path}: text {row['text_id']} belongs to the images {numbers}; expected one. "
                "Texts of several images, or of unknown ones (MUGE), are not scored here"
            )
        if not isinstance(row["text"], str):
            raise DataError(
                f"{path}: text {row['text_id']} is {row['text']!r}, expected a caption; mend it, "
                "or take the line out"
            )
        pairs.append((str(numbers[0]), row["text"]))
    return pairs


def _packed(path: Path) -> dict[str, Picture]:
    """{number: its image} of a file of images in base64."""
    pictures: dict[str, Picture] = {}
    with open(path, encoding="ascii", errors="replace") as file:
        for place, line in enumerate(file, 1):
            number, tab, text = line.rstrip("\n").partition("\t")
            try:
                # Both alphabets occur; what belongs to neither is no image.
                data = base64.b64decode(text.translate(_STANDARD), validate=True)
            except binascii.Error:
                data = b""
            if not tab or not data:
                raise DataError(
                    f"{path}, line {place}: found {line[:40]!r}, expected a number, a tab and an "
                    "image in base64"
                )
            pictures[number] = Picture(f"{path}:{number}", data=data)
    return pictures


_STANDARD = str.maketrans("-_", "+/")


# --- COCO-CN --------------------------------------------------------------------------------------


def _coco_cn(path: Path, split: str, missing: str, images: str | None) -> Source:
    listed = path.with_name(f"coco-cn_{split}.txt")
    if not listed.is_file():
        splits = sorted(p.stem.removeprefix("coco-cn_") for p in path.parent.glob("coco-cn_*.txt"))
        raise DataError(
            f"{path.parent} has no {listed.name}, which lists the images of the split; it has "
            f"{', '.join(splits) or 'none'}; pass split=… of these"
        )

    # The captions of all splits are in one file.
    wanted = set(_lines(listed))
    pairs: Pairs = []
    for place, line in enumerate(_lines(path), 1):
        name, tab, caption = line.partition("\t")
        image, mark, _ = name.rpartition("#")
        if not tab or not mark:
            raise DataError(
                f"{path}, line {place}: found {line[:60]!r}, expected IMAGE#n, a tab and a caption"
            )
        if image in wanted:
            pairs.append((image, caption.strip()))

    silent = wanted - {image for image, _ in pairs}
    if silent and missing != "skip":
        raise DataError(
            f"{path} has no caption for {len(silent)} of the {len(wanted)} images of "
            f"{listed.name}, e.g. {min(silent)}"
        )
    source = _named(path.parent, pairs, images or str(path.parent), missing)
    return replace(source, skipped=[*source.skipped, *sorted(silent)])


# --- Flickr30k-CN ---------------------------------------------------------------------------------


def _segmented(root: Path) -> list[Path]:
    """The files of captions in words, of a folder of one split or one above several."""
    own = sorted(root.glob("TextData/seg.*.caption.txt"))
    return own or sorted(root.glob("flickr*/TextData/seg.*.caption.txt"))


def _flickr_cn(root: Path, split: str, missing: str, images: str | None) -> Source:
    files = _segmented(root)
    of_split = [path for path in files if path.name.endswith(f"{split}.caption.txt")]
    if len(of_split) != 1:
        places = ", ".join(str(path.parent.parent) for path in of_split or files)
        kind = "several of that split" if of_split else "none of that split"
        raise DataError(
            f"{root}: split {split!r} asks for one set of captions, found {kind}: {places}; pass "
            "split=…, or give one of these folders"
        )

    pairs: Pairs = []
    for place, line in enumerate(_lines(of_split[0]), 1):
        name, blank, words = line.partition(" ")
        image, mark, _ = name.partition("#")
        if not blank or not mark:
            raise DataError(
                f"{of_split[0]}, line {place}: found {line[:60]!r}, expected IMAGE#zhm#n and words"
            )
        pairs.append((image, _joined(words)))
    return _named(root, pairs, images or str(root), missing)


def _joined(words: str) -> str:
    """A caption from its words: parts of speech go, and two blanks were a comma."""
    clauses = []
    for clause in re.split(r"\s{2,}", words.strip()):
        clauses.append("".join(_PART_OF_SPEECH.sub("", word) for word in clause.split()))
    return "，".join(clauses)


# --- shared ---------------------------------------------------------------------------------------


def _named(root: Path, pairs: Pairs, images: str, missing: str) -> Source:
    """The captions with the images that they name, an image a record."""
    captions: dict[str, list[str]] = {}
    for image, caption in pairs:
        captions.setdefault(image, []).append(caption)

    collection = Collection(images)
    pictures = {image: collection.find(image) for image in captions}
    absent = [image for image, picture in pictures.items() if picture is None]
    refuse_missing(absent, len(pictures), collection, missing)
    records: list[Record] = []
    for image, picture in pictures.items():
        if picture is not None:
            records.append(Record(picture, tuple(captions[image])))
    return Source(str(root), records, skipped=absent)


def _lines(path: Path) -> list[str]:
    """The lines that are not blank."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8: {str(error)[:80]}") from None
    return [line.strip() for line in text.split("\n") if line.strip()]
