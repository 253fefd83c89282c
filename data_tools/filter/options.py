"""The options of `vlp data filter`."""

from __future__ import annotations

import argparse

from vlp.data_tools import _encoder
from vlp.data_tools._run import work


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data filter`."""
    add = parser.add_argument
    add("source", help="shards: a folder, a tar, or a pattern with braces; several joined by ::")
    add(
        "--to",
        required=True,
        metavar="DIR",
        help="folder for the new shards; the same call goes on where one stopped",
    )

    # Rules about the picture.
    add("--min-side", type=int, default=0, metavar="PX", help="least length of the shorter side")
    add(
        "--max-aspect",
        type=float,
        default=0.0,
        metavar="R",
        help="most length of the longer side, in shorter ones",
    )

    # Rules about the sample's JSON.
    add(
        "--keep",
        action="append",
        default=[],
        metavar="RULE",
        help="keep what fulfils it: 'FIELD < NUMBER' (<= > >=), 'FIELD == VALUE' (!=), "
        "'FIELD in A,B', 'FIELD present' (absent), FIELD being one of the sample's JSON; "
        "a sample without that value is dropped; may be repeated",
    )
    add(
        "--drop",
        action="append",
        default=[],
        metavar="RULE",
        help="drop what fulfils it; a sample without that value stays; may be repeated",
    )
    add(
        "--uids",
        metavar="FILE",
        help="keep only these: .npy of DataComp (pairs of 64-bit halves), "
        ".txt with a uid or key a line",
    )

    # Rules about captions.
    add("--min-words", type=int, default=0, metavar="N", help="fewest words of a caption")
    add("--max-words", type=int, default=0, metavar="N", help="most words of a caption")
    add(
        "--match",
        default="",
        metavar="REGEX",
        help="what a caption must hold, with Python's syntax, searched anywhere",
    )
    add("--reject", default="", metavar="REGEX", help="what no caption may hold")
    add(
        "--max-repeats",
        type=int,
        default=0,
        metavar="N",
        help="most samples with one caption; takes 32 bytes a caption of memory",
    )

    # What a caption is like, by rough guesses.
    add(
        "--languages",
        default="",
        metavar="CODES",
        help="such as en,de; guessed by script and stop words, which is rough",
    )
    add(
        "--unclear",
        choices=("keep", "drop"),
        default="keep",
        help="captions whose language cannot be told, such as names and numbers "
        "(default: %(default)s)",
    )
    add(
        "--min-relations",
        type=int,
        default=0,
        metavar="N",
        help="fewest relations of things in a caption (DiHT's complexity)",
    )
    add("--action", action="store_true", help="a caption must say that something happens (DiHT)")

    # A model's score.
    add(
        "--min-score",
        type=float,
        metavar="X",
        help="least cosine of picture and caption under --model",
    )
    _encoder.arguments(parser)
    work.arguments(parser)
