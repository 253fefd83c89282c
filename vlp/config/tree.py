"""The root of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from vlp.config.data import Augment, Data
from vlp.config.model import Model
from vlp.config.running import Stop, Validation
from vlp.config.stages import Stage
from vlp.config.teacher import Teacher
from vlp.config.training import Checkpoint, Log, Pairwise, Train
from vlp.plugin import Keyed, KeyedPlugins


@dataclass(frozen=True)
class Config:
    """One run."""

    out: str  # the run's folder
    data: Data
    model: Model
    train: Train
    # terms of the loss by name; the total is Σ weight · term
    objective: Annotated[KeyedPlugins, Keyed("vlp.losses")]
    # phases before the rest of the run, one after another (FLIP, CLIPA); empty: there are none
    stages: list[Stage] = field(default_factory=list)
    pairwise: Pairwise = Pairwise()
    teacher: Teacher = Teacher()
    # which samples a step trains on; empty: every one that is loaded
    selection: Annotated[KeyedPlugins, Keyed("vlp.selection")] = field(default_factory=KeyedPlugins)
    # evaluation tasks by name, run during training and at its end
    eval: Annotated[KeyedPlugins, Keyed("vlp.eval.tasks")] = field(default_factory=KeyedPlugins)
    # the loss over held-out samples; None: none
    validation: Validation | None = None
    # ends the run once a score gets no better; None: it goes to its end
    stop: Stop | None = None
    checkpoint: Checkpoint = Checkpoint()
    log: Log = field(default_factory=Log)
    seed: int = 0  # everything random is derived from it: weights, order, augmentation, captions
    init_from: str | None = None  # weights to start from: any reference (vlp.pretrained.references)
    # never; auto: from the newest complete checkpoint of `out`, if any; or a checkpoint's folder
    resume: str = "never"

    def __post_init__(self) -> None:
        if not self.objective:
            raise ValueError("objective is empty; name at least one term, e.g. {infonce: {}}")
        if len(self.selection) > 1:
            names = [plugin.name for plugin in self.selection]
            raise ValueError(f"selection names {names}; one at a time")
        if 0 < self.teacher.queue < self.train.batch:
            raise ValueError(
                f"teacher.queue is {self.teacher.queue}, "
                f"smaller than train.batch {self.train.batch}; enlarge it"
            )
        sizes = {stage.batch for stage in self.stages} - {None, self.train.batch}
        if self.data.one_source and sizes:
            raise ValueError(
                "data.one_source counts batches, which have one size in all of a run; found "
                f"train.batch {self.train.batch} and a stage's {min(filter(None, sizes))}: leave "
                "batch out of the stages"
            )
        if self.data.pairs == "text":
            self._check_pairs_of_texts()
        if self.model.new_projection and self.model.pretrained is None and self.init_from is None:
            raise ValueError(
                "model.new_projection starts projections beside published weights, and neither "
                "model.pretrained nor init_from names any; name them, or leave it out"
            )

    def _check_pairs_of_texts(self) -> None:
        """Refuse what needs pictures where both sides of a pair are texts."""
        of_pictures = {
            "data.augment": self.data.augment != Augment(),
            "data.views": self.data.views is not None,
            "selection": bool(self.selection),
            "teacher.cross_encoder": self.teacher.cross_encoder is not None,
            "image_tower.precomputed": self.model.precomputed,
            "text_tower.stored": self.model.stored_texts is not None,
        }
        for name, tower in self.model.heads.modalities.items():
            of_pictures[f"model.heads.modalities.{name}.frames"] = tower.frames is not None
        keys = [key for key, is_set in of_pictures.items() if is_set]
        if keys:
            raise ValueError(
                f"data.pairs is text: there are no pictures, which {', '.join(keys)} would need; "
                "leave that out, or set data.pairs: image"
            )
