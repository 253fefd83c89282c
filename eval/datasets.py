"""Evaluation sets, however they lie on disk: `open_source(path, split)` finds out which of these it
is.

folder with SPLIT/nshards.txt   clip_benchmark's webdataset layout: SPLIT/0.tar …, classnames.txt,
                                zeroshot_classification_templates.txt, dataset_type.txt
folder with .tar files          shards as `vlp data pack` and img2dataset write them (JSON "class", or captions)
folder with .parquet files      a Hugging Face image data set; class names from its ClassLabel
folder or tar of images         key.jpg with its captions in key.txt, key.json or key.caption, at any depth
folder or tar of folders        one folder of images a class, where no text lies beside an image
table.csv, .jsonl, .json, …     names of images with captions or classes, whatever vlp.data.tables reads: COCO's
                                captions_*.json and Karpathy's dataset_*.json too; the images in `images`, the .tar of
                                the same name, or the table's folder
hf:user/name                    any of the above in a data set repository on the hub
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vlp.data import splits, tables
from vlp.data.archives import Archive
from vlp.data.captions import Choice, Texts, form_of
from vlp.data.listing import settle
from vlp.data.members import is_hidden
from vlp.data.paths import is_packed, plain_only, shards_in
from vlp.data.rows import Shard
from vlp.data.scan import Found, read
from vlp.data.tables import TableOptions
from vlp.data.tables.columns import (
    IMAGE_COLUMNS,
    column,
    listed,
    split_column,
    usual,
    usual_captions,
)
from vlp.data.tables.values import NoText, equals, shown
from vlp.data.tables.values import texts as texts_of
from vlp.data.trees import read_tree, splits_in
from vlp.eval import classes
from vlp.eval.pictures import (
    Collection,
    DataError,
    Picture,
    open_archive,
    picture_of,
    refuse_missing,
)

NUMBERS = (
    "label",
    "fine_label",
    "labels",
    "cls",
)  # columns of class numbers in the hub's data sets


@dataclass(frozen=True)
class Record:
    """One image and what is known about it."""

    picture: Picture
    captions: tuple[str, ...] = ()
    label: int | str | tuple[int, ...] | None = (
        None  # class number, class name, or several numbers (multi-label)
    )
    meta: dict[str, Any] = field(default_factory=dict)  # the sample's JSON, or the table's row


@dataclass
class Source:
    """An evaluation set as read, before a task asks something of it."""

    name: str
    records: list[Record]
    classes: list[str] | None = None  # by class number, where the set lists them
    templates: list[str] | None = None  # where the set brings its own
    multilabel: bool = False
    skipped: list[str] = field(
        default_factory=list
    )  # annotations left out because their images are missing
    n_joined: int = 0  # records that went because their pictures equal another one's


def open_source(
    path: str,
    split: str = "test",
    missing: str = "error",
    images: str | None = None,  # where a table's images are; None: beside it
    options: TableOptions | None = None,  # how a table is read
    texts: Texts | None = None,  # which texts of shards are captions; None: the usual ones
) -> Source:
    """Read an evaluation set's index; a DataError says what was expected. No image is decoded here."""
    options, texts = options or TableOptions(), texts or Texts()
    root = _download(path[3:], split) if path.startswith("hf:") else Path(path)
    if not root.exists():
        raise DataError(f"no evaluation data at {path}; give a folder, a table or hf:USER/NAME")
    if root.is_file() and not _may_be_tar(root):
        source = _table(root, images, split, missing, options)
    elif (root / split / "nshards.txt").exists():
        choice = Choice(tuple(texts.captions), lines=texts.lines or "each")
        source = _clip_benchmark(root, split, choice, missing)
    else:
        source = _by_content(root, split, missing, options, texts)
    if not source.records:
        raise DataError(f"{path} holds no image in split {split!r}")
    return replace(source, name=_short_name(path))


def _may_be_tar(path: Path) -> bool:
    """Whether a file is read, or refused, as an archive; every other one is a table."""
    return path.suffix.lower() in (".tar", ".zip") or is_packed(path.name)


def _short_name(path: str) -> str:
    if path.startswith("hf:"):
        return path[3:]
    name = Path(path).resolve().name
    return name.removesuffix(".gz").rpartition(".")[0] if Path(path).is_file() else name


