"""VALSE (Parcalabescu et al. 2022): a caption against a foil, for linguistic phenomena from
existence to coreference.

Published files: one .json a piece (existence, plurals, counting-*, relations, action-replacement,
actant-swap, coreference-*, foil-it), images of several data sets together in one folder. Pairwise:
the caption strictly above the foil, over items that at least two of three annotators accepted
(`mturk.caption` ≥ 2). Reported are every piece and their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlp.eval import choices, grids
from vlp.eval.embed import Context
from vlp.eval.grids import GridSet, matched
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 tied what a nearly collapsed model tells apart
KNOWN_AS = "image_caption_selection"
MAIN = "mean"
ACCEPTED = 2  # of three annotators


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published files and the images are."""

    data: str  # folder of .json files


def read(options: Options) -> GridSet:
    """The accepted items of every piece whose images are there."""
    files = sorted(Path(options.data).glob("*.json"))
    if not files:
        raise DataError(
            f"no .json files in {options.data}; give the data folder of VALSE's repository"
        )

    # The file's name is the piece: no item says it.
    rows = []
    for file in files:
        of_piece = choices.read_items(file, ("image_file", "caption", "foil", "mturk"))
        rows += [{**item, "piece": file.stem} for item in of_piece]

    # Where annotators did not choose the caption, the foil may be true as well.
    accepted = [row for row in rows if row["mturk"]["caption"] >= ACCEPTED]
    images = options.images or options.data
    kept, absent = choices.with_pictures(accepted, ["image_file"], images, options.missing)
    items = [
        matched(pictures, [row["caption"], row["foil"]], row["piece"]) for row, pictures in kept
    ]
    return GridSet(items, absent, counts={"rejected_by_annotators": len(rows) - len(accepted)})


def run(encoder: Encoder, data: GridSet, options: Options, context: Context) -> TaskResult:
    """The accuracy of every piece, and their mean."""
    result = grids.run("valse", encoder, data, context, scores=())

    # Over the same parts as in earlier results, which so remain comparable.
    pictures = [grid.pictures[0] for grid in data.grids]
    captions = [list(grid.texts) for grid in data.grids]
    result.digest = context.digest(pictures, captions, [grid.group for grid in data.grids])
    return result
