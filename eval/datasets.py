"""Evaluation sets, however they lie on disk: `open_source(path, split)` finds out which of these it is.

    folder with SPLIT/nshards.txt   clip_benchmark's webdataset layout: SPLIT/0.tar …, classnames.txt,
                                    zeroshot_classification_templates.txt, dataset_type.txt
    folder with .tar files          shards as `vlp data pack` and img2dataset write them (JSON "class", or captions)
    folder with .parquet files      a Hugging Face image data set; class names from its ClassLabel
    folder of folders               one folder of images a class
    folder of images                key.jpg with its captions in key.txt, a line each
    table.jsonl                     a line an image ("image", "class" or "captions", "split"), members of the .tar beside it
    hf:user/name                    any of the above in a data set repository on the hub
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlp.data.captions import Choice, Texts, form_of
from vlp.data.paths import plain_only, shards_in
from vlp.data.rows import Shard
from vlp.data.scan import Found, read
from vlp.eval.pictures import Collection, DataError, Picture, is_image, refuse_missing

SPLITS = ("train", "val", "valid", "validation", "test")  # folder names that are no classes


@dataclass(frozen=True)
class Record:
    """One image and what is known about it."""

    picture: Picture
    captions: tuple[str, ...] = ()
    label: int | str | tuple[int, ...] | None = None  # class number, class name, or several numbers (multi-label)
    meta: dict[str, Any] = field(default_factory=dict)  # the sample's JSON, or the table's row


@dataclass
class Source:
    """An evaluation set as read, before a task asks something of it."""

    name: str
    records: list[Record]
    classes: list[str] | None = None  # by class number, where the set lists them
    templates: list[str] | None = None  # where the set brings its own
    multilabel: bool = False
    skipped: list[str] = field(default_factory=list)  # annotations left out because their images are missing


def open_source(path: str, split: str = "test", missing: str = "error", texts: Texts | None = None) -> Source:
    """Read an evaluation set's index; a DataError says what was expected. No image is decoded here.

    `texts`: which texts of shards are captions; None: the usual ones.
    """
    texts = texts or Texts()
    root = _download(path[3:], split) if path.startswith("hf:") else Path(path)
    if not root.exists():
        raise DataError(f"no evaluation data at {path}; give a folder, a .jsonl table or hf:USER/NAME")
    if root.suffix == ".jsonl":
        source = _table(root, split, missing)
    elif (root / split / "nshards.txt").exists():
        source = _clip_benchmark(root, split, Choice(tuple(texts.captions), lines=texts.lines or "each"))
    elif found := _tars(root, split):
        source = _from_tars(root, found, Choice(tuple(texts.captions), lines=texts.lines or "one"))
    elif texts.captions:
        raise DataError(f"captions={list(texts.captions)} chooses among the texts of shards; {path} holds no .tar; leave it out")
    elif found := _split_files(root, split, "*.parquet") or _named_parquet(root, split):
        source = _parquet(root, found)
    else:
        source = _tree(root, split)
    if not source.records:
        raise DataError(f"{path} holds no image in split {split!r}")
    return replace(source, name=_short_name(path))


def _short_name(path: str) -> str:
    return path[3:] if path.startswith("hf:") else Path(path).stem if path.endswith(".jsonl") else Path(path).resolve().name


def _download(repository: str, split: str) -> Path:
    """Fetch what belongs to a split, by the names that the hub's data sets and clip_benchmark's use."""
    from huggingface_hub import snapshot_download

    wanted = [f"{split}/*", f"*/{split}/*", f"{split}-*", f"*/{split}-*", f"{split}.*", f"*/{split}.*", "*.txt"]
    return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=wanted))


def _tars(root: Path, split: str) -> list[Path]:
    """The shards of a split: those in its folder, else those beside, or the tar that is named."""
    found = [root] if root.is_file() and root.suffix == ".tar" else shards_in(root / split) or shards_in(root)
    try:
        return plain_only(found, str(root))
    except ValueError as error:
        raise DataError(str(error)) from None


def _split_files(root: Path, split: str, pattern: str) -> list[Path]:
    return sorted((root / split).glob(pattern)) or sorted(root.glob(pattern))


def _named_parquet(root: Path, split: str) -> list[Path]:
    """data/test-00000-of-00002.parquet and the like, at any depth, as the hub lays data sets out."""
    return sorted(p for p in root.rglob("*.parquet") if p.name.startswith(split) or p.parent.name == split)


# --- tars ---------------------------------------------------------------------------------------------------------------


def _clip_benchmark(root: Path, split: str, choice: Choice) -> Source:
    """The layout of clip_benchmark 1.6 (`webdataset_builder.convert_dataset`, read by `datasets.builder.build_wds_dataset`).

    Each line of a text file is a caption there.
    """
    text = (root / split / "nshards.txt").read_text().strip()
    if not text.isdigit():
        raise DataError(f"{root / split / 'nshards.txt'} holds {text!r}, expected the number of shards")
    tars = [root / split / f"{i}.tar" for i in range(int(text))]
    absent = [str(t) for t in tars if not t.exists()]
    if absent:
        raise DataError(f"nshards.txt announces {len(tars)} shards but {len(absent)} are not there: {', '.join(absent[:5])}")
    classes = _lines(root / "classnames.txt")
    source = _from_tars(root, tars, choice, "cls" if classes else "class")
    return replace(
        source,
        classes=classes,
        templates=_lines(root / "zeroshot_classification_templates.txt"),
        multilabel=(_lines(root / "dataset_type.txt") or [""])[0] == "multilabel",
    )


def _lines(path: Path) -> list[str] | None:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else None


def _from_tars(root: Path, tars: list[Path], choice: Choice, prefer: str = "class") -> Source:
    """The samples that training finds in the same tars. `choice`: which of their texts are captions.

    `prefer`: which label counts where a sample has both, its class's number (cls) or its name (class). What training
    leaves out is refused here: a score is over the whole set.
    """
    records: list[Record] = []
    names: Counter[str] = Counter()
    for tar in tars:
        for sample in _samples(tar):
            names.update(form_of(sample.content.meta, sample.content.text).keys())
            records.append(_record(tar, sample, choice, prefer))
    try:
        choice.check({name.removeprefix("."): n for name, n in names.items()}, len(records), str(root))
    except ValueError as error:
        raise DataError(str(error)) from None
    return Source(str(root), records)


def _samples(tar: Path) -> list[Found]:
    """The samples of a tar; a DataError names those that cannot be used."""
    samples: list[Found] = []

    def begin(_: Shard) -> Callable[[Found], None]:
        samples.clear()
        return samples.append

    try:
        shard = read(tar, begin, also=frozenset({"npy"}))
    except ValueError as error:
        raise DataError(str(error)) from None
    if shard.n_left_out or shard.n_damaged:
        raise DataError(f"{tar}: {'; '.join(shard.problems[:5])}; repair the tar, or write it anew without these samples")
    return samples


def _record(tar: Path, sample: Found, choice: Choice, prefer: str) -> Record:
    content, image = sample.content, sample.members["image"]
    picture = Picture(f"{tar}:{image.name}", str(tar), image.offset, image.size)
    other = "class" if prefer == "cls" else "cls"
    label = content.meta.get(prefer, content.meta.get(other))
    if "npy" in sample.members:
        array = sample.members["npy"]
        label = _multi_hot(Picture(f"{tar}:{array.name}", str(tar), array.offset, array.size))
    captions = choice.captions(content.meta, content.text)
    if not captions and label is None and content.notes:
        raise DataError(f"sample {content.key!r} in {tar}: {'; '.join(content.notes)}")
    return Record(picture, captions, label, content.meta)


def _multi_hot(member: Picture) -> tuple[int, ...]:
    import numpy as np

    values = np.load(io.BytesIO(member.read()), allow_pickle=False)
    return tuple(np.flatnonzero(values).tolist())


# --- tables and trees ---------------------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a DataError names the line that is not a mapping."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} holds {type(row).__name__}, expected a mapping")
        rows.append(row)
    return rows


def beside(table: Path) -> Path:
    """Where a table's images are unless said otherwise: the .tar of the same name, else the table's folder."""
    tar = table.with_suffix(".tar")
    return tar if tar.exists() else table.parent


def _table(path: Path, split: str, missing: str) -> Source:
    rows = read_jsonl(path)
    splits = sorted({str(row["split"]) for row in rows if "split" in row})
    if splits and split not in splits:
        raise DataError(f"{path} has no split {split!r}, only {splits}; pass split=…")
    rows = [row for row in rows if not splits or row.get("split") == split]
    nameless = [i for i, row in enumerate(rows) if not isinstance(row.get("image"), str)]
    if nameless:
        raise DataError(f"{path}: {len(nameless)} rows lack the key 'image' (the first: row {nameless[0]} of the split)")
    collection = Collection(beside(path))
    found = [(row, collection.find(row["image"])) for row in rows]
    absent = [row["image"] for row, picture in found if picture is None]
    refuse_missing(absent, len(rows), collection.root, missing)
    records = [Record(picture, captions_of(row), row.get("class"), row) for row, picture in found if picture]
    return Source(str(path), records, skipped=absent)


def captions_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The captions of a table's row: `captions` (a list), else `caption` or `sentence` (a text or a list), else none."""
    value = row.get("captions", row.get("caption", row.get("sentence", [])))
    return tuple(value) if isinstance(value, list) else (value,)


