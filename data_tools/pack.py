"""`vlp data pack`: images with captions or classes into shards, for training or in clip_benchmark's layout.

SOURCE is a folder of images with a caption table, a folder with one sub-folder a class, or a tar with a table that names
its members. Everything is checked before anything is written; the output appears at its place only when it is whole.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlp.data.tables import Listing

HELP = "pack images with captions or classes into shards"
EXAMPLE = """vlp data pack photos/ --captions photos/captions.csv --to data/train
  vlp data pack imagenet/train --to data/imagenet
  vlp data pack 101_ObjectCategories --part 1,2/3 --to data/train      (and --part 3/3 for the test set)
  vlp data pack caltech101.tar --captions caltech101.jsonl --where split=test --to data/caltech101 \\
      --layout clip_benchmark --template "a photo of a {}."
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data pack`."""
    add = parser.add_argument
    add("source", help="folder of images, folder with one sub-folder a class, or a tar")
    add("--to", required=True, metavar="DIR", help="the new folder")
    add("--captions", metavar="TABLE",
        help=".csv, .tsv, .txt, .token, .jsonl, .json or .parquet: one row an image or a caption; COCO's, Karpathy's, LLaVA's JSON")
    add("--image-column", default="", metavar="NAME", help="column with image names (default: image, file_name, …)")
    add("--caption-column", default=[], action="append", metavar="NAME", help="column with captions; may be repeated")
    add("--class-column", default="", metavar="NAME", help="column with class names (default: class)")
    add("--where", default=[], action="append", metavar="COLUMN=VALUE",
        help="only rows with this value; repeated for one column: with one of these")
    add("--only", default="", metavar="LIST", help="only images that this file names, one a line (Flickr_8k.trainImages.txt)")
    add("--separator", default="", metavar="CHARACTER", help="of a text table: a character, tab or space (default: found)")
    add("--encoding", default="", metavar="NAME", help="of a text table, such as cp1252 (default: UTF-8 or UTF-16)")
    add("--header", choices=("auto", "yes", "no"), default="auto", help="whether the first line names the columns")
    add("--quoting", choices=("auto", "csv", "none"), default="auto", help="csv: as RFC 4180 says; none: a quote is a character")
    add("--part", metavar="K/N", help="only these of N parts, chosen by a hash of the image's name: 1,2/3 to train, 3/3 to test")
    add("--samples-per-shard", type=int, default=10_000, metavar="N")
    add("--layout", choices=("train", "clip_benchmark"), default="train")
    add("--split", default="test", help="name of the split's folder in clip_benchmark's layout (default: test)")
    add("--template", default=[], action="append", metavar="TEXT", help="prompt with {} for the class (clip_benchmark)")
    add("--on-missing", choices=("fail", "skip"), default="fail", help="rows whose image is missing or no usable image")
    add("--overwrite", action="store_true", help="replace a folder that holds earlier output of this tool")


def run(args: argparse.Namespace) -> int:
    """Pack; returns 1 after naming every unusable row, having written nothing. Raises ValueError, OSError."""
    from vlp.data.archives import Archive
    from vlp.data.tables.trees import class_items

    target = Path(args.to)
    _check_target(target, args.overwrite)
    archive = Archive(args.source)
    listing = _table(args) if args.captions else None
    items, classes = (listing.items, listing.classes) if listing else class_items(archive)
    if args.part:
        items = [item for item in items if _in_part(item.image, args.part)]
    if not items:
        raise ValueError(f"no row of {args.captions or args.source} is left to pack; check --where and --part")
    usable, left_out = _sort_out(items, archive, listing)
    problems = list(chain.from_iterable(left_out.values()))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and args.on_missing == "fail":
        print(f"{len(problems)} rows cannot be packed; nothing was written. --on-missing skip leaves them out", file=sys.stderr)
        return 1
    if not usable:
        raise ValueError("no usable image is left to pack")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an earlier, killed call left behind
    try:
        n_shards = _write(usable, archive, classes, args, partial)
        previous = target.with_name(f".{target.name}.previous")
        if target.exists():
            target.rename(previous)
        partial.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    n_captions = sum(len(item.captions) for item, _ in usable)
    print(f"{target}: {len(usable)} images with {n_captions} captions and {len(classes)} classes in {n_shards} shards")
    if problems:
        reasons = ", ".join(f"{len(lines)} {reason}" for reason, lines in left_out.items() if lines)
        print(f"left out: {reasons}")
    unused = len(archive.names) - len({name for _, name in usable})
    if unused:
        print(f"{unused} images in {args.source} were not packed (no row names them, or --where or --on-missing left them out)")
    return 0


def _in_part(name: str, part: str) -> bool:
    """Whether a name belongs to the parts "K,…/N": the same split of a set in every call and on every machine."""
    chosen, _, total = part.partition("/")
    numbers = chosen.split(",")
    if not (total.isdecimal() and all(k.isdecimal() and 1 <= int(k) <= int(total) for k in numbers)):
        raise ValueError(f"--part {part!r} is not of the form K/N with 1 <= K <= N, such as 3/3 or 1,2/3")
    return str(zlib.crc32(name.encode()) % int(total) + 1) in numbers


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; --to names a new folder")
    held = [path for path in target.rglob("*") if not path.is_dir()]
    if held and not overwrite:
        raise FileExistsError(f"{target} is not empty; choose another folder, or --overwrite to replace it")
    ours = {".tar", ".txt", ".json", ".bin"}
    foreign = [path for path in held if path.suffix not in ours or not any(target.rglob("*_stats.json"))]
    if foreign:
        raise FileExistsError(f"{target} holds files that no pack wrote, such as {foreign[0].name}; choose another folder")


def _table(args: argparse.Namespace) -> Listing:
    """The images of the table, after saying which of its columns were taken."""
    from vlp.data.tables import TableOptions, items

    where: dict[str, list[str]] = {}
    for condition in args.where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise ValueError(f"--where {condition!r} is not of the form COLUMN=VALUE")
        where.setdefault(column, []).append(value)
    options = TableOptions(
        image_column=args.image_column, caption_columns=args.caption_column, class_column=args.class_column,
        where=where, only=args.only,
        separator=args.separator, encoding=args.encoding, quoting=args.quoting,
        header={"yes": True, "no": False}.get(args.header),
    )  # fmt: skip
    listing = items(args.captions, options)
    print(f"{args.captions}: {listing}")
    for note in listing.notes:
        print(f"note: {note}")
    return listing


def _sort_out(items: list, archive, listing: Listing | None) -> tuple[list, dict[str, list[str]]]:
    """The items with the names of their images, and by reason a line for each row that cannot be packed."""
    usable, unreadable, missing, silent = [], list(listing.problems if listing else []), [], []
    for item in items:
        place = f"{listing.place(item)}: " if listing else ""
        name = archive.find(item.image)
        if name is None:
            missing.append(f"{place}image {item.image!r} is missing in {archive.path}")
        elif not item.captions and item.class_name is None:
            silent.append(f"{place}image {item.image!r} has neither caption nor class")
        else:
            usable.append((item, name))
    reasons = {
        "rows that cannot be read": unreadable,
        "without their image": missing,
        "with neither caption nor class": silent,
    }
    return usable, reasons


def _write(usable: list, archive, classes: list[str], args: argparse.Namespace, folder: Path) -> int:
    from vlp.data.archives import image_type
    from vlp.data.format import ShardWriter

    benchmark = args.layout == "clip_benchmark"
    retrieval = benchmark and not classes
    inner = folder / args.split if benchmark else folder
    number = {name: i for i, name in enumerate(classes)}
    with ShardWriter(inner, args.samples_per_shard, shard_name="{}" if benchmark else "{:05d}") as writer:
        for item, name in _progress(usable):
            # clip_benchmark reads a retrieval caption a line; a training .txt holds one caption.
            txt = "\n".join(" ".join(text.split()) for text in item.captions) if retrieval else None
            cls = number[item.class_name] if item.class_name is not None else None
            try:
                writer.add(None, archive.read(name), image_type(name), item.captions, item.meta, cls, txt=txt)
            except ValueError as error:
                raise ValueError(f"{item.image}: {error}") from None
    extra = {"classnames.txt": classes}
    if benchmark:
        (inner / "nshards.txt").write_text(f"{len(writer.paths)}\n")
        extra["zeroshot_classification_templates.txt"] = [template.replace("{}", "{c}") for template in args.template]
        extra["dataset_type.txt"] = ["retrieval"] if retrieval else []
    for name, lines in extra.items():
        if lines:
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(writer.paths)


def _progress(things: list) -> Iterator:
    """The things, with a line on a terminal that says how far, how fast and how long still."""
    started = shown = time.monotonic()
    for i, thing in enumerate(things):
        yield thing
        now = time.monotonic()
        if sys.stderr.isatty() and (now - shown > 0.2 or i + 1 == len(things)):
            shown = now
            rate = (i + 1) / (now - started)
            end = "\n" if i + 1 == len(things) else ""
            line = f"\r{i + 1}/{len(things)} images, {rate:.0f}/s, {(len(things) - i - 1) / rate:.0f} s left "
            print(line, end=end, file=sys.stderr, flush=True)
