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
from typing import Any, Literal

from vlp.eval import choices, embed
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
ACCEPTED = 2  # of three annotators


@dataclass(frozen=True)
class Options:
    """Where the published files and the images are."""

    data: str  # folder of .json files
    images: str | None = None  # a folder or a .tar; None: beside them
    missing: Literal["error", "skip"] = "error"  # items without their image


@dataclass
class Data:
    """Items with `piece, caption, foil, picture`."""

    rows: list[dict[str, Any]]
    skipped: list[str]
    n_rejected: int


def read(options: Options) -> Data:
    files = sorted(Path(options.data).glob("*.json"))
    if not files:
        raise DataError(
            f"no .json files in {options.data}; give the data folder of VALSE's repository"
        )
    rows = []
    for file in files:
        items = choices.entries(file)
        choices.need_keys(items, ("image_file", "caption", "foil", "mturk"), file)
        rows += [{**row, "piece": file.stem} for row in items]
    accepted = [row for row in rows if row["mturk"]["caption"] >= ACCEPTED]
    images = Path(options.images or options.data)
    kept, absent = choices.attach(
        accepted, [row["image_file"] for row in accepted], images, options.missing
    )
    return Data(kept, absent, len(rows) - len(accepted))


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    pictures = [row["picture"] for row in data.rows]
    captions = [[row["caption"], row["foil"]] for row in data.rows]
    pieces = [row["piece"] for row in data.rows]
    hits = choices.first_is_best(choices.cosines(encoder, pictures, captions, context))
    items = {
        piece: choices.accuracy(hits[[i for i, own in enumerate(pieces) if own == piece]])
        for piece in dict.fromkeys(pieces)
    }
    items["mean"] = choices.macro(hits, pieces)
    return TaskResult(
        "valse",
        items=items,
        chance=dict.fromkeys(items, 0.5),
        counts={
            "items": len(hits),
            "rejected_by_annotators": data.n_rejected,
            "skipped": len(data.skipped),
        },
        digest=context.digest(pictures, captions, pieces),
    )
