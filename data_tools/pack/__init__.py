"""`vlp data pack`: images with captions or classes into shards, for training or in clip_benchmark's
layout.

SOURCE is a folder or a tar: images with a caption table, images with a .txt, .json or .caption
beside each (img2dataset's `files`), img2dataset's parquet files with the images in them, or one
sub-folder a class. Every image is decoded once before anything is written; the output appears at
its place only when it is whole. A call that was killed goes on when it is repeated. The samples of
one "origin" stay together, in one shard and one part.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.data_tools._run import work
from vlp.data_tools.pack.items import complete, items_in_part, read_table, sort_out
from vlp.data_tools.pack.options import arguments as arguments
from vlp.data_tools.pack.options import check_options, check_source
from vlp.data_tools.pack.pictures import Pictures, loss_of
from vlp.data_tools.pack.target import check_target, drafted, tidy

if TYPE_CHECKING:
    from vlp.data.archives import Archive
    from vlp.data.listing import Named
    from vlp.data.tables import Item as Item
    from vlp.data.tables import Listing as Listing
    from vlp.data.trees import Tree
    from vlp.data_tools.pack.send import Copied

HELP = "pack images with captions or classes into shards"
EXAMPLE = """vlp data pack photos/ --captions photos/captions.csv --to data/train
  vlp data pack laion/ --to data/train      (laion/00000/000000001.jpg with .txt or .json beside it)
  vlp data pack imagenet/train --to data/imagenet
  vlp data pack imagenet.tar --split-folder val --to data/imagenet_val
  vlp data pack photos/ --to data/small --max-side 512 --format webp --quality 85
  vlp data pack 101_ObjectCategories --part 1,2/3 --to data/train  (and --part 3/3 for the test set)
  vlp data pack caltech101.tar --captions caltech101.jsonl --where split=test \\
      --to data/caltech101 --layout clip_benchmark --template "a photo of a {}."
  vlp data pack photos/ --to data/small --max-side 512 --ray head:6379
