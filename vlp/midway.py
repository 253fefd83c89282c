"""What is measured between steps: evaluation tasks, and the loss over held-out samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vlp.config import Config, Plan
from vlp.models.dual_encoder import DualEncoder
from vlp.plugin import Plugin
from vlp.pretrained.runs import AVERAGED
from vlp.reporter import Reporter, scores_of
from vlp.step import Training
from vlp.validation import Validator
from vlp.watch import VALIDATION

# (plain model, tasks that are due, the towers' arithmetic) -> results
Evaluate = Callable[[DualEncoder, list[Plugin], torch.dtype], list[dict[str, Any]]]


@dataclass
class Midway:
    """Measures what is due and reports it."""

    config: Config
    plan: Plan
    training: Training
    report: Reporter
    evaluate: Evaluate | None
    validator: Validator | None
    records: list[dict[str, Any]] = field(default_factory=list)  # of tasks, at `step`
    done: set[str] = field(default_factory=set)  # labels of what was measured at `step`
    step: int = -1

    def due(self, step: int) -> bool:
        """Whether anything is due after `step`."""
        return bool(self._tasks(step)) or self._validates(step)

    def measure(self, step: int) -> dict[str, float]:
        """Measure what is due after `step`: scores by LABEL.METRIC. Collective; may raise
        Interrupted.
        """
        return self._measure(step, self._tasks(step), self._validates(step))

    def finish(self, step: int) -> dict[str, float]:
        """Measure everything at the run's last step, but for what was measured there already, and
        write results.json. Collective; may raise Interrupted.
        """
        tasks = list(self.config.eval) if self.evaluate is not None else []
        scores = self._measure(step, tasks, self.validator is not None)
        if tasks:
            self.report.results(self.records)
        return scores

    def _tasks(self, step: int) -> list[Plugin]:
        if self.evaluate is None:
            return []
        return [task for task in self.config.eval if self.plan.due(task.common.every, step)]

    def _validates(self, step: int) -> bool:
        if self.validator is None:
            return False
        assert self.config.validation is not None, "a validator has its section"
        return self.plan.due(self.config.validation.every, step)

    def _measure(self, step: int, tasks: list[Plugin], validates: bool) -> dict[str, float]:
        if step != self.step:
            self.step, self.records, self.done = step, [], set()
        new = []

        if validates and self.validator is not None and VALIDATION not in self.done:
            loss = self.validator.measure(self.training)
            new.append({"label": VALIDATION, "metrics": loss})
            self.done.add(VALIDATION)

        left = [task for task in tasks if task.label not in self.done]
        if left and self.evaluate is not None:
            of_tasks = evaluate_now(self.evaluate, self.training, left)
            self.records += of_tasks
            self.done |= {task.label for task in left}
            new += of_tasks

        if new:
            self.report.evaluation(step, new)
        return scores_of(new)


def evaluate_now(
    evaluate: Evaluate, training: Training, tasks: list[Plugin]
) -> list[dict[str, Any]]:
    """Hand a plain model in evaluation mode to `evaluate`, without gradients; after it the moving
    average, where that is to be evaluated, whose labels begin with `AVERAGED`.
    """
    try:
        with torch.no_grad():
            # Sharded engines gather the weights for it.
            model = training.engine.evaluation_model().eval()
            records = evaluate(model, tasks, training.dtype)
            del model  # of two whole models one at a time

            teacher = training.teacher
            average = None if teacher is None else teacher.evaluation_model()
            if average is not None:
                for record in evaluate(average.eval(), tasks, training.dtype):
                    records.append(record | {"label": AVERAGED + record["label"]})
            return records
    finally:
        training.engine.model.train()
