"""Evaluation sets, however they lie on disk: `open_source(path, split)` finds out which of these it
is.

folder with SPLIT/nshards.txt   clip_benchmark's webdataset layout: SPLIT/0.tar …, classnames.txt,
                                zeroshot_classification_templates.txt, dataset_type.txt
folder of Urban1k, DOCCI or DCI images and long captions (`long_captions`)
folder of Chinese-CLIP, COCO-CN or Flickr30k-CN     Chinese captions (`chinese`)
folder with .tar files          shards as `vlp data pack` and img2dataset write them (JSON "class",
                                or captions)
folder with .parquet files      a Hugging Face image data set; class names from its ClassLabel
folder or tar of images         key.jpg with its captions in key.txt, key.json or key.caption, at
                                any depth, or where vlp.data.loose_texts finds them
folder or tar of folders        one folder of images a class, where no text lies beside an image
table.csv, .jsonl, .json, …     names of images with captions or classes, whatever vlp.data.tables
                                reads: COCO's captions_*.json and Karpathy's dataset_*.json too; the
                                images in `images`, the .tar of the same name, or the table's folder
table.parquet                   the same, or with its images inside
hf:user/name                    any of the above in a data set repository on the hub
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

from vlp.data import splits
from vlp.data.archives import Archive
from vlp.data.captions import Choice, Texts
from vlp.data.members import is_hidden
from vlp.data.paths import is_packed, plain_only, shards_in
from vlp.data.tables import TableOptions
from vlp.eval.datasets import chinese, long_captions, parquet, shards, tables, trees
from vlp.eval.datasets.source import Source
from vlp.eval.pictures import DataError, open_archive


def open_source(
    path: str,
    split: str = "test",
    missing: str = "error",
    images: str | None = None,  # where a table's images are; None: beside it
    options: TableOptions | None = None,  # how a table is read
    texts: Texts | None = None,  # which texts of shards are captions; None: the usual ones
) -> Source:
    """Read an evaluation set's index; a DataError says what was expected. No image is decoded."""
    options, texts = options or TableOptions(), texts or Texts()
    root = _download(path, split) if path.startswith("hf:") else Path(path)
    if not root.exists():
        raise DataError(f"no evaluation data at {path}; give a folder, a table or hf:USER/NAME")

    # A file is a table or a tar; a folder is told by what lies in it.
    if read := chinese.reader_of(root):
        _refuse_choices(root, options, texts)
        source = read(split, missing, images)
    elif root.is_file() and not _may_be_tar(root):
        source = _from_file(root, images, split, missing, options)
    elif (root / split / "nshards.txt").exists():
        _refuse_images(root, images)
        choice = Choice(texts.names, lines=texts.lines or "each")
        source = shards.clip_benchmark(root, split, choice, missing)
    elif read := long_captions.reader_of(root, options):
        source = read(split, missing, images)
    else:
        source = _by_content(root, split, missing, images, options, texts)

    # A path that exists may hold nothing of this split.
    if not source.records:
        raise DataError(f"{path} holds no image in split {split!r}")
    return replace(source, name=_short_name(path))


def _from_file(
    path: Path, images: str | None, split: str, missing: str, options: TableOptions
) -> Source:
    """A table that names its images, or a parquet file that holds them."""
    if path.suffix.lower() == ".parquet" and parquet.holds_images(path):
        return parquet.from_parquet(path, [path], split, options, images, missing)
    return tables.from_table(path, images, split, missing, options)


def _refuse_images(root: Path, images: str | None) -> None:
    """Raise DataError where `images` would be ignored: the set holds its own."""
    if images is not None:
        raise DataError(
            f"images={images} says where the images of a table are, and {root} holds its own; "
            "leave it out, or give the table as data="
        )


def _refuse_captions(root: Path, texts: Texts) -> None:
    """Raise DataError for captions= where there are no shards to choose in."""
    if texts.captions:
        raise DataError(
            f"captions={list(texts.captions)} chooses among the texts of shards; {root} holds no "
            ".tar; leave it out"
        )


def _refuse_choices(root: Path, options: TableOptions, texts: Texts) -> None:
    """Raise DataError for options of tables and shards where a layout says all by itself."""
    _refuse_captions(root, texts)
    for option in fields(TableOptions):
        value = getattr(options, option.name)
        if value != getattr(TableOptions(), option.name):
            raise DataError(
                f"{option.name}={value} says how a table is read, and {root} is a set of a known "
                "layout; leave it out"
            )


def _may_be_tar(path: Path) -> bool:
    """Whether a file is read, or refused, as an archive; every other one is a table."""
    return path.suffix.lower() in (".tar", ".zip") or is_packed(path.name)


def _short_name(path: str) -> str:
    """What records call the set: its folder, table or repository."""
    if path.startswith("hf:"):
        return path[3:]
    # Resolved, so that "." and links have the name of the folder itself.
    name = Path(path).resolve().name
    return name.removesuffix(".gz").rpartition(".")[0] if Path(path).is_file() else name


