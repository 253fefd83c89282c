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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vlp.config import Captions
from vlp.data import wrong_captions
from vlp.data.archives import Place, image_type
from vlp.data.rows import LABELS, labels_of
from vlp.data.sources import Source, captions_of, check_roles
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
from vlp.pretrained import places
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

    path: str  # a folder, or user/name (hf-hub:user/name) on the Hub
    split: str = "train"  # also slices, as `datasets` reads them: train[:10%]
    config: str = ""  # the data set's configuration (subset), where it has several
    revision: str = ""  # branch, tag or commit on the Hub
    image_column: str = ""  # empty: the only column of images
    # Empty: captions, caption, text, title, …, caption1, …
    caption_columns: list[str] = field(default_factory=list)
    # Empty: class or class_name, or the only column of class labels.
    class_column: str = ""
    # Only rows whose column has this value, or one of these.
    where: dict[str, Any] = field(default_factory=dict)


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
    # Undecoded: `datasets` would decode each picture of a row that is only looked at.
    table = table.cast_column(image, datasets.Image(decode=False))
    table, notes = _chosen_rows(table, options)

    caption_columns = _caption_columns(table, options)
    label = _class_column(datasets, table, options)
    if not caption_columns and not label:
        raise ValueError(
            f"{options.path}: no column is known to hold captions or classes; "
            f"it has {listed(table.column_names)}. Name it with caption_columns or class_column"
        )
    check_roles(caption_columns, captions, options.path)
    columns = _Columns(image, caption_columns, label)
    return HubSet(table, columns, captions, options.path, notes)


def _load(datasets: Any, options: Options) -> datasets.Dataset:
    # No Hub is asked about a mistyped path.
    try:
        path = places.locate(options.path, "a folder of save_to_disk or load_dataset", "dataset")
    except ValueError as error:
        raise ValueError(f"the source huggingface: path: {error}") from None
    folder = Path(path)

    # What `save_to_disk` wrote: one data set, or one a split.
    if (folder / "state.json").exists():
        _refuse_choices(options, ("split", "config", "revision"))
        return datasets.load_from_disk(folder)
    if (folder / "dataset_dict.json").exists():
        _refuse_choices(options, ("config", "revision"))
        splits = datasets.load_from_disk(folder)
        if options.split not in splits:
            raise ValueError(
                f"{folder} has no split {options.split!r}{did_you_mean(options.split, splits)}"
            )
        return splits[options.split]

    # A folder that load_dataset understands, or a name on the Hub.
    return datasets.load_dataset(
        path, options.config or None, split=options.split, revision=options.revision or None
    )


def _refuse_choices(options: Options, names: tuple[str, ...]) -> None:
    """A folder of `save_to_disk` holds what was chosen when it was written."""
    default = Options(options.path)
    choices = [
        f"{name}: {getattr(options, name)}"
        for name in names
        if getattr(options, name) != getattr(default, name)
    ]

    if choices:
        raise ValueError(
            f"{options.path} was written by save_to_disk, so there is nothing to choose with "
            f"{', '.join(choices)}; leave it out, or name the data set that the folder was made "
            "from"
        )


def _image_column(datasets: Any, table: datasets.Dataset, options: Options) -> str:
    if options.image_column:
        return _known(options.image_column, table, options)

    features = table.features.items()
    columns = [name for name, kind in features if isinstance(kind, datasets.Image)]
    if not columns:  # pictures as plain bytes, as pandas and pyarrow write them
        columns = [name for name, kind in features if _holds_bytes(datasets, kind)]
        by_name = usual(columns, IMAGE_COLUMNS)
        if by_name:
            columns = [by_name]

    if len(columns) != 1:
        there = f"no image column, only {listed(table.column_names)}"
        if columns:
            there = f"image columns {listed(sorted(columns))}"
        raise ValueError(f"{options.path} has {there}; name the one to use with image_column")
    return columns[0]


def _holds_bytes(datasets: Any, kind: Any) -> bool:
    """Whether a column holds bytes, or mappings of bytes and a path, not declared as images."""
    if isinstance(kind, dict):
        return set(kind) == {"bytes", "path"}
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")


def _caption_columns(table: datasets.Dataset, options: Options) -> list[str]:
    if options.caption_columns:
        return [_known(name, table, options) for name in options.caption_columns]
    # Dialogues only where they are named: an answer need not describe the picture.
    columns = [name for name in table.column_names if name.lower() not in DIALOGUE_COLUMNS]
    return usual_captions(columns)


def _class_column(datasets: Any, table: datasets.Dataset, options: Options) -> str:
    if options.class_column:
        return _known(options.class_column, table, options)
    labels = [
        name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)
    ]

    # Of several columns of class labels none is the better guess.
    only_label = labels[0] if len(labels) == 1 else ""
    return usual(table.column_names, CLASS_COLUMNS) or only_label


def _known(name: str, table: datasets.Dataset, options: Options) -> str:
    return column(table.column_names, name, options.path)


