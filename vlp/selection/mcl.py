"""Multistage contrastive learning: every global batch from one cell of what was seen alike.

    selection: {mcl: {labels: [cells/1.safetensors, cells/2.safetensors]}}

trains the third stage. `vlp data cells RUN --to FILE` makes a stage's labels, K-means (K = 10) of
its image features; `vlp export STAGE STAGE … --to DIR` joins the stages into one model whose
embedding is their concatenation. The order of samples is that of `vlp.data.cells`.

Relations: without labels this is the plain order of samples; `jest` chooses after loading instead

Papers: MCL (arXiv 2402.11816)

Needs: the label files of earlier stages, made from the same data

Cost: nothing a step; one embedding of the whole data set and one training a stage

Use: where one model overlooks what does not tell most samples apart
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

    # files of `vlp data cells`, one for each earlier stage; cells are their combinations
    labels: list[str]
    # cells smaller than train.batch: refuse them, or pool them
    small: Literal["error", "merge"] = "error"

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError(
                "labels is empty; name a file of `vlp data cells` for each earlier stage"
            )


def open(options: Options, config: Config, *_: Any) -> Selection:
    """The order of `vlp.data.cells`; nothing is chosen after loading."""
    # The order does the work: each global batch is of one cell.
    batch = config.train.batch
    mixture = partial(Cells, labels=options.labels, batch=batch, small=options.small)
    return Selection(batch, mixture)
