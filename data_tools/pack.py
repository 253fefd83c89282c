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
    from vlp.data.tables import Item, Listing
    from vlp.data.trees import Tree

_CHUNK = 256  # images that are handed to the checking threads at once
HELP = "pack images with captions or classes into shards"
EXAMPLE = """vlp data pack photos/ --captions photos/captions.csv --to data/train
  vlp data pack laion/ --to data/train      (laion/00000/000000001.jpg with .txt or .json beside it)
  vlp data pack imagenet/train --to data/imagenet
  vlp data pack imagenet.tar --split-folder val --to data/imagenet_val
  vlp data pack 101_ObjectCategories --part 1,2/3 --to data/train  (and --part 3/3 for the test set)
  vlp data pack caltech101.tar --captions caltech101.jsonl --where split=test \\
      --to data/caltech101 --layout clip_benchmark --template "a photo of a {}."
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data pack`."""
    add = parser.add_argument
    add(
        "source",
        help="folder or tar of images: with texts beside them, one sub-folder a class, "
        "or named by --captions",
    )
    add("--to", required=True, metavar="DIR", help="the new folder")
    add(
        "--captions",
        metavar="TABLE",
        help=".csv, .tsv, .txt, .token, .jsonl, .json or .parquet: one row an image or a caption; "
        "COCO's, Karpathy's, LLaVA's JSON",
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
        help="only these of N parts, chosen by a hash of the image's name or origin: "
        "1,2/3 to train, 3/3 to test",
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
        help="rows without a usable image, images without a text, class folders without an image: "
        "refuse, or leave out",
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
    classes = contents.classes
    items = _items_in_part(contents.items, args)

    # Every picture is decoded before anything is written: a pack is whole, or it is not there.
    named, left_out = _sort_out(items, archive, listing)
    named, left_out["whose names contradict each other"] = settle(named, archive)
    named, left_out["whose image cannot be used"] = _without_unreadable(named, archive)
    left_out["images or folders that cannot be used"] = tree.problems if tree else []
    problems = list(chain.from_iterable(left_out.values()))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and args.on_missing == "fail":
        _say_refused(len(problems), archive, bool(tree), bool(named))
        return 1
    if not named:
        raise ValueError(
            f"no usable image is left to pack; is {archive.path} the right folder? "
            f"It holds {_some(archive.names)}"
        )

    with _replaced(target, args.overwrite) as partial:
        n_shards = _write(named, archive, classes, args, partial)

    n_captions = sum(len(item.captions) for item, _ in named)
    print(
        f"{target}: {len(named)} images with {n_captions} captions "
        f"and {len(classes)} classes in {n_shards} shards"
    )
    reasons = [f"{len(lines)} {reason}" for reason, lines in left_out.items() if lines]
    _say_rest(args, archive, tree, named, reasons, classes)
    return 0


def _items_in_part(items: list[Item], args: argparse.Namespace) -> list[Item]:
    """The items of the parts that --part names; raises ValueError where none is left."""
    if args.part:
        # By origin where there is one: a family split between parts would leak into the test set.
        origins = [str(item.meta.get("origin", item.image)) for item in items]
        items = [item for item, origin in zip(items, origins) if _in_part(origin, args.part)]
    if not items:
        raise ValueError(
            f"no row of {args.captions or args.source} is left to pack; check --where and --part"
        )
    return items


def _say_refused(n_problems: int, archive: Archive, is_tree: bool, any_named: bool) -> None:
    """Say on stderr why nothing is written."""
    kind = "images or folders" if is_tree else "rows"
    advice = "nothing was written. --on-missing skip leaves them out"
    print(f"{n_problems} {kind} cannot be packed; {advice}", file=sys.stderr)

    # A table beside the wrong folder fails in every row; one line says so.
    if not any_named and not is_tree:
        question = f"is {archive.path} the right folder? It holds {_some(archive.names)}"
        print(f"none of them has its image; {question}", file=sys.stderr)


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
        links = [f"{name} -> {target}" for name, target in archive.outside.items()]
        examples = ", ".join([*links[:3], "…"] if len(links) > 3 else links)
        print(
            f"note: {len(links)} links lead out of {args.source} and were followed ({examples}); "
            "--links inside leaves them out"
        )

    left_out = list(reasons)
    if archive.left_out.counts:
        left_out.append(str(archive.left_out))
    if left_out:
        print(f"left out: {', '.join(left_out)}")

    n_unused = len(archive.names) - len({name for _, name in named})
    if n_unused:
        if tree:
            reason = "--part or --on-missing left them out"
        else:
            reason = "no row names them, or an option left them out"
        print(f"{n_unused} images in {args.source} were not packed ({reason})")


def _some(names: list[str]) -> str:
    return f"{len(names)} images, such as {names[0]}" if names else "no image"


def _in_part(name: str, part: str) -> bool:
    """Whether a name belongs to the parts "K,…/N": the same split of a set in every call and on
    every machine.
    """
    chosen, _, total = part.partition("/")
    numbers = chosen.split(",")
    is_valid = total.isdecimal() and all(
        number.isdecimal() and 1 <= int(number) <= int(total) for number in numbers
    )
    if not is_valid:
        raise ValueError(
            f"--part {part!r} is not of the form K/N with 1 <= K <= N, such as 3/3 or 1,2/3"
        )

    # A checksum, because Python's hash of a text differs from process to process.
    checksum = zlib.crc32(name.encode("utf-8", "surrogateescape"))
    return str(checksum % int(total) + 1) in numbers


def _without_unreadable(named: list[Named], archive: Archive) -> tuple[list[Named], list[str]]:
    """The items whose picture decodes, and a line for each that does not."""
    from concurrent.futures import ThreadPoolExecutor

    from vlp.data.picture import array

    def problem_of(pair: Named) -> str:
        _, name = pair
        try:
            # Of a JPEG every byte is read all the same, in a third of the time.
            array(archive.read(name), shrink=8)
        except (ValueError, OSError) as error:
            return f"image {name!r} cannot be used: {error}"
        return ""

    # In chunks, so that the line of progress moves and threads do not run far ahead of it.
    chunks = [named[i : i + _CHUNK] for i in range(0, len(named), _CHUNK)]
    usable: list[Named] = []
    problems: list[str] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for chunk in _progress(chunks, "checked", _CHUNK):
            for pair, problem in zip(chunk, threads.map(problem_of, chunk)):
                if problem:
                    problems.append(problem)
                else:
                    usable.append(pair)
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

        # The earlier pack moves aside first, so that a kill between the renames loses neither.
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

    files = [path for path in target.rglob("*") if not path.is_dir()]
    if files and not overwrite:
        raise FileExistsError(
            f"{target} is not empty; choose another folder, or --overwrite to replace it"
        )

    # --overwrite deletes the folder, so it must look like one that a pack wrote.
    suffixes = {".tar", ".txt", ".json", ".bin"}
    is_pack = any(target.rglob("*_stats.json"))
    foreign = [path for path in files if not is_pack or path.suffix not in suffixes]
    if foreign:
        raise FileExistsError(
            f"{target} holds files that no pack wrote, such as {foreign[0].name}; "
            "choose another folder"
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
    items: list[Item], archive: Archive, listing: Listing | None
) -> tuple[list[Named], dict[str, list[str]]]:
    """The items with the names of their images, and by reason a line for each row that cannot be
    packed.
    """
    named: list[Named] = []
    unreadable = list(listing.problems) if listing else []
    missing: list[str] = []
    silent: list[str] = []
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

    is_benchmark = args.layout == "clip_benchmark"
    is_retrieval = is_benchmark and not classes
    inner = folder / args.split if is_benchmark else folder
    shard_name = "{}" if is_benchmark else "{:05d}"
    class_number = {name: i for i, name in enumerate(classes)}

    with ShardWriter(inner, args.samples_per_shard, shard_name=shard_name) as writer:
        for family in _progress(families(named), "packed"):
            writer.make_room(len(family))
            for item, name in family:
                txt = _caption_lines(item.captions) if is_retrieval else None
                cls = class_number.get(item.class_name, item.meta.get("cls"))
                if type(cls) is not int or cls < 0:
                    cls = None  # it stays in the JSON
                try:
                    image = archive.read(name)
                    writer.add(
                        None, image, image_type(name), item.captions, item.meta, cls, txt=txt
                    )
                except ValueError as error:
                    raise ValueError(f"{item.image}: {error}") from None

    texts = {"classnames.txt": classes}
    if is_benchmark:
        (inner / "nshards.txt").write_text(f"{len(writer.paths)}\n")
        # clip_benchmark formats its templates with c=…, everybody else's have empty braces.
        texts["zeroshot_classification_templates.txt"] = [
            template.replace("{}", "{c}") for template in args.template
        ]
        texts["dataset_type.txt"] = ["retrieval"] if is_retrieval else []
    for name, lines in texts.items():
        if lines:
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(writer.paths)


def _caption_lines(captions: tuple[str, ...]) -> str:
    """A caption a line, as clip_benchmark reads them; a training .txt holds one caption."""
    return "\n".join(" ".join(caption.split()) for caption in captions)


def _progress(things: list, verb: str, n_images: int = 1) -> Iterator:
    """The things, with a line on a terminal that says how far, how fast and how long still. Each is
    `n_images` images.
    """
    started = shown = time.monotonic()
    for i, thing in enumerate(things, 1):
        yield thing

        now = time.monotonic()
        is_last = i == len(things)
        if not sys.stderr.isatty() or not (is_last or now - shown > 0.2):
            continue
        shown = now
        rate = i / (now - started)
        left_s = (len(things) - i) / rate
        position = f"{i * n_images} of {len(things) * n_images} images {verb}"
        line = f"\r{position}, {rate * n_images:.0f}/s, {left_s:.0f} s left "
        print(line, end="\n" if is_last else "", file=sys.stderr, flush=True)
