"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from vlp.config import Duration, Optimizer, Plan, WholePlan
from vlp.plugin import own_function

Factor = Callable[[int, int, int], float]  # (step, warmup, total) -> factor on lr

# Where there is neither a timescale nor a warm-up to take it from; big_vision's default.
TIMESCALE = 10_000


class Schedule:
    """The learning rate of every update of a run: `Schedule(options, plan)(step)`.

    Update number s (from 0) of T, after a linear warm-up of w updates, f = final_lr:

        lr·(s + 1)/w                            for s < w
        lr·(f + (1 − f)·(1 + cos π·p)/2)        cosine, p = (s − w)/(T − w)
        lr                                      constant, wsd
        lr/√(1 + (s − w)/t)                     inverse_sqrt, t the timescale, or w
        lr·function(s, w, T)                    one's own

    In a cooldown of c updates the last three are multiplied by f + (1 − f)·(1 − q), or, with the
    form 1-sqrt, f + (1 − f)·(1 − √q), where q = (s − (T − c))/c.

    Sources: warmup-stable-decay, Hu et al. 2024 (MiniCPM, arXiv:2404.06395); the form 1-sqrt,
    Hägele et al. 2024 (arXiv:2405.18392); inverse_sqrt and linear cooldown as in big_vision's utils
    (`rsqrt`, `cooldown_steps`).

    ValueError for a warm-up or cooldown that the run has no room for, and for a function that does
    not exist or gives no factor.
    """

    def __init__(self, options: Optimizer, plan: Plan | WholePlan) -> None:
        self.options, self.total = options, plan.total
        self.warmup = warmup_steps(options, plan)
        self.cooldown = _cooldown_steps(options, plan, self.warmup)
        self.timescale = self.warmup or TIMESCALE
        if options.timescale is not None:
            self.timescale = max(1, plan.steps(options.timescale))

        self.own = own_schedule(options.schedule)
        if self.own is not None:
            # Its last steps may be days away.
            for step in (0, self.warmup, self.total // 2, self.total - 1):
                self._own_factor(self.own, step)

    def __call__(self, step: int) -> float:
        """Learning rate of update number `step`, from 0."""
        # One's own function decides of the warm-up as well.
        if self.own is not None:
            return self.options.lr * self._own_factor(self.own, step)

        # The first update learns already: 1/warmup, not 0.
        if step < self.warmup:
            return self.options.lr * (step + 1) / self.warmup
        return self.options.lr * self._shape(step) * self._cooled(step)

    def _shape(self, step: int) -> float:
        """The factor after the warm-up, before any cooldown."""
        after = step - self.warmup
        if self.options.schedule == "inverse_sqrt":
            return 1 / math.sqrt(1 + after / self.timescale)
        if self.options.schedule != "cosine":
            return 1.0

        progress = min(1.0, after / max(1, self.total - self.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.options.final_lr + (1 - self.options.final_lr) * cosine

    def _cooled(self, step: int) -> float:
        """The factor of the cooldown: 1 before it."""
        start = self.total - self.cooldown
        if step < start or not self.cooldown:
            return 1.0

        progress = min(1.0, (step - start) / self.cooldown)
        if self.options.cooldown_form == "1-sqrt":
            progress = math.sqrt(progress)
        return self.options.final_lr + (1 - self.options.final_lr) * (1 - progress)

    def _own_factor(self, function: Factor, step: int) -> float:
        factor = function(step, self.warmup, self.total)
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not is_number or not math.isfinite(factor) or factor < 0:
            raise ValueError(
                f"train.optimizer.schedule {self.options.schedule} gives {factor!r} for step "
                f"{step}, warmup {self.warmup}, total {self.total}; expected a number >= 0, the "
                "factor on lr"
            )
        return float(factor)


def own_schedule(schedule: str) -> Factor | None:
    """The function that package.module:function names, None for a schedule by name; ValueError
    where there is none.
    """
    if ":" not in schedule:
        return None
    return own_function(schedule, "train.optimizer.schedule")


def warmup_steps(options: Optimizer, plan: Plan | WholePlan) -> int:
    """Updates of the warm-up. ValueError if the run ends before it: the rate never reached lr."""
    steps = plan.steps(options.warmup)
    if steps > plan.total:
        raise ValueError(
            f"train.optimizer.warmup is {steps:,} steps, but the run has {plan.total:,}: its rate "
            f"would end at {plan.total / steps:.2g} of lr; give train.optimizer.warmup=5%, or a "
            "longer train.duration"
        )
    return steps


def _cooldown_steps(options: Optimizer, plan: Plan | WholePlan, warmup: int) -> int:
    """Updates of the cooldown. ValueError if it would begin before the warm-up ends."""
    cooldown: Duration | None = options.cooldown
    if cooldown is None:
        return 0
    steps = plan.last_steps(cooldown)
    if warmup + steps > plan.total:
        raise ValueError(
            f"train.optimizer.cooldown is {steps:,} steps and warmup {warmup:,}, but the run has "
            f"{plan.total:,}; give train.optimizer.cooldown=20%, a shorter warmup, or a longer "
            "train.duration"
        )
    return steps
