"""The options of `vlp data pack`, and those of them that do not go together."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlp.data_tools._run import work
from vlp.data_tools.pack import pictures


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data pack`."""
    add = parser.add_argument
    add(
        "source",
        help="folder or tar of images, also of a store: with texts beside them, one sub-folder a "
        "class, or named by --captions",
    )
    add("--to", required=True, metavar="DIR", help="the new folder")

    # The table, where captions do not lie beside their images.
    add(
        "--captions",
        metavar="TABLE",
        help=".csv, .tsv, .txt, .token, .jsonl, .json or .parquet: one row an image or a caption; "
        "COCO's, Karpathy's, LLaVA's JSON; or the folder of img2dataset's .parquet files",
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
        # Which of its rows and images.
    )
    add(
        "--where",
        default=[],
        action="append",
        metavar="COLUMN=VALUE",
        help="only rows with this value; repeated for one column: with one of these",
    )
    add(
        "--rows",
        default="",
        metavar="A:B",
        help="only these rows of the table: :1000 the first thousand, 1000: all but them",
    )
    add(
        "--only",
        default="",
        metavar="LIST",
        help="only images that this file names, one a line (Flickr_8k.trainImages.txt)",
        # How a text table is written, where that cannot be told from its first lines.
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
        # A folder or tar without a table.
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
        # What is written.
    )
    add(
        "--part",
        metavar="K/N",
        help="only these of N parts, chosen by a hash of the image's name or origin: "
        "1,2/3 to train, 3/3 to test",
    )
    add("--samples-per-shard", type=int, default=10_000, metavar="N")
    pictures.arguments(parser)
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
        # What is unusable, or in the way.
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
    work.undivided_arguments(parser, "chunks of images, or shards,")


_TABLES = (".csv", ".tsv", ".txt", ".token", ".jsonl", ".json", ".parquet")


def is_table(name: str) -> bool:
    """Whether a file is called as tables are."""
    return name.lower().removesuffix(".gz").endswith(_TABLES)


def check_source(path: Path) -> None:
    """Refuse a table or a single picture in the place of the folder or tar of pictures."""
    from vlp.data.archives import image_type

    if not path.is_file():
        return
    if is_table(path.name):
        raise ValueError(
            f"{path} is a table; name the folder or tar of its images, and the table with "
            f"--captions: vlp data pack {path.parent} --captions {path} --to DIR"
        )
    if image_type(path.name):
        raise ValueError(
            f"{path} is one picture; name the folder that holds it: vlp data pack "
            f"{path.parent} --captions TABLE --to DIR, or without --captions where texts lie "
            "beside the pictures"
        )


def check_options(args: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing, and options that choose from a table where none is named:
    they would be ignored.
    """
    work.check_processes(args)
    if args.samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {args.samples_per_shard} must be at least 1")

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
