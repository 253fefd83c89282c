"""The section `teacher`: models beside the trained one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Teacher:
    """Models that give terms embeddings without gradient, beside the trained one (vlp.teacher)."""

    # decay of the model's moving average (DeGLA .9996, BriVL .99); None: there is none
    ema: float | None = None
    # evaluate the moving average beside the weights, as ema.TASK; no term needs to read it then
    eval_ema: bool = False
    # latest pairs of all ranks whose embeddings are kept, as far as terms read them: the moving
    # average's, and the teachers'
    queue: int = 0
    # another, frozen model, or several, whose losses are averaged: any reference
    # (vlp.pretrained.references)
    model: str | list[str] | None = None
    # what judges pictures and captions together, whose order distill learns (form: ranking, of the
    # batch or of hard captions without stored scores; margin): cross-encoder:MODEL of
    # transformers (or MODEL alone), mllm:MODEL, or a function of one's own, package.module:function
    cross_encoder: str | None = None
    cross_encoder_batch: int = 64  # pairs that it reads at once

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; expected a decay in [0, 1), such as 0.9996")
        if self.eval_ema and self.ema is None:
            raise ValueError(
                "eval_ema is true, but there is no moving average to evaluate; set ema, such as "
                "0.9996, or leave eval_ema out"
            )
        if self.queue < 0:
            raise ValueError(f"queue is {self.queue}; expected a size >= 0")
        if self.cross_encoder_batch < 1:
            raise ValueError(
                f"cross_encoder_batch is {self.cross_encoder_batch}; expected a number of pairs, "
                "at least 1"
            )
        if self.model == []:
            raise ValueError("model is empty; name a model, several, or null for none")

    @property
    def models(self) -> list[str]:
        """The references of all frozen teachers."""
        if self.model is None:
            return []
        return [self.model] if isinstance(self.model, str) else self.model
