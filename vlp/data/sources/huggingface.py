"""A Hugging Face data set: `{name: huggingface, path: user/photos, split: train}`, or `path:` a
local folder.

Read through `datasets` (the extra `vlp[datasets]`), which downloads it once and maps it into
memory: any order costs the same, and resuming is exact. The folder is one that `save_to_disk` wrote
or that `load_dataset` understands (parquet, images with a metadata file, …). Images are taken as
they are stored; `datasets` decodes nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlp.config import Captions
from vlp.data import wrong_captions
from vlp.data.archives import Place, image_type
from vlp.data.rows import LABELS, labels_of
from vlp.data.sources import Source, captions_of
from vlp.data.tables.columns import (
    CLASS_COLUMNS,
    DIALOGUE_COLUMNS,
    IMAGE_COLUMNS,
    column,
    listed,
    split_column,
    usual,
    usual_captions,
)
from vlp.data.tables.values import NoText, asked, counted, equals, jsonable, shown, texts
from vlp.schema import did_you_mean
from vlp.types import Sample

if TYPE_CHECKING:
    import datasets

# Columns that mean what they mean in a shard's JSON.
_FIELDS = (
    "negatives",
    "negatives_of",
    "negatives_valid",
    "counterfactuals",
    "counterfactuals_of",
    *LABELS,
)


@dataclass(frozen=True)
class Options:
    """Which data set, and which of its columns matter."""

    path: str  # user/name on the Hub, or a folder
    split: str = "train"  # also slices, as `datasets` reads them: train[:10%]
    config: str = ""  # the data set's configuration (subset), where it has several
    revision: str = ""  # branch, tag or commit on the Hub
    image_column: str = ""  # empty: the only column of images
    caption_columns: list[str] = field(
        default_factory=list
    )  # empty: captions, caption, text, title, …, caption1, …
    class_column: str = ""  # empty: class or class_name, or the only column of class labels
    where: dict[str, Any] = field(
        default_factory=dict
    )  # only rows whose column has this value, or one of these


def open(options: Options, captions: Captions) -> HubSet:
    """Load the data set and look at its texts; raises ValueError or OSError."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "the source huggingface needs the package datasets: pip install 'vlp[datasets]'"
        ) from None
    table = _load(datasets, options)
    image = _image_column(datasets, table, options)
    table = table.cast_column(image, datasets.Image(decode=False))
    table, notes = _chosen_rows(table, options)
    texts_in, label = _caption_columns(table, options), _class_column(datasets, table, options)
    if not texts_in and not label:
        raise ValueError(
            f"{options.path}: no column is known to hold captions or classes; it has {listed(table.column_names)}. "
            "Name it with caption_columns or class_column"
        )
    return HubSet(table, image, texts_in, label, captions, options.path, notes)


def _load(datasets: Any, options: Options) -> datasets.Dataset:
    saved = Path(options.path).expanduser()
    single, several = ((saved / name).exists() for name in ("state.json", "dataset_dict.json"))
    if single or several:
        _refuse_choices(
            options, ("split", "config", "revision") if single else ("config", "revision")
        )
    if single:
        return datasets.load_from_disk(saved)
    if several:
        splits = datasets.load_from_disk(saved)
        if options.split not in splits:
            raise ValueError(
                f"{saved} has no split {options.split!r}{did_you_mean(options.split, splits)}"
            )
        return splits[options.split]
    where = str(saved) if saved.is_dir() else options.path
    return datasets.load_dataset(
        where, options.config or None, split=options.split, revision=options.revision or None
    )


def _refuse_choices(options: Options, names: tuple[str, ...]) -> None:
    """A folder of `save_to_disk` holds what was chosen when it was written."""
    default = Options(options.path)
    asked = [
        f"{name}: {getattr(options, name)}"
        for name in names
        if getattr(options, name) != getattr(default, name)
    ]
    if asked:
        raise ValueError(
            f"{options.path} was written by save_to_disk, so there is nothing to choose with {', '.join(asked)}; "
            "leave it out, or name the data set that the folder was made from"
        )


def _image_column(datasets: Any, table: datasets.Dataset, options: Options) -> str:
    kinds = {
        name: kind for name, kind in table.features.items() if isinstance(kind, datasets.Image)
    }
    if options.image_column:
        return _known(options.image_column, table, options)
    if not kinds:  # pictures as plain bytes, as pandas and pyarrow write them
        raw = [name for name, kind in table.features.items() if _holds_bytes(datasets, kind)]
        by_name = usual(raw, IMAGE_COLUMNS)
        kinds = dict.fromkeys([by_name] if by_name else raw)
    if len(kinds) != 1:
        there = f"no image column, only {listed(table.column_names)}"
        if kinds:
            there = f"image columns {listed(sorted(kinds))}"
        raise ValueError(f"{options.path} has {there}; name the one to use with image_column")
    return next(iter(kinds))


def _holds_bytes(datasets: Any, kind: Any) -> bool:
    """Whether a column holds bytes, or mappings of bytes and a path, not declared as images."""
    if isinstance(kind, dict):
        return set(kind) == {"bytes", "path"}
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")


def _caption_columns(table: datasets.Dataset, options: Options) -> list[str]:
    named = [_known(name, table, options) for name in options.caption_columns]
    texts = [
        name for name in table.column_names if name.lower() not in DIALOGUE_COLUMNS
    ]  # only where they are named
    return named or usual_captions(texts)


