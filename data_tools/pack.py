"""`vlp data pack`: images with captions or classes into shards, for training or in clip_benchmark's
layout.

SOURCE is a folder or a tar: images with a caption table, images with a .txt, .json or .caption
beside each (img2dataset's `files`), or one sub-folder a class. Every image is decoded once before
anything is written; the output appears at its place only when it is whole. The samples of one
"origin" stay together, in one shard and one part.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlp.data.archives import Archive
    from vlp.data.listing import Named
    from vlp.data.tables import Listing
    from vlp.data.trees import Tree

_CHUNK = 256  # images that are handed to the checking threads at once
HELP = "pack images with captions or classes into shards"
EXAMPLE = """vlp data pack photos/ --captions photos/captions.csv --to data/train
  vlp data pack laion/ --to data/train                     (laion/00000/000000001.jpg with .txt or .json beside it)
  vlp data pack imagenet/train --to data/imagenet
  vlp data pack imagenet.tar --split-folder val --to data/imagenet_val
  vlp data pack 101_ObjectCategories --part 1,2/3 --to data/train      (and --part 3/3 for the test set)
  vlp data pack caltech101.tar --captions caltech101.jsonl --where split=test --to data/caltech101 \\
      --layout clip_benchmark --template "a photo of a {}."
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data pack`."""
    add = parser.add_argument
    add(
        "source",
        help="folder or tar of images: with texts beside them, one sub-folder a class, or named by --captions",
    )
    add("--to", required=True, metavar="DIR", help="the new folder")
    add(
        "--captions",
        metavar="TABLE",
        help=".csv, .tsv, .txt, .token, .jsonl, .json or .parquet: one row an image or a caption; COCO's, Karpathy's, LLaVA's JSON",
    )
    add(
        "--image-column",
        default="",
        metavar="NAME",
        help="column with image names (default: image, file_name, …)",
    )
    add(
        "--caption-column",
        default=[],
        action="append",
        metavar="NAME",
        help="column with captions; may be repeated",
    )
    add(
        "--class-column",
        default="",
        metavar="NAME",
        help="column with class names (default: class)",
    )
    add(
        "--where",
        default=[],
        action="append",
        metavar="COLUMN=VALUE",
        help="only rows with this value; repeated for one column: with one of these",
    )
    add(
        "--only",
        default="",
        metavar="LIST",
        help="only images that this file names, one a line (Flickr_8k.trainImages.txt)",
    )
    add(
        "--separator",
        default="",
        metavar="CHARACTER",
        help="of a text table: a character, tab or space (default: found)",
    )
    add(
        "--encoding",
        default="",
        metavar="NAME",
        help="of a text table, such as cp1252 (default: UTF-8 or UTF-16)",
    )
    add(
        "--header",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether the first line names the columns",
    )
    add(
        "--quoting",
        choices=("auto", "csv", "none"),
        default="auto",
        help="csv: as RFC 4180 says; none: a quote is a character",
    )
    add(
        "--lines",
        choices=("one", "each"),
        default="one",
        help="a text of several lines beside an image is one caption, or each of its lines is one",
    )
    add(
        "--split-folder",
        default="",
        metavar="NAME",
        help="only this sub-folder of SOURCE, where it holds splits",
    )
    add(
        "--links",
        choices=("follow", "inside"),
        default="follow",
        help="links that lead out of SOURCE: follow them and say so (default), or leave them out",
    )
    add(
        "--part",
        metavar="K/N",
        help="only these of N parts, chosen by a hash of the image's name or origin: 1,2/3 to train, 3/3 to test",
    )
    add("--samples-per-shard", type=int, default=10_000, metavar="N")
    add("--layout", choices=("train", "clip_benchmark"), default="train")
    add(
        "--split",
        default="test",
        help="name of the split's folder in clip_benchmark's layout (default: test)",
    )
    add(
        "--template",
        default=[],
        action="append",
        metavar="TEXT",
        help="prompt with {} for the class (clip_benchmark)",
    )
    add(
        "--on-missing",
        choices=("fail", "skip"),
        default="fail",
        help="rows without a usable image, images without a text, class folders without an image: refuse, or leave out",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace a folder that holds earlier output of this tool",
    )


def run(args: argparse.Namespace) -> int:
    """Pack; returns 1 after naming everything unusable, having written nothing. Raises ValueError,
    OSError.
    """
    from vlp.locks import held

    target = Path(args.to)
    advice = "Wait until it is done, or name another folder with --to"
    with held(target, beside=True, advice=advice):
        return _pack(args, target)


def _pack(args: argparse.Namespace, target: Path) -> int:
    from vlp.data.archives import Archive
    from vlp.data.listing import settle
    from vlp.data.trees import read_tree

    _check_target(target, args.overwrite)
    _check_options(args)
    archive = Archive(args.source, args.split_folder, leave=args.links == "follow")
    listing = _table(args) if args.captions else None
    tree = None if listing else read_tree(archive, args.lines)
    contents = listing or tree
    assert contents is not None  # a tree where there is no table
    items, classes = contents.items, contents.classes
    if args.part:
        items = [
            item for item in items if _in_part(str(item.meta.get("origin", item.image)), args.part)
        ]
    if not items:
        raise ValueError(
            f"no row of {args.captions or args.source} is left to pack; check --where and --part"
        )

    named, left_out = _sort_out(items, archive, listing)
    named, left_out["whose names contradict each other"] = settle(named, archive)
    named, left_out["whose image cannot be used"] = _without_unreadable(named, archive)
    left_out["images or folders that cannot be used"] = tree.problems if tree else []
    problems = list(chain.from_iterable(left_out.values()))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and args.on_missing == "fail":
        kind = "images or folders" if tree else "rows"
        advice = "nothing was written. --on-missing skip leaves them out"
        print(f"{len(problems)} {kind} cannot be packed; {advice}", file=sys.stderr)
        if not named and not tree:
            question = f"is {archive.path} the right folder? It holds {_some(archive.names)}"
            print(f"none of them has its image; {question}", file=sys.stderr)
        return 1
    if not named:
        raise ValueError(
            f"no usable image is left to pack; is {archive.path} the right folder? It holds {_some(archive.names)}"
        )

    with _replaced(target, args.overwrite) as partial:
        n_shards = _write(named, archive, classes, args, partial)
    n_captions = sum(len(item.captions) for item, _ in named)
    print(
        f"{target}: {len(named)} images with {n_captions} captions and {len(classes)} classes in {n_shards} shards"
    )
    reasons = [f"{len(lines)} {reason}" for reason, lines in left_out.items() if lines]
    _say_rest(args, archive, tree, named, reasons, classes)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that choose from a table where none is named: they would be ignored."""
    of_tables = (
        "image_column",
        "caption_column",
        "class_column",
        "where",
        "only",
        "separator",
        "encoding",
    )
    useless = [f"--{name.replace('_', '-')}" for name in of_tables if getattr(args, name)]
    useless += [f"--{name}" for name in ("header", "quoting") if getattr(args, name) != "auto"]
    if useless and not args.captions:
        raise ValueError(f"{', '.join(useless)} choose from a table; name it with --captions TABLE")


def _say_rest(
    args: argparse.Namespace,
    archive: Archive,
    tree: Tree | None,
    named: list[Named],
    reasons: list[str],
    classes: list[str],
) -> None:
    """Print what was decided about the folder, and what of it is not in the shards."""
    for note in tree.notes if tree else []:
        print(f"note: {note}")
    emptied = sorted(set(classes) - {item.class_name for item, _ in named})
    if emptied:
        print(f"note: no image of {len(emptied)} classes is in this output, such as {emptied[0]!r}")
    if archive.outside:
        links = ", ".join(
            f"{name} -> {target}" for name, target in list(archive.outside.items())[:3]
        )
        more = ", …" if len(archive.outside) > 3 else ""
        print(
            f"note: {len(archive.outside)} links lead out of {args.source} and were followed ({links}{more}); "
            "--links inside leaves them out"
        )
    left_out = reasons + ([str(archive.left_out)] if archive.left_out.counts else [])
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    unused = len(archive.names) - len({name for _, name in named})
    if unused:
        reason = (
            "--part or --on-missing left them out"
            if tree
            else "no row names them, or an option left them out"
        )
        print(f"{unused} images in {args.source} were not packed ({reason})")


def _some(names: list[str]) -> str:
    return f"{len(names)} images, such as {names[0]}" if names else "no image"


def _in_part(name: str, part: str) -> bool:
    """Whether a name belongs to the parts "K,…/N": the same split of a set in every call and on
    every machine.
    """
    chosen, _, total = part.partition("/")
    numbers = chosen.split(",")
    if not (
        total.isdecimal() and all(k.isdecimal() and 1 <= int(k) <= int(total) for k in numbers)
    ):
        raise ValueError(
            f"--part {part!r} is not of the form K/N with 1 <= K <= N, such as 3/3 or 1,2/3"
        )
    return str(zlib.crc32(name.encode("utf-8", "surrogateescape")) % int(total) + 1) in numbers


def _without_unreadable(named: list[Named], archive: Archive) -> tuple[list[Named], list[str]]:
    """The items whose picture decodes, and a line for each that does not."""
    from concurrent.futures import ThreadPoolExecutor

    from vlp.data.picture import array

    def complaint(one: Named) -> str:
        try:
            # Of a JPEG every byte is read all the same, in a third of the time.
            array(archive.read(one[1]), shrink=8)
        except (ValueError, OSError) as error:
            return f"image {one[1]!r} cannot be used: {error}"
        return ""

    usable, problems = [], []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for chunk in _progress(
            [named[i : i + _CHUNK] for i in range(0, len(named), _CHUNK)], "checked", _CHUNK
        ):
            for one, problem in zip(chunk, threads.map(complaint, chunk)):
                if problem:
                    problems.append(problem)
                else:
                    usable.append(one)
    return usable, problems


@contextmanager
def _replaced(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into that becomes `target`, in place of an earlier one, when the block ends
    without an error.
    """
    from vlp.files import sync

    # Named by process, so that two calls do not write into one folder. What killed calls left
    # behind is removed.
    prefix = f".{target.name}.{socket.gethostname()}."
    for leftover in target.parent.glob(f"{prefix}*.partial"):
        if not _is_alive(leftover.name.removeprefix(prefix).removesuffix(".partial")):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = target.with_name(f"{prefix}{os.getpid()}.partial")
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists() and not target.exists():
        previous.rename(target)  # a call was killed between its two renames
    try:
        yield partial
        sync(partial)
        _check_target(target, overwrite)  # again: another call may have finished meanwhile
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        partial.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        if previous.exists() and not target.exists():
            previous.rename(target)
        shutil.rmtree(partial, ignore_errors=True)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; --to names a new folder")
    held = [path for path in target.rglob("*") if not path.is_dir()]
    if held and not overwrite:
        raise FileExistsError(
            f"{target} is not empty; choose another folder, or --overwrite to replace it"
        )
    ours = {".tar", ".txt", ".json", ".bin"}
    foreign = [
        path for path in held if path.suffix not in ours or not any(target.rglob("*_stats.json"))
    ]
    if foreign:
        raise FileExistsError(
            f"{target} holds files that no pack wrote, such as {foreign[0].name}; choose another folder"
        )


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
        image_column=args.image_column,
        caption_columns=args.caption_column,
        class_column=args.class_column,
        where=where,
        only=args.only,
        separator=args.separator,
        encoding=args.encoding,
        quoting=args.quoting,
        header={"yes": True, "no": False}.get(args.header),
    )
    listing = items(args.captions, options)
    print(f"{args.captions}: {listing}")
    for note in listing.notes:
        print(f"note: {note}")
    return listing


def _sort_out(
    items: list, archive: Archive, listing: Listing | None
) -> tuple[list[Named], dict[str, list[str]]]:
    """The items with the names of their images, and by reason a line for each row that cannot be
    packed.
    """
    named, unreadable, missing, silent = [], list(listing.problems if listing else []), [], []
    for item in items:
        place = f"{listing.place(item)}: " if listing else ""
        name = archive.find(item.image)
        if name is None:
            missing.append(f"{place}image {item.image!r} {archive.why_not(item.image)}")
        elif listing and not item.captions and item.class_name is None:
            silent.append(f"{place}image {item.image!r} has neither caption nor class")
        else:
            named.append((item, name))
    reasons = {
        "rows that cannot be read": unreadable,
        "without their image": missing,
        "with neither caption nor class": silent,
    }
    return named, reasons


def _write(
    named: list[Named], archive: Archive, classes: list[str], args: argparse.Namespace, folder: Path
) -> int:
    from vlp.data.archives import image_type
    from vlp.data.format import ShardWriter
    from vlp.data.listing import families

    benchmark = args.layout == "clip_benchmark"
    retrieval = benchmark and not classes
    inner = folder / args.split if benchmark else folder
    number = {name: i for i, name in enumerate(classes)}
    with ShardWriter(
        inner, args.samples_per_shard, shard_name="{}" if benchmark else "{:05d}"
    ) as writer:
        for family in _progress(families(named), "packed"):
            writer.make_room(len(family))
            for item, name in family:
                # clip_benchmark reads a retrieval caption a line; a training .txt holds one
                # caption.
                txt = (
                    "\n".join(" ".join(text.split()) for text in item.captions)
                    if retrieval
                    else None
                )
                cls = number.get(item.class_name, item.meta.get("cls"))
                cls = cls if type(cls) is int and cls >= 0 else None
                try:
                    writer.add(
                        None,
                        archive.read(name),
                        image_type(name),
                        item.captions,
                        item.meta,
                        cls,
                        txt=txt,
                    )
                except ValueError as error:
                    raise ValueError(f"{item.image}: {error}") from None
    extra = {"classnames.txt": classes}
    if benchmark:
        (inner / "nshards.txt").write_text(f"{len(writer.paths)}\n")
        extra["zeroshot_classification_templates.txt"] = [
            template.replace("{}", "{c}") for template in args.template
        ]
        extra["dataset_type.txt"] = ["retrieval"] if retrieval else []
    for name, lines in extra.items():
        if lines:
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(writer.paths)


def _progress(things: list, done: str, size: int = 1) -> Iterator:
    """The things, with a line on a terminal that says how far, how fast and how long still. Each is
    `size` images.
    """
    started = shown = time.monotonic()
    for i, thing in enumerate(things, 1):
        yield thing
        now = time.monotonic()
        if sys.stderr.isatty() and (now - shown > 0.2 or i == len(things)):
            shown = now
            rate = i / (now - started)
            end = "\n" if i == len(things) else ""
            position = f"{i * size} of {len(things) * size} images {done}"
            line = f"\r{position}, {rate * size:.0f}/s, {(len(things) - i) / rate:.0f} s left "
            print(line, end=end, file=sys.stderr, flush=True)
