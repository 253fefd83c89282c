"""Rows of annotations with their pictures, named or inside, for the tasks that choose.

table          .jsonl, .csv, .json, .parquet, …: images by name, in `images` or beside it
parquet        a file or a folder of them: images inside, or by name
shards         a .tar or a folder of them: a sample's JSON is the row, its image is `image`, and its
               .txt is `text` and `caption` where the JSON has none
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlp.data.members import is_hidden
from vlp.data.paths import shards_in
from vlp.eval.datasets import parquet, shards, tables
from vlp.eval.pictures import Collection, DataError, Picture, refuse_missing

_TEXTS = ("text", "caption")


@dataclass(frozen=True)
class Rows:
    """The rows of a set; a picture inside of one is a `Picture` there."""

    rows: list[dict[str, Any]]
    beside: Path  # where named images are unless said otherwise
    skipped: list[str] = field(default_factory=list)  # samples that cannot be read


def read(path: Path, texts: Sequence[str] = (), missing: str = "error") -> Rows:
    """The rows of a table, of parquet files or of shards; the columns `texts` stay as written.

    Raises DataError for a path that holds none, and for samples that cannot be read.
    """
    if not path.exists():
        raise DataError(f"no annotations at {path}; give a table, or a folder of .parquet or .tar")
    tars = [path] if path.suffix == ".tar" else shards_in(path)
    files = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet"))
    files = [file for file in files if not is_hidden(file.name)]

    # img2dataset notes beside each shard what it fetched; other tables lie beside packed images.
    is_index = all(file.with_suffix(".tar").exists() for file in files)
    if tars and is_index:
        return _of_shards(path, tars, missing)
    if path.is_file() and not files:
        return Rows(tables.read_rows(path, texts), tables.beside(path))
    rows: list[dict[str, Any]] = []
    for file in files:
        rows += parquet.rows(file) if parquet.stores_bytes(file) else tables.read_rows(file, texts)
    if not rows:
        raise DataError(
            f"{path} holds no row in a .parquet or .tar; give its table, or that folder"
        )
    return Rows(rows, path if path.is_dir() else tables.beside(path))


def _of_shards(path: Path, tars: list[Path], missing: str) -> Rows:
    """The samples of shards as rows."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for tar in tars:
        samples, _, left_out = shards.samples_of(tar, missing)
        skipped += left_out
        for sample in samples:
            written = dict.fromkeys(_TEXTS, sample.content.text) if sample.content.text else {}
            image = shards.member_of(tar, sample.members["image"])
            rows.append({**written, **sample.content.meta, "image": image})
    if not rows:
        raise DataError(f"{path} holds no sample")
    return Rows(rows, path, skipped)


class Wanted:
    """The pictures that rows hold or name, sought one by one; what is not there is noted."""

    def __init__(self, images: str | Path) -> None:
        self.absent: list[str] = []  # names of those that are not there
        self._images = images
        self._collection: Collection | None = None
        self._n = self._n_blank = 0

    def find(self, cell: Any) -> Picture | None:
        """The picture in a cell, or that it names; None if it is not there."""
        self._n += 1
        if isinstance(cell, Picture):
            return cell
        if cell is None or cell == "":
            self._n_blank += 1
            self.absent.append("(no image)")
            return None

        # Opened at the first name: a set with its pictures inside needs no folder of images.
        if self._collection is None:
            self._collection = Collection(self._images)
        picture = self._collection.find(str(cell))
        if picture is None:
            self.absent.append(str(cell))
        return picture

    def refuse_missing(self, missing: Literal["error", "skip"]) -> None:
        """Raise DataError for pictures that are not there, unless they may be missing and some
        are there.
        """
        if self._n_blank and (missing != "skip" or self._n_blank == self._n):
            raise DataError(
                f"{self._n_blank} of {self._n} rows hold no image bytes and no image's name; fetch "
                "the full set, or pass missing=skip (the score is then not comparable)"
            )
        if self._collection is not None:
            refuse_missing(self.absent, self._n, self._collection, missing)
