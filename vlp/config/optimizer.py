"""The section `train.optimizer`: which optimiser, on which groups of parameters, at which rate."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from vlp.config.durations import Duration
from vlp.schema import did_you_mean

ADAMW = "adamw"
# What CLIP was trained with; other optimisers keep their own.
ADAMW_BETAS, ADAMW_EPS = (0.9, 0.98), 1e-6

SCHEDULES = ("cosine", "constant", "wsd", "inverse_sqrt")
WSD_COOLDOWN = Duration(20, "%")


@dataclass(frozen=True)
class Group:
    """Parameters with a learning rate or weight decay of their own; the first group that a
    parameter fits counts.
    """

    # of one tower only; None: of any part of the model
    tower: Literal["image", "text"] | None = None
    # a regular expression, searched in the parameters' names; None: all of the tower
    pattern: str | None = None
    lr: float = 1.0  # factor on the learning rate
    weight_decay: float = 1.0  # factor on the weight decay, where there is any

    def __post_init__(self) -> None:
        if self.tower is None and self.pattern is None:
            raise ValueError("a group needs a tower, a pattern, or both, to say what belongs to it")
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"lr {self.lr} and weight_decay {self.weight_decay} are factors; expected lr > 0 "
                "and weight_decay >= 0 (a tower that is not to learn is locked instead)"
            )
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(
                f"pattern {self.pattern!r} is no regular expression: {error}"
            ) from None


@dataclass(frozen=True)
class LayerDecay:
    """Layer-wise decay of the learning rate, by tower."""

    image: float = 1.0  # factor from one layer of the image tower to the next lower one
    text: float = 1.0  # factor from one layer of the text tower to the next lower one

    def __post_init__(self) -> None:
        for tower in ("image", "text"):
            check_layer_decay(getattr(self, tower))


def check_layer_decay(factor: float) -> None:
    """ValueError unless it is a factor from layer to layer."""
    if not 0 < factor <= 1:
        raise ValueError(f"layer_decay is {factor}; expected a factor in (0, 1], such as 0.75")


@dataclass(frozen=True)
class Optimizer:
    """The optimiser with its groups of parameters and the schedule of its learning rate. Weight
    decay leaves gains, biases, embeddings, scale and bias alone.
    """

    # adamw, or any other of timm.optim.list_optimizers(): muon, lion, lamb, adafactorbv, …
    name: str = "adamw"
    lr: float = 5e-4  # peak learning rate, reached after the warm-up
    # decay of the two moments; None: [0.9, 0.98] for adamw, otherwise the optimiser's own
    betas: tuple[float, float] | None = None
    # ε in the denominator; None: 1e-6 for adamw, otherwise the optimiser's own
    eps: float | None = None
    weight_decay: float = 0.2  # decoupled, as AdamW's, unless the optimiser has only another
    # what else the optimiser takes, by its own names: {momentum: 0.95, nesterov: true}
    options: dict[str, Any] = field(default_factory=dict)
    # rates and decays of parts of the model; what fits none has lr and weight_decay as they are
    groups: list[Group] = field(default_factory=list)
    # factor on the learning rate from each layer to the next lower one, for both towers or by
    # tower; the deepest layer, projections, heads, scale and bias learn at lr; None: all do
    layer_decay: float | LayerDecay | None = None
    # linear rise of the learning rate from 0 to lr at the start
    warmup: Duration = Duration(5, "%")
    # after the warm-up: cosine, constant, wsd (constant with a cooldown), inverse_sqrt, or a
    # function of one's own as package.module:function, (step, warmup, total) -> factor on lr
    schedule: str = "cosine"
    # last part of the run, over which the rate falls to final_lr; None: 20% with wsd, otherwise
    # none
    cooldown: Duration | None = None
    # how the rate falls in the cooldown: 1 - p or 1 - sqrt(p), for p from 0 to 1
    cooldown_form: Literal["linear", "1-sqrt"] = "1-sqrt"
    # of inverse_sqrt: after so long the rate has fallen to lr / sqrt(2); None: as long as the
    # warm-up
    timescale: Duration | None = None
    final_lr: float = 0.0  # share of lr at the end of cosine or cooldown
    clip_norm: float | None = 1.0  # largest norm of the global gradient; None: no clipping

    def __post_init__(self) -> None:
        positive = self.lr > 0 and (self.eps is None or self.eps > 0)
        if not positive or self.weight_decay < 0 or not 0 <= self.final_lr <= 1:
            raise ValueError("lr and eps must be positive, weight_decay >= 0, final_lr in [0, 1]")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; expected a positive number or null")
        if isinstance(self.layer_decay, (int, float)):
            check_layer_decay(self.layer_decay)
        self._check_schedule()

        # Written down, so that a run's config.yaml says what it was trained with.
        if self.name == ADAMW and self.betas is None:
            object.__setattr__(self, "betas", ADAMW_BETAS)
        if self.name == ADAMW and self.eps is None:
            object.__setattr__(self, "eps", ADAMW_EPS)
        if self.schedule == "wsd" and self.cooldown is None:
            object.__setattr__(self, "cooldown", WSD_COOLDOWN)

    def _check_schedule(self) -> None:
        """Refuse a schedule that does not exist, and keys that it would not read."""
        is_own = all(self.schedule.partition(":"))
        if self.schedule not in SCHEDULES and not is_own:
            raise ValueError(
                f"no schedule {self.schedule!r}{did_you_mean(self.schedule, SCHEDULES)}; a "
                "function of your own is package.module:function"
            )

        if self.cooldown is not None and (is_own or self.schedule == "cosine"):
            raise ValueError(
                f"cooldown is {self.cooldown.to_config()}, which the schedule {self.schedule} does "
                "not read; leave it out, or take wsd, constant or inverse_sqrt"
            )
        if self.timescale is not None and self.schedule != "inverse_sqrt":
            raise ValueError(
                f"timescale is {self.timescale.to_config()}, which the schedule {self.schedule} "
                "does not read; leave it out, or take inverse_sqrt"
            )

        falls = self.schedule in ("cosine", "wsd") or self.cooldown is not None
        if self.final_lr and not falls:
            raise ValueError(
                f"final_lr is {self.final_lr}, which the schedule {self.schedule} does not read; "
                "leave it out, or give a cooldown"
            )
