"""Every global batch from one cell of what earlier stages see alike (MCL, arXiv 2402.11816):
`vlp.data.cells`.

    selection: {mcl: {labels: [cells/1.safetensors, cells/2.safetensors]}}

trains the third stage. `vlp data cells RUN --to FILE` makes a stage's labels, K-means (K = 10) of
its image features; `vlp export STAGE STAGE … --to DIR` joins the stages into one model whose
embedding is their concatenation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from vlp.config import Config
from vlp.data.cells import Cells
from vlp.selection import Selection


@dataclass(frozen=True)
class Options:
    """Keys of `selection: {mcl: …}`."""

    labels: list[
        str
    ]  # files of `vlp data cells`, one for each earlier stage; cells are their combinations
    small: Literal["error", "merge"] = (
        "error"  # cells smaller than train.batch: refuse them, or pool them
    )

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError(
                "labels is empty; name a file of `vlp data cells` for each earlier stage"
            )


def open(options: Options, config: Config, *_: Any) -> Selection:
    """The order of `vlp.data.cells`; nothing is chosen after loading."""
    return Selection(
        config.train.batch,
        partial(Cells, labels=options.labels, batch=config.train.batch, small=options.small),
    )
