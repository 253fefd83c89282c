"""JSON files of captions, whatever their form, as rows: what is published for COCO, Flickr, LLaVA
and BLIP is read as it is.

[{"image": …, "caption": …}, …], or a line each        rows, as BLIP, ALBEF and LLaVA have them
{"images": [{"id", "file_name"}], "annotations": […]}  COCO's captions_*.json
{"images": [{"filename", "sentences": […]}]}           Karpathy's dataset_*.json, with its splits
{"a.jpg": "…"}, {"a.jpg": ["…", "…"]}, {"a.jpg": {…}}  a mapping of images
{"image": […], "caption": […]}                         columns
{"data": […]}                                          rows under a name
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from vlp.data.tables.columns import CAPTION_COLUMNS, IMAGE_COLUMNS
from vlp.data.tables.values import jsonable
from vlp.pretrained.folders import RepeatedKeyError, unrepeated

Rows = list[tuple[int, dict[str, Any]]]

# What tells COCO's other annotations, which are easily taken for the captions.
_OTHER_FORMS = {"keypoints": "keypoints", "segments_info": "panoptic", "bbox": "instances"}


class Parsed(NamedTuple):
    """The rows of a JSON file."""

    rows: Rows
    by_line: bool  # whether their numbers are lines
    problems: list[str]  # a line for each entry that belongs to no row


def parse_json(text: str, path: Path, by_line: bool) -> Parsed:
    """The rows of a JSON file; raises ValueError.

    `by_line` is what the file's name promises. Either form is read under either name: some tools
    write JSON lines into .json, and some one list into .jsonl.
    """
    if by_line:
        try:
            return Parsed(_lines(text, path), True, [])
        except ValueError:
            if not text.lstrip().startswith("["):
                raise
            return rows_of(whole(text, path), path)

    try:
        value = _loads(text)
    except (ValueError, RecursionError):
        first_line = text.strip().partition("\n")[0]
        if _is_mapping(first_line):
            return Parsed(_lines(text, path), True, [])
        value = whole(text, path)  # raises with line and column
    return rows_of(value, path)


def whole(text: str, path: Path) -> Any:
    """The value of a JSON file; raises ValueError with line and column of the mistake."""
    try:
        return _loads(text)
    except RepeatedKeyError as error:
        raise ValueError(
            f"{path}: {error}, and one of its values would be lost; write them as a list"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def _loads(text: str) -> Any:
    """JSON as writers of captions have it, with line breaks in texts, but no key twice."""
    return json.loads(text, strict=False, object_pairs_hook=unrepeated)


def _is_mapping(line: str) -> bool:
    try:
        return isinstance(_loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(text: str, path: Path) -> Rows:
    """JSON lines. Only \\n ends a line: U+2028, U+0085 and form feeds may stand in a text."""
    rows: Rows = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line.strip():
            continue
        shown = repr(line.strip()[:60])
        try:
            value = _loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise ValueError(
                f"{path}:{number}: found {shown}, which is not valid JSON ({reason}), "
                "expected a mapping of columns to values"
            ) from None

        # [image, caption], as some write their lines.
        if _is_pair_of_texts(value):
            value = {"image": value[0], "caption": value[1]}
        if not isinstance(value, dict):
            raise ValueError(
                f"{path}:{number}: found {shown}, expected a mapping of columns to values"
            )
        rows.append((number, jsonable(value)))
    return rows


def _is_pair_of_texts(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(isinstance(part, str) for part in value)


def rows_of(value: Any, path: Path) -> Parsed:
    """The rows that a JSON value of any known form holds; raises ValueError that names the form it
    found.
    """
    if isinstance(value, list):
        return _numbered(_listed(value, path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found {type(value).__name__}, expected rows of captions")

    # The published forms, told by their list of images.
    images = value.get("images")
    if _are_rows(images):
        if any("sentences" in row for row in images):
            return _numbered(_karpathy(images))
        have_captions = any(_names(row, CAPTION_COLUMNS) for row in images)
        if have_captions and "annotations" not in value:
            return _numbered(images)
        return _numbered(*_coco(images, value, path))

    # A table by its columns, or one row of it.
    entries = list(value.values())
    if _names(value, IMAGE_COLUMNS):
        if all(isinstance(column, list) for column in entries):
            return _numbered(_columns(value, path))
        # Pandas' form, by row number.
        if all(isinstance(column, dict) for column in entries):
            columns = {name: list(column.values()) for name, column in value.items()}
            return _numbered(_columns(columns, path))
        return _numbered([value])

    # Rows under a name; a mapping of images to their captions, or to their other columns.
    tables = [rows for rows in entries if _are_rows(rows)]
    if len(tables) == 1:
        return _numbered(tables[0])
    if entries and all(isinstance(entry, (str, list)) for entry in entries):
        return _numbered([{"image": name, "captions": entry} for name, entry in value.items()])
    if entries and all(isinstance(entry, dict) for entry in entries):
        return _numbered([{"image": name, **entry} for name, entry in value.items()])

    held = ", ".join(list(map(str, value))[:8]) or "nothing"
    raise ValueError(
        f"{path} is no known caption file: it holds {held}; expected rows of {{image, caption}}, "
        "COCO's (images, annotations), Karpathy's (images[].sentences) or a mapping "
        "{image: captions}"
    )


def _numbered(rows: list[dict[str, Any]], problems: Sequence[str] = ()) -> Parsed:
    numbered: Rows = []
    for number, row in enumerate(rows, 1):
        numbered.append((number, jsonable(row)))
    return Parsed(numbered, by_line=False, problems=list(problems))


def _are_rows(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _names(value: dict[str, Any], usual: tuple[str, ...]) -> bool:
    """Whether one of the keys is a usual name of such a column."""
    return any(str(key).lower() in usual for key in value)


def _listed(value: list[Any], path: Path) -> list[dict[str, Any]]:
    """The rows of a list: mappings, or pairs of an image and its caption."""
    if all(isinstance(row, dict) for row in value):
        return value
    if all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in value):
        return [{"image": image, "caption": caption} for image, caption in value]

    odd = next(row for row in value if not isinstance(row, dict))
    raise ValueError(
        f"{path}: found {str(odd)[:60]!r} among the rows, expected mappings of columns to values"
    )


def _columns(columns: dict[str, list[Any]], path: Path) -> list[dict[str, Any]]:
    # Cut to the shortest, they would give a picture another one's caption.
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{path}: its columns differ in length: {sizes}")

    rows = []
    for values in zip(*columns.values()):
        rows.append(dict(zip(columns, values)))
    return rows


def _karpathy(images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Karpathy and Fei-Fei's splits: each image with its sentences, as they were written."""
    read_here = ("filepath", "filename", "sentences", "sentids")
    rows = []
    for image in images:
        rest = {name: value for name, value in image.items() if name not in read_here}
        # COCO's pictures lie in folders, which only this file names.
        folder, name = image.get("filepath"), image.get("filename")
        place = f"{folder}/{name}" if folder and name else name
        rows.append({"image": place, "captions": image.get("sentences"), **rest})
    return rows


