"""MMVP-VLM (Tong et al. 2024): pairs of look-alike pictures, two statements, nine visual patterns.

Published: Questions.csv (`Question ID, Type, Statement`; two rows a pair) and the pictures as
`MLLM_VLM Images/TYPE/ID.jpg`. Each statement, said as "a photo of …", must choose its own picture
of the two; a pair counts if both do (chance 1/4). Reported are every pattern and their mean.

Source: tsb0601/MMVP@7635005, `scripts/evaluate_vlm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp.eval import choices, grids
from vlp.eval.datasets.tables import read_rows
from vlp.eval.embed import Context
from vlp.eval.grids import GridSet, matched
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 let a pattern called mean write over that score
KNOWN_AS = "image_caption_selection"
MAIN = "mean"
COLUMNS = ("Question ID", "Type", "Statement")


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published files are."""

    data: str  # the folder with Questions.csv
    images: str | None = None  # None: "MLLM_VLM Images" beside it


def read(options: Options) -> GridSet:
    """The pairs whose two pictures are there."""
    folder = Path(options.data)
    path = folder / "Questions.csv"
    if not path.is_file():
        raise DataError(f"no questions at {path}; give the folder of the published set")
    rows = read_rows(path, COLUMNS[1:])
    choices.need_keys(rows, COLUMNS, path)
    if len(rows) % 2:
        raise DataError(f"{path} has {len(rows)} statements; expected two a pair")

    pairs = [_pair(rows[i], rows[i + 1]) for i in range(0, len(rows), 2)]
    images = options.images or folder / "MLLM_VLM Images"
    kept, absent = choices.with_pictures(pairs, ["image_1", "image_2"], images, options.missing)
    items = [matched(pictures, row["texts"], row["type"]) for row, pictures in kept]
    return GridSet(items, absent)


def _pair(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two rows as one pair. Both pictures lie in the folder of the first one's pattern."""
    kind = first["Type"]
    return {
        "image_1": f"{kind}/{first['Question ID']}.jpg",
        "image_2": f"{kind}/{second['Question ID']}.jpg",
        "texts": [f"a photo of {row['Statement']}" for row in (first, second)],
        "type": kind,
    }


def run(encoder: Encoder, data: GridSet, options: Options, context: Context) -> TaskResult:
    """The share of pairs whose statements both choose their picture, by pattern."""
    return grids.run(
        "mmvp_vlm", encoder, data, context, scores=["image_acc"], of_groups="image_acc"
    )
