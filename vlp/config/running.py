"""What a run does beside its steps: `validation`, `checkpoint.best` and `stop`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from vlp.config.durations import Duration
from vlp.plugin import Named, Plugin


@dataclass(frozen=True)
class HeldOut:
    """Samples that are never trained on. All else of `data` (captions, labels, views) holds for
    them, too, but pictures are cut in the middle.
    """

    # as data.sources
    sources: list[Annotated[Plugin, Named("vlp.data.sources")]]

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(
                "sources is empty; name held-out samples, e.g. [{name: shards, path: data/val}]"
            )


@dataclass(frozen=True)
class Validation:
    """The loss of the run's objective over a fixed held-out set: val.loss and val.TERM."""

    data: HeldOut  # the held-out samples
    every: Duration = Duration(5, "%")  # how often it is measured; at the end in any case
    # rows of all ranks that are candidates of one another; None: train.batch, or the stage's
    batch: int | None = None
    # how many samples are taken, in whole batches and the same ones every time; None: all
    samples: int | None = None
    # scale of the scores; None: the model's own of that step, which does not move meanwhile
    scale: float | None = None

    def __post_init__(self) -> None:
        if not self.every.value:
            raise ValueError("every is 0; expected a span, such as 5% or 1000 (steps)")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}; expected at least 1, or null")
        if self.samples is not None and self.samples < max(1, self.batch or 1):
            raise ValueError(
                f"samples is {self.samples}; expected at least one batch ({self.batch or 1}), "
                "or null for all"
            )
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"scale is {self.scale}; expected a positive number, or null")


@dataclass(frozen=True)
class Best:
    """The score by which a checkpoint is the best one."""

    metric: str  # LABEL.METRIC of an evaluation task, val.loss or val.TERM
    # which of two values is better; None: as is known of the metric
    mode: Literal["min", "max"] | None = None


@dataclass(frozen=True)
class Stop:
    """Ends a run early, once a score has not become better for a while."""

    metric: str  # LABEL.METRIC of an evaluation task, val.loss or val.TERM
    patience: int  # evaluations without a better value, after which the run ends
    # which of two values is better; None: as is known of the metric
    mode: Literal["min", "max"] | None = None
    min_delta: float = 0.0  # a value has to be better by more than this to count

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; expected at least 1")
        if self.min_delta < 0:
            raise ValueError(f"min_delta is {self.min_delta}; expected a number >= 0")