def _download(repository: str, split: str) -> Path:
    """Fetch what belongs to a split, by the names that the hub's data sets and clip_benchmark's
    use.
    """
    from huggingface_hub import snapshot_download

    wanted = [
        f"{split}/*",
        f"*/{split}/*",
        f"{split}-*",
        f"*/{split}-*",
        f"{split}.*",
        f"*/{split}.*",
        "*.txt",
    ]
    return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=wanted))


def _by_content(
    root: Path, split: str, missing: str, options: TableOptions, texts: Texts
) -> Source:
    """Shards, parquet files, or a tree of images in a folder or tar: whichever lies there; both
    kinds are refused.
    """
    archive = _archive_of_split(root, split)
    in_folders = next((name for name in archive.names if "/" in name), None)
    tars = _tars(root, split)
    named = (
        root.is_file() and bool(archive.texts) and not archive.below
    )  # a shard; without texts its folders are classes
    if named or (tars and root.is_dir() and in_folders is None):
        choice = Choice(tuple(texts.captions), lines=texts.lines or "one")
        source = _from_tars(root, tars, choice, missing)
        numbered = any(isinstance(record.label, int) for record in source.records)
        return replace(source, classes=_class_names(root)) if numbered else source
    if tars and tars[0].parent == archive.path:
        raise DataError(
            f"{archive.path} holds shards ({tars[0].name}) and images in folders ({in_folders}); give one of them, such as "
            f"{tars[0]}, or keep them in folders of their own"
        )
    if texts.captions:
        raise DataError(
            f"captions={list(texts.captions)} chooses among the texts of shards; {root} holds no .tar; leave it out"
        )
    with_images = _split_files(root, split, "*.parquet") or _named_parquet(root, split)
    if not (with_images or archive.names):  # says which splits there are
        with_images = _of_split(root, sorted(root.rglob("*.parquet")), split)
    if with_images and (not archive.names or _holds_images(with_images[0])):
        return _parquet(root, with_images, split, options)
    return _tree(root, split, missing, archive, texts.lines or "one")


def _tars(root: Path, split: str) -> list[Path]:
    """The shards of a split: those in its folder, else those beside, or the tar that is named."""
    if root.is_file():
        there = [root]
    else:
        there = shards_in(root / split) or _of_split(root, shards_in(root), split)
    try:
        return plain_only(there, str(root))
    except ValueError as error:
        raise DataError(str(error)) from None


def _archive_of_split(root: Path, split: str) -> Archive:
    """What lies in the split's folder, or where there is none in all of `root`."""
    if root.is_dir():
        return open_archive(root, split if (root / split).is_dir() else "")
    archive = open_archive(root)
    return (
        open_archive(root, split)
        if any(name.startswith(f"{split}/") for name in archive.names)
        else archive
    )