def _class_column(datasets: Any, table: datasets.Dataset, options: Options) -> str:
    if options.class_column:
        return _known(options.class_column, table, options)
    labels = [
        name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)
    ]
    return usual(table.column_names, CLASS_COLUMNS) or (labels[0] if len(labels) == 1 else "")


def _known(name: str, table: datasets.Dataset, options: Options) -> str:
    return column(table.column_names, name, options.path)


def _chosen_rows(table: datasets.Dataset, options: Options) -> tuple[datasets.Dataset, list[str]]:
    """The rows that fulfil `where`, and what is to be noted; raises ValueError with the values that
    are there.
    """
    wanted = {_known(name, table, options): value for name, value in options.where.items()}
    split = split_column(table.column_names)
    names = [*wanted, *([split] if split and split not in wanted else [])]
    cells = {name: _readable(table, name) for name in names}
    notes = []
    if split and split not in wanted and len(set(cells[split])) > 1:
        notes.append(
            f"{options.path}: rows of all splits are taken together ({counted(cells[split])}); where chooses some"
        )
    if not wanted:
        return table, notes

    rows = [
        i
        for i in range(len(table))
        if all(equals(cells[name][i], value) for name, value in wanted.items())
    ]
    if not rows:
        said = " and ".join(f"{name} = {asked(value)}" for name, value in wanted.items())
        there = "; ".join(f"{name} holds {counted(cells[name])}" for name in wanted)
        raise ValueError(f"{options.path} has no row with {said}; {there}")
    return table.select(rows), notes


def _readable(table: datasets.Dataset, name: str) -> list[str]:
    """A column as a person writes its values: class labels by their names."""
    classes = getattr(table.features[name], "names", None)
    cells = table.select_columns([name])[name]
    return [classes[cell] if classes and cell is not None else shown(cell) for cell in cells]


class HubSet(Source):
    """Random access to the rows of a `datasets.Dataset` that have a text; a row's number is its
    key.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        image: str,
        texts: list[str],
        label: str,
        captions: Captions,
        name: str,
        notes: list[str],
    ) -> None:
        self.image, self.texts, self.label, self.captions, self.name = (
            image,
            texts,
            label,
            captions,
            name,
        )
        self._notes = notes
        self._fields = [field for field in _FIELDS if field in table.column_names]
        self._odd: list[str] = []  # problems that cost no row
        self._table = table.select_columns(
            list(dict.fromkeys([image, *texts, *filter(None, [label]), *self._fields]))
        )
        self._classes = getattr(
            table.features.get(label), "names", None
        )  # of a column of class labels: numbers
        counts, digest = [], hashlib.sha256()
        self.labels = frozenset(LABELS)
        for row in self._table.remove_columns(image):
            found, meta = self._text(row)
            counts.append(len(found))
            digest.update(json.dumps([found, meta]).encode())
            self.note_wrong_captions(meta, found)
            self._odd += [
                f"{name}: row {len(counts) - 1}: {problem}"
                for problem in wrong_captions.problems(meta, found)
            ]
            self.labels &= labels_of(meta)
        self._digest = digest.hexdigest()
        rows = np.flatnonzero(counts)
        self.n_left_out = len(counts) - len(rows)
        if self.n_left_out and (captions.missing == "error" or not len(rows)):
            raise ValueError(
                f"{self.n_left_out} of the {len(counts)} rows of {name} have no caption in {texts or 'any usual column'}; "
                "set caption_columns, captions.class_templates, or captions.missing=drop to leave them out"
            )
        if not len(rows):
            raise ValueError(f"{name} holds no rows")
        self._rows = torch.from_numpy(rows).share_memory_()
        self._counts = torch.tensor(counts)[self._rows].share_memory_()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Sample:
        number = int(self._rows[i])
        row = self._table[number]
        image = row.pop(self.image) or {"bytes": None, "path": None}
        data = image["bytes"]
        if data is None and image["path"]:
            data = Place(image["path"]).read()
        if not data:
            raise ValueError(f"row {number} of {self.name} has no image")
        captions, meta = self._text(row)
        return Sample(
            i, f"{number:09d}", data, image_type(image["path"] or "") or _type(data), captions, meta
        )

    def _text(self, row: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
        """A row's captions, and what a shard's JSON would hold besides."""
        meta = {name: jsonable(row[name]) for name in self._fields if row[name] is not None}
        if self.label and row[self.label] is not None:
            value = row[self.label]
            meta["class"] = self._classes[value].replace("_", " ") if self._classes else str(value)
        found = []
        for name in self.texts:
            try:
                found += texts(row[name])
            except NoText as error:
                raise ValueError(f"{self.name}: {name}: {error}") from None
        return captions_of(tuple(found), meta, self.captions), meta

    def fingerprint(self) -> str:
        return self._digest

    def problems(self) -> list[str]:
        silent = [f"{self.name}: {self.n_left_out} rows without text"] if self.n_left_out else []
        return silent + self._odd + self._notes

    def n_captions(self) -> np.ndarray:
        return self._counts.numpy()


def _type(data: bytes) -> str:
    """The usual extension of an image without a name, by its first bytes."""
    return {b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp"}.get(data[:2], "jpg")
