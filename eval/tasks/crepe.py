"""CREPE (Ma et al. 2023): a region's caption among its hard negatives, by their kind.

Published .csv files of Visual Genome regions with `image_id, x, y, width, height, caption` and the
negatives as a list in text: productivity's `hard_negs` (a file for each kind and complexity, such
as swap/prod_vg_hard_negs_swap_complexity_4.csv), systematicity's `valid_hard_negs_atom`, `_comp`
and `_combined`. Each picture is cut to its region and must choose the caption: R@1. Reported is
every file, or column of a file, and their mean.

Source: RAIVNLab/CREPE@1fa81c4, `crepe_eval_utils.py`, `crepe_params.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp.data.tables.values import texts as texts_in
from vlp.eval import choices
from vlp.eval.choices import CaptionChoice, ChoiceSet
from vlp.eval.datasets.tables import read_rows
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 took files of one name for one group
KNOWN_AS = "image_caption_selection"
MAIN = "mean"
NEGATIVES = (
    "hard_negs", "valid_hard_negs_atom", "valid_hard_negs_comp", "valid_hard_negs_combined",
)  # fmt: skip
BOX = ("x", "y", "width", "height")


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published files and the images (Visual Genome) are."""

    data: str  # one .csv file, or a folder with some at any depth


def read(options: Options) -> ChoiceSet:
    """Every region with its negatives, once for each column of them."""
    root = Path(options.data)
    files = sorted(root.rglob("*_hard_negs_*.csv")) if root.is_dir() else [root]
    if not files or not files[0].is_file():
        raise DataError(f"no *_hard_negs_*.csv at {root}; unzip the published files there")

    rows: list[dict[str, Any]] = []
    for file in files:
        rows += _rows(file)
    _name_groups(rows, root if root.is_dir() else root.parent)
    images = options.images or (root if root.is_dir() else root.parent)
    kept, absent = choices.with_pictures(rows, ["image"], images, options.missing)
    items = []
    for row, (picture,) in kept:
        items.append(CaptionChoice(choices.cut(picture, row, BOX), row["texts"], row["group"]))
    return ChoiceSet(items, absent)


def _rows(file: Path) -> list[dict[str, Any]]:
    """The regions of a file, once for each column of negatives that is there."""
    table = read_rows(file, ("caption", *NEGATIVES))
    choices.need_keys(table, ("image_id", "caption", *BOX), file)
    columns = [name for name in NEGATIVES if table and name in table[0]]
    if not columns:
        raise DataError(f"{file} has no column of negatives: {', '.join(NEGATIVES)}")

    rows = []
    for name in columns:
        kind = name.removeprefix("valid_hard_negs_")
        group = file.stem if len(columns) == 1 else f"{file.stem}_{kind}"
        common = {"group": group, "from": (file, name)}
        for row in table:
            negatives = texts_in(row[name])
            if negatives:
                texts = [row["caption"], *negatives]
                rows.append(row | {"image": f"{row['image_id']}.jpg", "texts": texts} | common)
    return rows


def _name_groups(rows: list[dict[str, Any]], root: Path) -> None:
    """Let files of one name, or columns that come to one, be groups of their own by their paths."""
    origins = dict.fromkeys((row["group"], row["from"]) for row in rows)
    n_origins = Counter(group for group, _ in origins)
    for row in rows:
        if n_origins[row["group"]] > 1:
            file, column = row["from"]
            row["group"] = f"{file.relative_to(root).with_suffix('').as_posix()}:{column}"


def run(encoder: Encoder, data: ChoiceSet, options: Options, context: Context) -> TaskResult:
    """The share of regions that choose their caption, by file, and their mean."""
    return choices.run_grouped("crepe", encoder, data, context)