def _download(path: str, split: str) -> Path:
    """Fetch what belongs to a split, by the names that the hub's data sets and clip_benchmark's
    use.
    """
    from huggingface_hub import snapshot_download

    from vlp.pretrained import places

    # One short question first: a download asks again and again where no Hub answers.
    try:
        repository = places.locate(path, kind="dataset")
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    patterns = [
        f"{split}/*",
        f"*/{split}/*",
        f"{split}-*",
        f"*/{split}-*",
        f"{split}.*",
        f"*/{split}.*",
        "*.txt",
    ]
    return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))


# --- folders and tars -----------------------------------------------------------------------------


def _by_content(
    root: Path,
    split: str,
    missing: str,
    images: str | None,
    options: TableOptions,
    texts: Texts,
) -> Source:
    """Shards, parquet files, or a tree of images in a folder or tar: whichever lies there.

    Raises DataError where shards and a tree lie side by side.
    """
    archive = _archive_of_split(root, split)
    in_folders = next((name for name in archive.names if "/" in name), None)
    tars = _tars(root, split)

    # A tar with texts is a shard; without them its folders are classes.
    is_shard = root.is_file() and bool(archive.texts) and not archive.below
    if is_shard or (tars and root.is_dir() and in_folders is None):
        _refuse_images(root, images)
        return _shards(root, tars, missing, texts)

    # Reading only one of both kinds would score a part of the set under its whole name.
    if tars and tars[0].parent == archive.path:
        raise DataError(
            f"{archive.path} holds shards ({tars[0].name}) and images in folders ({in_folders}); "
            f"give one of them, such as {tars[0]}, or keep them in folders of their own"
        )
    # Outside of shards every text has its place, and a choice would be ignored in silence.
    _refuse_captions(root, texts)

    # Who says where the images are means the table, whatever lies beside it; and images in one
    # folder without texts are no classes, so that a table beside them is what names them.
    files = _parquet_files(root, split, archive)
    is_table = not archive.names or images is not None
    if files and images is None and not archive.texts and _in_one_folder(archive):
        return parquet.from_parquet(root, files, split, options, str(root), missing)
    if files and (is_table or parquet.holds_images(files[0])):
        return parquet.from_parquet(root, files, split, options, images, missing)
    _refuse_images(root, images)
    return trees.from_tree(root, split, missing, archive, texts.lines or "one")


def _in_one_folder(archive: Archive) -> bool:
    """Whether all pictures, some at all, lie in one folder."""
    return len({name.rpartition("/")[0] for name in archive.names}) == 1


def _shards(root: Path, tars: list[Path], missing: str, texts: Texts) -> Source:
    """The samples of tars, with the names of their classes where those are numbers."""
    choice = Choice(texts.names, lines=texts.lines or "one")
    source = shards.from_tars(root, tars, choice, missing)

    # Names by number are of use only where the samples carry numbers.
    numbered = any(isinstance(record.label, int) for record in source.records)
    return replace(source, classes=shards.class_names(root)) if numbered else source


def _archive_of_split(root: Path, split: str) -> Archive:
    """What lies in the split's folder, or where there is none in all of `root`."""
    if root.is_dir():
        return open_archive(root, split if (root / split).is_dir() else "")

    # A tar may hold its splits as folders.
    archive = open_archive(root)
    has_split = any(name.startswith(f"{split}/") for name in archive.names)
    return open_archive(root, split) if has_split else archive


# --- the files of a split -------------------------------------------------------------------------


def _tars(root: Path, split: str) -> list[Path]:
    """The shards of a split: those in its folder, else those beside, or the tar that is named."""
    if root.is_file():
        tars = [root]
    else:
        tars = shards_in(root / split) or _of_split(root, shards_in(root), split)
    try:
        return plain_only(tars, str(root))
    except ValueError as error:
        raise DataError(str(error)) from None


def _parquet_files(root: Path, split: str, archive: Archive) -> list[Path]:
    """The parquet files of a split, in its folder, beside, or at any depth."""
    in_split, in_root = _visible(root / split), _visible(root)
    files = in_split or _of_split(root, in_root, split) or _named_parquet(root, split)
    if not files and not archive.names:
        # Nothing else is there: either all files are of one split, or the error names the splits.
        files = _of_split(root, sorted(root.rglob("*.parquet")), split)
    return files


def _visible(folder: Path) -> list[Path]:
    """A folder's parquet files without hidden ones."""
    return [path for path in sorted(folder.glob("*.parquet")) if not is_hidden(path.name)]


def _named_parquet(root: Path, split: str) -> list[Path]:
    """data/test-00000-of-00002.parquet and the like, at any depth, as on the hub."""
    return sorted(
        path
        for path in root.rglob("*.parquet")
        if path.name.startswith(split) or path.parent.name == split
    )


def _of_split(root: Path, files: list[Path], split: str) -> list[Path]:
    """The files that belong to a split by the beginning of their names; all where none tells."""
    # Files whose names tell no split belong to every one.
    named = sorted(set(filter(None, (splits.of_file(file.name) for file in files))))
    begins = re.compile(rf"{re.escape(split)}(?![a-z])", re.I)
    chosen = [file for file in files if begins.match(file.name)]
    if named and not chosen:
        raise DataError(f"{root} has no split {split!r}, only {', '.join(named)}; pass split=…")
    return chosen if named else files
