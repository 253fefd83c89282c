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

from vlp.eval import choices
from vlp.eval.choices import CaptionChoice, ChoiceSet
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
MAIN = "mean"
ACCEPTED = 2  # of three annotators


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published files and the images are."""

    data: str  # folder of .json files


def read(options: Options) -> ChoiceSet:
    """The accepted items of every piece whose images are there."""
    files = sorted(Path(options.data).glob("*.json"))
    if not files:
        raise DataError(
            f"no .json files in {options.data}; give the data folder of VALSE's repository"
        )

    # The file's name is the piece: no item says it.
    rows = []
    for file in files:
        items = choices.read_items(file, ("image_file", "caption", "foil", "mturk"))
        rows += [{**item, "piece": file.stem} for item in items]

    # Where annotators did not choose the caption, the foil may be true as well.
    accepted = [row for row in rows if row["mturk"]["caption"] >= ACCEPTED]
    images = options.images or options.data
    kept_rows, absent = choices.with_pictures(accepted, ["image_file"], images, options.missing)
    return ChoiceSet(
        [
            CaptionChoice(picture, [row["caption"], row["foil"]], row["piece"])
            for row, (picture,) in kept_rows
        ],
        absent,
        {"rejected_by_annotators": len(rows) - len(accepted)},
    )


def scores(options: Options) -> list[str]:
    """The accuracy of each piece, and their mean."""
    return [*sorted(set(read(options).groups)), "mean"]


def run(encoder: Encoder, data: ChoiceSet, options: Options, context: Context) -> TaskResult:
    """The accuracy of every piece, and their mean."""
    return choices.run_grouped("valse", encoder, data, context)
