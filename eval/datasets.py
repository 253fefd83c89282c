"""Evaluation sets, however they lie on disk: `open_source(path, split)` finds out which of these it is.

    folder with SPLIT/nshards.txt   clip_benchmark's webdataset layout: SPLIT/0.tar …, classnames.txt,
                                    zeroshot_classification_templates.txt, dataset_type.txt
    folder with .tar files          shards as `vlp data pack` and img2dataset write them (JSON "class", or captions)
    folder with .parquet files      a Hugging Face image data set; class names from its ClassLabel
    folder or tar of images         key.jpg with its captions in key.txt, key.json or key.caption, at any depth
    folder or tar of folders        one folder of images a class, where no text lies beside an image
    table.jsonl                     a line an image ("image", "class" or "captions", "split"), members of the .tar beside it
    hf:user/name                    any of the above in a data set repository on the hub
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlp.data.archives import Archive, is_hidden
from vlp.data.members import IMAGE_TYPES, Content, read_text, split_name
from vlp.data.trees import read_tree, splits_in
from vlp.eval import classes
from vlp.eval.pictures import Collection, DataError, Picture, open_archive, picture_of, refuse_missing, tar_members


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


def open_source(path: str, split: str = "test", missing: str = "error") -> Source:
    """Read an evaluation set's index; a DataError says what was expected. No image is decoded here."""
    root = _download(path[3:], split) if path.startswith("hf:") else Path(path)
    if not root.exists():
        raise DataError(f"no evaluation data at {path}; give a folder, a .jsonl table or hf:USER/NAME")
    if root.suffix == ".jsonl":
        source = _table(root, split, missing)
    elif (root / split / "nshards.txt").exists():
        source = _clip_benchmark(root, split)
    else:
        source = _by_content(root, split, missing)
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


def _by_content(root: Path, split: str, missing: str) -> Source:
    """Shards, parquet files, or a tree of images in a folder or tar: whichever lies there; both kinds are refused."""
    archive = _archive_of_split(root, split)
    in_folders = next((name for name in archive.names if "/" in name), None)
    tars = _split_files(root, split, "*.tar")
    if tars and in_folders is None:
        source = _from_samples(root, (sample for tar in tars for sample in _samples(tar)))
        numbered = any(isinstance(record.label, int) for record in source.records)
        return replace(source, classes=_class_names(root)) if numbered else source
    if tars and tars[0].parent == archive.path:
        raise DataError(
            f"{archive.path} holds shards ({tars[0].name}) and images in folders ({in_folders}); give one of them, such as "
            f"{tars[0]}, or keep them in folders of their own"
        )
    tables = _split_files(root, split, "*.parquet") or _named_parquet(root, split)
    if tables and (not archive.names or _holds_images(tables[0])):
        return _parquet(root, tables)
    return _tree(root, split, missing, archive)


def _archive_of_split(root: Path, split: str) -> Archive:
    """What lies in the split's folder, or where there is none in all of `root`."""
    if root.is_dir():
        return open_archive(root, split if (root / split).is_dir() else "")
    archive = open_archive(root)
    return open_archive(root, split) if any(name.startswith(f"{split}/") for name in archive.names) else archive


def _holds_images(table: Path) -> bool:
    """Whether a parquet file has images, and is not only what img2dataset notes of the images beside it."""
    import pyarrow.parquet as parquet

    return "image" in parquet.read_schema(table).names


def _split_files(root: Path, split: str, pattern: str) -> list[Path]:
    in_split, in_root = (
        [p for p in sorted(folder.glob(pattern)) if not is_hidden(p.name)]
        for folder in (root / split, root)
    )
    return in_split or in_root


def _named_parquet(root: Path, split: str) -> list[Path]:
    """data/test-00000-of-00002.parquet and the like, at any depth, as the hub lays data sets out."""
    return sorted(p for p in root.rglob("*.parquet") if p.name.startswith(split) or p.parent.name == split)


# --- tars ---------------------------------------------------------------------------------------------------------------