def _holds_images(table: Path) -> bool:
    """Whether a parquet file has images, and is not only what img2dataset notes of the images
    beside it.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    schema = parquet.read_schema(table)
    image = usual(schema.names, IMAGE_COLUMNS)
    return bool(image) and not pyarrow.types.is_string(schema.field(image).type)


def _split_files(root: Path, split: str, pattern: str) -> list[Path]:
    in_split, in_root = (
        [p for p in sorted(folder.glob(pattern)) if not is_hidden(p.name)]
        for folder in (root / split, root)
    )
    return in_split or _of_split(root, in_root, split)


def _of_split(root: Path, files: list[Path], split: str) -> list[Path]:
    """The files that belong to a split by the beginning of their names; all where none tells one."""
    named = sorted(set(filter(None, (splits.of_file(file.name) for file in files))))
    chosen = [file for file in files if re.match(rf"{re.escape(split)}(?![a-z])", file.name, re.I)]
    if named and not chosen:
        raise DataError(f"{root} has no split {split!r}, only {', '.join(named)}; pass split=…")
    return chosen if named else files


def _named_parquet(root: Path, split: str) -> list[Path]:
    """data/test-00000-of-00002.parquet and the like, at any depth, as the hub lays data sets out."""
    return sorted(
        p for p in root.rglob("*.parquet") if p.name.startswith(split) or p.parent.name == split
    )


# --- tars ---------------------------------------------------------------------------------------------------------------


def _clip_benchmark(root: Path, split: str, choice: Choice, missing: str) -> Source:
    """The layout of clip_benchmark 1.6 (`webdataset_builder.convert_dataset`, read by
    `datasets.builder.build_wds_dataset`).
    """
    text = (root / split / "nshards.txt").read_text().strip()
    if not text.isdigit():
        raise DataError(
            f"{root / split / 'nshards.txt'} holds {text!r}, expected the number of shards"
        )
    tars = [root / split / f"{i}.tar" for i in range(int(text))]
    absent = [str(t) for t in tars if not t.exists()]
    if absent:
        raise DataError(
            f"nshards.txt announces {len(tars)} shards but {len(absent)} are not there: {', '.join(absent[:5])}"
        )
    names = _class_names(root)
    source = _from_tars(root, tars, choice, missing, "cls" if names else "class")
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
    return (
        [line.strip() for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
        if path.exists()
        else None
    )


def _from_tars(
    root: Path, tars: list[Path], choice: Choice, missing: str, prefer: str = "class"
) -> Source:
    """The samples that training finds in the same tars. `choice`: which of their texts are
    captions.

    `prefer`: which label counts where a sample has both, its class's number (cls) or its name
    (class). What training leaves out is refused here, unless `missing` is "skip": a score is over
    the whole set.
    """
    records: list[Record] = []
    skipped: list[str] = []
    names: Counter[str] = Counter()
    for tar in tars:
        samples, problems = _samples(tar, missing)
        skipped += problems
        for sample in samples:
            names.update(form_of(sample.content.meta, sample.content.text).keys())
            records.append(_record(tar, sample, choice, prefer))
    try:
        choice.check(
            {name.removeprefix("."): n for name, n in names.items()}, len(records), str(root)
        )
    except ValueError as error:
        raise DataError(str(error)) from None
    return Source(str(root), records, skipped=skipped)


def _samples(tar: Path, missing: str) -> tuple[list[Found], list[str]]:
    """The samples of a tar, and a line for each that is left out; a DataError names them unless
    they may be."""
    samples: list[Found] = []

    def begin(_: Shard) -> Callable[[Found], None]:
        samples.clear()
        return samples.append

    try:
        shard = read(tar, begin, also=frozenset({"npy"}))
    except ValueError as error:
        raise DataError(str(error)) from None
    lost = shard.n_left_out or shard.n_damaged
    if lost and missing == "error":
        raise DataError(
            f"{tar}: {'; '.join(shard.problems[:5])}; repair the tar, or write it anew without "
            "these samples, or pass missing=skip to evaluate without them (the score is then not comparable)"
        )
    return samples, [f"{tar}: left out"] * lost


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


def read_rows(path: Path, texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a table of any kind; the columns `texts` stay as written. A DataError names the
    line that is wrong.
    """
    try:
        table = tables.read(path)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from None
    if table.problems:
        raise DataError(table.problems[0])
    return table.records(texts)


def beside(table: Path) -> Path:
    """Where a table's images are unless said otherwise: the .tar of the same name, else the table's
    folder.
    """
    tar = table.with_suffix(".tar")
    return tar if tar.exists() else table.parent


def _table(
    path: Path, images: str | None, split: str, missing: str, options: TableOptions
) -> Source:
    try:
        listing = tables.items(path, options, split)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from None
    _refuse_rows(listing.problems, missing)
    collection = Collection(images or beside(path))
    archive = collection.archive
    named = [(item, archive.find(item.image)) for item in listing.items]
    absent = [item.image for item, name in named if name is None]
    refuse_missing(absent, len(listing.items), collection, missing)
    settled, clashes = settle([(item, name) for item, name in named if name], archive)
    _refuse_rows(clashes, missing)

    labels = _labels([item.label for item, _ in settled])
    records = [
        Record(picture_of(archive, name), tuple(item.captions), label, item.meta)
        for (item, name), label in zip(settled, labels)
    ]
    return Source(str(path), records, skipped=listing.problems + absent + clashes)


def _refuse_rows(problems: list[str], missing: str) -> None:
    """Raise for rows that cannot be used, unless they may be left out."""
    if problems and missing == "error":
        some = "\n  ".join(problems[:10])
        raise DataError(
            f"{len(problems)} rows cannot be used; mend them, or pass missing=skip to evaluate "
            f"without them (the score is then not comparable):\n  {some}"
        )


def _labels(values: list[Any]) -> list[int | str | None]:
    """Class numbers where all classes are whole numbers, else class names."""
    numbers = [
        int(value) if isinstance(value, float) and value.is_integer() else value for value in values
    ]
    if all(value is None or type(value) is int for value in numbers):
        return numbers
    return [None if value is None else shown(value) for value in values]