def _parquet(root: Path, files: list[Path]) -> Source:
    import pyarrow.parquet as parquet

    records: list[Record] = []
    classes = None
    for file in files:
        table = parquet.read_table(file)
        if "image" not in table.column_names:
            raise DataError(f"{file} has no column 'image', only {table.column_names}")
        features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        label = next((c for c in ("label", "fine_label", "labels", "cls") if c in table.column_names), None)
        classes = classes or features.get(label, {}).get("names")
        captions = next((c for c in ("captions", "caption", "text", "sentence") if c in table.column_names), None)
        for i, row in enumerate(table.to_pylist()):
            image = row["image"]
            data = image["bytes"] if isinstance(image, dict) else image
            if not data:
                raise DataError(f"{file}: row {i} holds no image bytes; download the data set with its images embedded")
            text = captions_of({"captions": row[captions]}) if captions and row[captions] else ()
            value = row[label] if label else None
            records.append(Record(Picture(f"{file}:{i}", data=data), text, tuple(value) if isinstance(value, list) else value))
    return Source(str(root), records, classes=classes, multilabel=any(isinstance(r.label, tuple) for r in records))


def _tree(root: Path, split: str) -> Source:
    base = root / split if (root / split).is_dir() else root
    other = sorted(p.name for p in base.iterdir() if p.is_dir() and p.name in SPLITS) if base == root else []
    if other:  # else the splits would be taken for classes
        raise DataError(f"{root} has no split {split!r}, only {', '.join(other)}; pass split=…")
    records = []
    for image in sorted(p for p in base.iterdir() if is_image(p.name) and p.with_suffix(".txt").exists()):
        captions = [line.strip() for line in image.with_suffix(".txt").read_text(encoding="utf-8").splitlines() if line.strip()]
        records.append(Record(Picture(str(image), str(image)), tuple(captions)))
    for folder in sorted(p for p in base.iterdir() if p.is_dir() and not records):
        names = sorted(p for p in folder.rglob("*") if p.is_file() and is_image(p.name))
        records += [Record(Picture(str(p), str(p)), label=folder.name) for p in names]
    if not records:
        raise DataError(
            f"{base} is none of the known layouts: no {split}/nshards.txt, no .tar, no .parquet, no folders of images (one a "
            "class), no images with a .txt beside each"
        )
    return Source(str(root), records)