def _coco(
    images: list[dict[str, Any]], content: dict[str, Any], path: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """COCO's form: images by id, captions in annotations that name one; a line for each annotation
    that names none.
    """
    annotations: Any = content.get("annotations")
    _refuse_without_captions(images, annotations, path)

    # By text: some writers give numbers here and texts there.
    captions: dict[str, list[Any]] = {}
    for i, image in enumerate(images):
        if "id" not in image or "file_name" not in image:
            raise ValueError(
                f"{path}: images[{i}] lacks id or file_name (it has {', '.join(image)})"
            )
        captions[str(image["id"])] = []

    # Counted, not refused: a list cut down to some images keeps all annotations.
    problems = []

    for i, annotation in enumerate(annotations):
        image_id = str(annotation.get("image_id"))
        if image_id not in captions:
            problems.append(
                f"{path}: annotations[{i}] names image {image_id}, which the file's images do not "
                "list; add it to them, or remove the annotation"
            )
        elif annotation.get("caption") is not None:
            captions[image_id].append(annotation["caption"])

    rows = []
    for image in images:
        rest = {name: value for name, value in image.items() if name != "file_name"}
        rows.append({"image": image["file_name"], "captions": captions[str(image["id"])], **rest})
    return rows, problems


def _refuse_without_captions(images: list[dict[str, Any]], annotations: Any, path: Path) -> None:
    """Raise ValueError for COCO's files of other annotations, with the name of the right one."""
    if not _are_rows(annotations):
        raise ValueError(
            f"{path} is COCO's form without annotations (image_info_*.json?): it lists "
            f"{len(images)} images and no captions; give captions_*.json"
        )
    if any("caption" in annotation for annotation in annotations):
        return

    forms = [form for key, form in _OTHER_FORMS.items() if key in annotations[0]]
    form = forms[0] if forms else "annotations"
    raise ValueError(
        f"{path} is COCO's {form} form ({', '.join(list(annotations[0])[:6])}) and holds no "
        "captions; give captions_*.json of the same images"
    )