def _chosen_rows(table: datasets.Dataset, options: Options) -> tuple[datasets.Dataset, list[str]]:
    """The rows that fulfil `where`, and what is to be noted; raises ValueError with the values that
    are there.
    """
    wanted = {_known(name, table, options): value for name, value in options.where.items()}
    cells = {name: _readable(table, name) for name in wanted}
    notes = []
    split = split_column(table.column_names)
    if split and split not in wanted:
        splits = _readable(table, split)
        if len(set(splits)) > 1:
            notes.append(
                f"{options.path}: rows of all splits are taken together ({counted(splits)}); "
                "where chooses some"
            )
    if not wanted:
        return table, notes

    rows = list(range(len(table)))
    for name, value in wanted.items():
        rows = [i for i in rows if equals(cells[name][i], value)]
    if not rows:
        conditions = " and ".join(f"{name} = {asked(value)}" for name, value in wanted.items())
        there = "; ".join(f"{name} holds {counted(cells[name])}" for name in wanted)
        raise ValueError(f"{options.path} has no row with {conditions}; {there}")
    return table.select(rows), notes


def _readable(table: datasets.Dataset, name: str) -> list[str]:
    """A column as a person writes its values: class labels by their names."""
    classes = getattr(table.features[name], "names", None)
    # Selected first: a row of the whole table would be read with its picture.
    cells = table.select_columns([name])[name]
    readable = []
    for cell in cells:
        if classes and cell is not None:
            readable.append(classes[cell])
        else:
            readable.append(shown(cell))
    return readable


class _Columns(NamedTuple):
    """The columns that count; `captions` and `label` may be empty, not both."""

    image: str
    captions: list[str]
    label: str


class HubSet(Source):
    """Random access to the rows of a `datasets.Dataset` that have a text; a row's number is its
    key.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        columns: _Columns,
        captions: Captions,
        name: str,
        notes: list[str],
    ) -> None:
        self.columns = columns
        self.captions = captions
        self.name = name
        self._notes = notes
        self._fields = [field for field in _FIELDS if field in table.column_names]

        # Only these: reading a row must not read the rest of the table.
        named = [columns.image, *columns.captions, columns.label, *self._fields]
        self._table = table.select_columns(list(dict.fromkeys(filter(None, named))))
        # Of a column of class labels, which holds their numbers.
        self._classes = getattr(table.features.get(columns.label), "names", None)

        counts = self._look_at_texts()
        rows = np.flatnonzero(counts)
        self.n_left_out = len(counts) - len(rows)
        if self.n_left_out and (captions.missing == "error" or not len(rows)):
            raise ValueError(
                f"{self.n_left_out} of the {len(counts)} rows of {name} have no caption in "
                f"{columns.captions or 'any usual column'}; set caption_columns, "
                "captions.class_templates, or captions.missing=drop to leave them out"
            )
        if not len(rows):
            raise ValueError(f"{name} holds no rows")

        # In shared memory: loader processes receive a handle instead of a copy.
        self._rows = torch.from_numpy(rows).share_memory_()
        self._counts = torch.tensor(counts)[self._rows].share_memory_()

    def _look_at_texts(self) -> list[int]:
        """How many captions each row of the table has; notes labels, wrong captions and digest."""
        counts: list[int] = []
        digest = hashlib.sha256()
        self._odd: list[str] = []  # problems that cost no row
        self.labels = frozenset(LABELS)

        # Without the pictures, which would be read from disk one by one.
        for number, row in enumerate(self._table.remove_columns(self.columns.image)):
            captions, meta = self._text(row)
            counts.append(len(captions))
            digest.update(json.dumps([captions, meta]).encode())
            self.labels &= labels_of(meta)
            self.note_wrong_captions(meta, captions)
            for problem in wrong_captions.problems(meta, captions):
                self._odd.append(f"{self.name}: row {number}: {problem}")

        self._digest = digest.hexdigest()
        return counts

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Sample:
        number = int(self._rows[i])
        row = self._table[number]

        # A picture is bytes, or only the path of a file that was never read in.
        stored = row.pop(self.columns.image) or {"bytes": None, "path": None}
        image = stored["bytes"]
        if image is None and stored["path"]:
            image = Place(stored["path"]).read()
        if not image:
            raise ValueError(f"row {number} of {self.name} has no image")

        kind = image_type(stored["path"] or "") or _type(image)
        captions, meta = self._text(row)
        return Sample(i, f"{number:09d}", image, kind, captions, meta, roles=self._roles(row))

    def _roles(self, row: dict[str, Any]) -> tuple[str, ...]:
        """The role of each caption, by its column; empty where one column holds all."""
        names = self.columns.captions
        if not self.captions.roles or len(names) < 2:
            return ()
        roles: list[str] = []
        for role, name in zip(self.captions.roles, names):
            roles += [role] * len(texts(row[name]))
        return tuple(roles)

    def _text(self, row: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
        """A row's captions, and what a shard's JSON would hold besides."""
        meta = {name: jsonable(row[name]) for name in self._fields if row[name] is not None}
        label = row[self.columns.label] if self.columns.label else None

        if label is not None:
            meta["class"] = str(label)
            if self._classes:
                meta["class"] = self._classes[label].replace("_", " ")

        captions: list[str] = []
        for name in self.columns.captions:
            try:
                captions += texts(row[name])
            except NoText as error:
                raise ValueError(f"{self.name}: {name}: {error}") from None
        return captions_of(tuple(captions), meta, self.captions), meta

    def fingerprint(self) -> str:
        return self._digest

    def problems(self) -> list[str]:
        problems = [*self._odd, *self._notes]
        if self.n_left_out:
            problems.insert(0, f"{self.name}: {self.n_left_out} rows without text")
        return problems

    def n_captions(self) -> np.ndarray:
        return self._counts.numpy()


def _type(data: bytes) -> str:
    """The usual extension of an image without a name, by its first bytes."""
    return {b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp"}.get(data[:2], "jpg")