def _parquet(root: Path, files: list[Path], split: str, options: TableOptions) -> Source:
    """Images inside parquet files, as the hub's data sets hold them."""
    records: list[Record] = []
    class_names = None
    for file in files:
        content, features = _parquet_rows(file)
        columns = content.column_names
        try:
            image = (
                column(columns, options.image_column, file)
                if options.image_column
                else usual(columns, IMAGE_COLUMNS)
            )
            captions = [
                column(columns, name, file) for name in options.named_captions
            ] or usual_captions(columns)
            label = (
                column(columns, options.class_column, file)
                if options.class_column
                else usual(columns, NUMBERS)
            )
            conditions = {
                column(columns, name, file): value for name, value in options.where.items()
            }
        except ValueError as error:
            raise DataError(str(error)) from None
        if not image:
            raise DataError(
                f"{file} has no column of images, only {listed(columns)}; name it: image_column=NAME"
            )
        if split_column(columns):
            conditions.setdefault(split_column(columns), split)
        class_names = class_names or features.get(label, {}).get("names")
        for i, row in enumerate(content.to_pylist()):
            if not all(equals(row[name], value) for name, value in conditions.items()):
                continue
            value = row[label] if label else None
            data = row[image].get("bytes") if isinstance(row[image], dict) else row[image]
            if not data or isinstance(data, str):
                raise DataError(
                    f"{file}: row {i} holds no image bytes in {image!r}; download the data set with its images embedded, or "
                    "give this file itself as data= if it names image files"
                )
            found: list[str] = []
            try:
                for name in captions:
                    found += texts_of(row[name])
            except NoText as error:
                raise DataError(f"{file}: row {i}: {error}") from None
            number = tuple(value) if isinstance(value, list) else value
            records.append(Record(Picture(f"{file}:{i}", data=data), tuple(found), number))
    multilabel = any(isinstance(record.label, tuple) for record in records)
    return Source(str(root), records, classes=class_names, multilabel=multilabel)


def _parquet_rows(file: Path) -> tuple[Any, dict[str, Any]]:
    """A parquet file's table, and what `datasets` notes about its columns."""
    from pyarrow import ArrowException, parquet

    try:
        content = parquet.read_table(file)
    except (ArrowException, OSError) as error:
        raise DataError(
            f"{file} is no whole parquet file ({str(error)[:120]}); fetch it again"
        ) from None
    noted = json.loads((content.schema.metadata or {}).get(b"huggingface", b"{}"))
    return content, noted.get("info", {}).get("features", {})


def join_equal_pictures(source: Source) -> tuple[Source, int]:
    """The set with records of one picture, byte by byte, made one with the captions of all; and how
    many went.

    Otherwise the copies tie with each other, and a tie counts against every model.
    """
    by_size: dict[int, list[int]] = {}
    for i, record in enumerate(source.records):
        by_size.setdefault(record.picture.n_bytes(), []).append(i)
    first: dict[Any, int] = {}
    joined: dict[int, Record] = {}
    for i, record in enumerate(source.records):
        alone = (
            len(by_size[record.picture.n_bytes()]) == 1
        )  # no other picture has this size: none is equal
        content = i if alone else hashlib.sha256(record.picture.read()).digest()
        earlier = first.setdefault((content, record.picture.box, record.picture.border), i)
        if earlier == i:
            joined[i] = record
        else:
            before = joined[earlier].captions
            more = tuple(caption for caption in record.captions if caption not in before)
            joined[earlier] = replace(joined[earlier], captions=before + more)
    return replace(source, records=list(joined.values())), len(source.records) - len(joined)


def _tree(
    root: Path, split: str, missing: str, archive: Archive, lines: Literal["one", "each"]
) -> Source:
    """Images with texts beside them, or one folder a class."""
    if not archive.names:
        found = f"; found {archive.left_out}" if archive.left_out.counts else ""
        raise DataError(
            f"{archive.path} is none of the known layouts: no {split}/nshards.txt, no .tar, no .parquet, no images with a "
            f".txt or .json beside each, no folders of images (one a class){found}"
        )
    there = splits_in(archive)
    if there:  # else they would be taken for classes
        raise DataError(f"{root} has no split {split!r}, only {', '.join(there)}; pass split=…")
    try:
        tree = read_tree(archive, lines)
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