def _clip_benchmark(root: Path, split: str) -> Source:
    """The layout of clip_benchmark 1.6 (`webdataset_builder.convert_dataset`, read by `datasets.builder.build_wds_dataset`)."""
    text = (root / split / "nshards.txt").read_text().strip()
    if not text.isdigit():
        raise DataError(f"{root / split / 'nshards.txt'} holds {text!r}, expected the number of shards")
    tars = [root / split / f"{i}.tar" for i in range(int(text))]
    absent = [str(t) for t in tars if not t.exists()]
    if absent:
        raise DataError(f"nshards.txt announces {len(tars)} shards but {len(absent)} are not there: {', '.join(absent[:5])}")
    names = _class_names(root)
    source = _from_samples(root, (sample for tar in tars for sample in _samples(tar)), "cls" if names else "class")
    return replace(
        source,
        classes=names,
        templates=_lines(root / "zeroshot_classification_templates.txt"),
        multilabel=(_lines(root / "dataset_type.txt") or [""])[0] == "multilabel",
    )


def _class_names(root: Path) -> list[str] | None:
    path = root / "classnames.txt"
    return classes.read_list(path).names if path.exists() else None


def _lines(path: Path) -> list[str] | None:
    """The lines of a text that are not blank; None where there is no such file."""
    return [line.strip() for line in path.read_text("utf-8-sig").split("\n") if line.strip()] if path.exists() else None


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, Picture]]]:
    """(key, {extension: member}) of each sample, in the tar's order."""
    groups: dict[str, dict[str, Picture]] = {}
    for name, member in tar_members(tar).items():
        if parts := split_name(name):
            groups.setdefault(parts[0], {})[parts[1]] = replace(member, name=f"{tar}:{name}")
    yield from groups.items()


def _from_samples(root: Path, samples: Iterator[tuple[str, dict[str, Picture]]], prefer: str = "class") -> Source:
    """`prefer`: which label counts where a sample has both, its class's number (cls) or its name (class)."""
    records, other = [], "class" if prefer == "cls" else "cls"
    for key, members in samples:
        image = next((members[e] for e in members if e in IMAGE_TYPES), None)
        if image is None:
            raise DataError(f"sample {key!r} in {root} has no image member ({', '.join(sorted(IMAGE_TYPES))})")
        content = Content(key=key)
        try:
            read_text(content, {e: members[e].read() for e in ("txt", "json", "cls") if e in members})
        except ValueError as error:
            raise DataError(f"sample {key!r} in {root}: {error}") from error
        label = content.meta.get(prefer, content.meta.get(other))
        if "npy" in members:
            label = _multi_hot(members["npy"])
        records.append(Record(image, content.captions, label, content.meta))
    return Source(str(root), records)


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
    refuse_missing(absent, len(rows), collection, missing)
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


def _tree(root: Path, split: str, missing: str, archive: Archive) -> Source:
    """Images with texts beside them, or one folder a class."""
    if not archive.names:
        found = f"; found {archive.left_out}" if archive.left_out.counts else ""
        raise DataError(
            f"{archive.path} is none of the known layouts: no {split}/nshards.txt, no .tar, no .parquet, no images with a "
            f".txt or .json beside each, no folders of images (one a class){found}"
        )
    splits = splits_in(archive)
    if splits:  # else they would be taken for classes
        raise DataError(f"{root} has no split {split!r}, only {', '.join(splits)}; pass split=…")
    try:
        tree = read_tree(archive)
    except ValueError as error:
        raise DataError(str(error)) from error
    if tree.problems and missing != "skip":
        some = "".join(f"\n  {problem}" for problem in tree.problems[:10])
        advice = "mend them, or pass missing=skip to evaluate without them (the score is then not comparable)"
        raise DataError(
            f"{len(tree.problems)} images or folders of {archive.path} cannot be used:{some}\n{advice}"
        )
    records = []
    for item in tree.items:
        label = (
            item.meta.get("class", item.meta.get("cls"))
            if tree.paired
            else item.image.split("/")[0]
        )
        records.append(
            Record(picture_of(archive, item.image), tuple(item.captions), label, item.meta)
        )
    return Source(str(root), records, skipped=tree.problems)