"""


def run(args: argparse.Namespace) -> int:
    """Pack; returns 1 after naming everything unusable, having written nothing. Raises ValueError,
    OSError.
    """
    from vlp.data.stores import is_address

    # Before anything is fetched.
    check_options(args)
    Pictures.of(args)

    places = (args.source, args.to, args.captions or "")
    if any(is_address(place) for place in places):
        from vlp.data_tools.pack.send import packed

        return packed(args, _locked)
    target = Path(args.to)
    return _locked(args, target, target)


def _locked(
    args: argparse.Namespace, target: Path, name: Path, copied: Copied | None = None
) -> int:
    """Pack while nobody else writes there. `target`: is called `name` in what is said. `copied`:
    what of a source in a store lies here.
    """
    from vlp.data.stored import StoredPath
    from vlp.data_tools._run.writers import writing
    from vlp.locks import held

    advice = "Wait until it is done, or name another folder with --to"
    if isinstance(target, StoredPath):
        with writing(target, advice=advice, part=(1, 1)):
            return _pack(args, target, name, copied)
    with held(target, beside=True, advice=advice):
        return _pack(args, target, name, copied)


def _pack(args: argparse.Namespace, target: Path, name: Path, copied: Copied | None) -> int:
    """What `_locked` does, once it holds the target."""
    from vlp.data import stored
    from vlp.data.archives import Archive
    from vlp.data.listing import settle
    from vlp.data.tables import fetched
    from vlp.data.trees import read_tree, refuse_without_images
    from vlp.data_tools.pack import chunks
    from vlp.data_tools.pack.write import plan_of, write_shards

    tidy(target)
    check_target(target, args.overwrite)
    check_source(stored.source(args.source))
    pictures = Pictures.of(args)
    pool = work.undivided(args)

    texts = copied.texts if copied else None
    follow = args.links == "follow"
    archive = Archive(args.source, args.split_folder, follow, texts, in_rows=True)
    refuse_without_images(archive)
    inputs = chunks.Inputs(archive)
    if copied:
        inputs = chunks.Inputs(archive, copied.address, copied.pictures)
    if not args.captions and not archive.has_texts:
        # What img2dataset fetched without writing texts is told of by its own tables.
        args.captions = str(archive.path) if fetched.files_in(archive.path) else None
    listing = read_table(args) if args.captions else None
    tree = None if listing else read_tree(archive, args.lines)
    if tree:
        complete(tree, archive)
    contents = listing or tree
    assert contents is not None  # a tree where there is no table
    classes = contents.classes
    items = items_in_part(contents.items, args)

    named, left_out = sort_out(items, archive, listing)
    named, left_out["whose names contradict each other"] = settle(named, archive)
    left_out["images or folders that cannot be used"] = tree.problems if tree else []

    plan = plan_of(named, inputs, classes, args, pictures)
    try:
        with drafted(target, args.overwrite, plan) as draft:
            # Every picture is decoded before anything is written: a pack is whole, or not there.
            named, unusable = chunks.usable(named, inputs, pictures, draft.made, pool)
            left_out["whose image cannot be used"] = unusable
            _refuse(left_out, named, archive, bool(tree), args)
            shards = write_shards(named, inputs, classes, args, draft, pictures, pool)
    except _Refused:
        return 1

    n_captions = sum(len(item.captions) for item, _ in named)
    print(
        f"{name}: {len(named)} images with {n_captions} captions "
        f"and {len(classes)} classes in {shards.n} shards"
    )
    for line in loss_of(shards.totals, len(named)):
        print(line)
    reasons = [f"{len(lines)} {reason}" for reason, lines in left_out.items() if lines]
    _say_rest(args, archive, tree, named, reasons, classes)
    return 0


class _Refused(ValueError):
    """The input is not packed, and the user knows why."""


def _refuse(
    left_out: dict[str, list[str]],
    named: list[Named],
    archive: Archive,
    is_tree: bool,
    args: argparse.Namespace,
) -> None:
    """Name everything unusable; raises _Refused unless it may be left out, ValueError where nothing
    else is there.
    """
    problems = list(chain.from_iterable(left_out.values()))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and args.on_missing == "fail":
        _say_refused(len(problems), archive, is_tree, bool(named))
        raise _Refused
    if not named:
        raise ValueError(
            f"no usable image is left to pack; is {archive.path} the right folder? "
            f"It holds {_some(archive.names)}"
        )


def _say_refused(n_problems: int, archive: Archive, is_tree: bool, any_named: bool) -> None:
    """Say on stderr why nothing is written."""
    kind = "images or folders" if is_tree else "rows"
    advice = "nothing was written. --on-missing skip leaves them out"
    if is_tree and archive.left_out.counts:
        print(f"not read: {archive.left_out}", file=sys.stderr)
    print(f"{n_problems} {kind} cannot be packed; {advice}", file=sys.stderr)

    # A table beside the wrong folder fails in every row; one line says so.
    if not any_named and not is_tree:
        question = f"is {archive.path} the right folder? It holds {_some(archive.names)}"
        print(f"none of them has its image; {question}", file=sys.stderr)


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

    # Class numbers count all classes, so that parts of one set agree.
    emptied = sorted(set(classes) - {item.class_name for item, _ in named})
    if emptied:
        print(f"note: no image of {len(emptied)} classes is in this output, such as {emptied[0]!r}")

    # Links may lead to what was not meant to be packed.
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

    # Images that no row names: half of a folder, where the table is of another set.
    n_unused = len(archive.names) - len({name for _, name in named})
    if n_unused:
        if tree:
            reason = "--part or --on-missing left them out"
        else:
            reason = "no row names them, or an option left them out"
        print(f"{n_unused} images in {args.source} were not packed ({reason})")


def _some(names: list[str]) -> str:
    return f"{len(names)} images, such as {names[0]}"
