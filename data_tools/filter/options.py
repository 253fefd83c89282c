"""The options of `vlp data filter`."""

from __future__ import annotations

import argparse

from vlp.data_tools import _encoder
from vlp.data_tools._run import work
from vlp.data_tools.filter.languages import LEAST_PROBABLE, ROUGH


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data filter`."""
    add = parser.add_argument
    work.shards_arguments(parser)

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

    # What a caption is like.
    add("--languages", default="", metavar="CODES", help="of captions, such as en,de")
    add(
        "--language-model",
        default=ROUGH,
        metavar="NAME",
        help="what tells them: rough (script and stop words), py3langid, or FILE.bin of fastText "
        "(default: %(default)s)",
    )
    add(
        "--min-probability",
        type=float,
        metavar="P",
        help=f"below it a language counts as unclear (default: {LEAST_PROBABLE}; the rough guess "
        "has none)",
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

    _ocr_arguments(parser)
    _score_arguments(parser)
    work.arguments(parser)


def _ocr_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of text in pictures."""
    add = parser.add_argument_group("text in the picture").add_argument
    add(
        "--ocr",
        metavar="READER",
        help="what reads it: rapidocr, transformers:MODEL, package.module:function of your own, "
        "or field:NAME of texts that an earlier call kept",
    )
    add(
        "--max-overlap",
        type=float,
        metavar="SHARE",
        help="drop captions of which a larger share of words stands in the picture",
    )
    add(
        "--ocr-field",
        default="",
        metavar="NAME",
        help="field of the JSON for the texts (default: they are not kept)",
    )


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of scores, by which samples are compared."""
    add = parser.add_argument_group("scores").add_argument
    add(
        "--top",
        action="append",
        default=[],
        metavar="FIELD=SHARE",
        help="keep the share of all samples (0.3 or 30%%) with the highest numbers in a field, "
        "those that equal the last one too; clip_scores: of --model; may be repeated",
    )
    add(
        "--embeddings",
        metavar="DIR",
        help="what `vlp data embed` wrote for SOURCE, for --head",
    )
    add(
        "--head",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="score each picture's embedding by a head (.safetensors, .pth or .onnx; several "
        "layers: FILE,relu or FILE,linear) and put it into the JSON as NAME, for --keep, --drop "
        "and --top; NAME=cosine: the cosine with the first caption; may be repeated",
    )
    add(
        "--like",
        metavar="DIR",
        help="keep pictures in cells that pictures of another set lie in: what `vlp data embed` "
        "wrote for that set (DataComp's image-based filter); with --embeddings and --cells",
    )
    add("--cells", type=int, metavar="K", help="cells that SOURCE's pictures are clustered into")
    add("--seed", type=int, default=0, metavar="S", help="of the cells (default: %(default)s)")
    add(
        "--min-score",
        type=float,
        metavar="X",
        help="least cosine of picture and caption under --model",
    )
    _encoder.arguments(parser)
