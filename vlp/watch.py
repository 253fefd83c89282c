"""A score that a run is watched by: which checkpoint is the best one, and when to stop early.

What was seen before is read back from metrics.jsonl, so that a resumed run goes on counting where
it was, whatever happened between the checkpoint and its evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from vlp import dist, log, retention
from vlp.config import Best, Config, Stop
from vlp.files import write_atomically
from vlp.plugin import Plugin
from vlp.pretrained.runs import AVERAGED, BEST, FOLDER, looks_complete
from vlp.schema import did_you_mean

VALIDATION = "val"  # the label of what vlp.validation measures
# Which way a score is better. Whole names and their beginnings and ends: groups of a set may be
# called anything. Of what stands in none of the lists nothing is known.
_LOWER_IS_BETTER = ("*mean_rank", "*median_rank", "mean_distance", "linear_separability",
                    "group_gap_*", "score_overlap")  # fmt: skip
_UNKNOWN = ("effective_rank_*", "*score_mean", "*_sd", "*_error")
_HIGHER_IS_BETTER = ("*recall*", "*acc*", "*precision*", "*score*", "*ndcg@*", "*err@*", "*rbp@*",
                     "simat*", "jaccard*", "auc*", "effective_robustness")  # fmt: skip

Values = Mapping[str, float]


class Watch:
    """The best checkpoint of a run, and whether it should stop, from its scores in their order.

    `note` is called on every rank with the same values, `keep` after the checkpoint stands.
    """

    def __init__(self, config: Config, step: int) -> None:
        self.run, self.keep_newest = Path(config.out), config.checkpoint.keep
        self.best, self.stop = best_of(config), config.stop
        self.best_value: float | None = None
        self.stop_value: float | None = None
        self.n_without = 0  # evaluations since `stop_value`
        self.best_step = 0

        # One rank reads the files, so that all see the same.
        history, stand = dist.broadcast_object(self._history(step))
        for earlier_step, values in history:
            self._count(values)
            if self._improves(values) and earlier_step in stand:
                self._take(values)
                self.best_step = earlier_step
        if self.best is not None and dist.is_main() and (self.run / FOLDER).is_dir():
            self._write()

    def note(self, values: Values) -> bool:
        """Take the scores of an evaluation; whether the model is the best one until now.
        Collective.
        """
        values = dist.broadcast_object(dict(values))
        self._count(values)
        improves = self._improves(values)
        if improves:
            self._take(values)
        return improves

    def keep(self, step: int) -> None:
        """Let the checkpoint of this step, which stands, be the best one."""
        self.best_step = step
        if dist.is_main():
            assert self.best is not None, "only a run with checkpoint.best improves"
            log.say(f"step {step} is the best by {self.best.metric}: {self.best_value:.4g}")
            self._write()
            retention.prune(self.run, self.keep_newest)

    def reason(self) -> str | None:
        """Why the run should end now, in words; None: it should not."""
        if self.stop is None or self.n_without < self.stop.patience:
            return None
        return (
            f"stopping early: {self.stop.metric} has not become better than "
            f"{self.stop_value:.4g} in {self.n_without} evaluations (stop.patience)"
        )

    def _count(self, values: Values) -> None:
        """Count an evaluation for `stop`, if it gives the metric."""
        if self.stop is None or self.stop.metric not in values:
            return
        value = values[self.stop.metric]
        if is_better(value, self.stop_value, self.stop, self.stop.min_delta):
            self.stop_value, self.n_without = value, 0
        else:
            self.n_without += 1

    def _improves(self, values: Values) -> bool:
        if self.best is None or self.best.metric not in values:
            return False
        return is_better(values[self.best.metric], self.best_value, self.best)

    def _take(self, values: Values) -> None:
        assert self.best is not None, "only a run with checkpoint.best improves"
        self.best_value = values[self.best.metric]

    def _history(self, step: int) -> tuple[list[tuple[int, dict[str, float]]], set[int]]:
        """The scores up to `step` in their order, and the steps whose checkpoints stand, on the
        first rank; of a step the last scores.
        """
        path = self.run / "metrics.jsonl"
        if not dist.is_main() or not step:
            return [], set()
        by_step: dict[int, dict[str, float]] = {}
        for record in log.records(path):
            if record.get("kind") == "eval" and record["step"] <= step:
                numbers = {k: math.nan if v is None else v for k, v in record.items()}
                by_step.setdefault(record["step"], {}).update(numbers)
        return sorted(by_step.items()), {number for number in by_step if self._stands(number)}

    def _stands(self, step: int) -> bool:
        return looks_complete(self._checkpoint(step))

    def _checkpoint(self, step: int) -> Path:
        return self.run / FOLDER / f"step_{step:08d}"

    def _write(self) -> None:
        """The file that names the best checkpoint; none where there is none."""
        assert self.best is not None, "called only with checkpoint.best"
        path = self.run / FOLDER / BEST
        if self.best_value is None:
            path.unlink(missing_ok=True)
            return
        content = {
            "checkpoint": self._checkpoint(self.best_step).name,
            "step": self.best_step,
            "metric": self.best.metric,
            "value": self.best_value,
            "mode": mode_of(self.best),
        }
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def best_of(config: Config) -> Best | None:
    """`checkpoint.best`, which may be a metric's name alone."""
    best = config.checkpoint.best
    return Best(best) if isinstance(best, str) else best


def is_better(
    value: float, than: float | None, watched: Best | Stop, min_delta: float = 0.0
) -> bool:
    """Whether a value is better, by more than `min_delta`; NaN never is."""
    if math.isnan(value):
        return False
    if than is None:
        return True
    gain = value - than if mode_of(watched) == "max" else than - value
    return gain > min_delta


def mode_of(watched: Best | Stop) -> str | None:
    """Whether the largest or the smallest value is the best; None where that is not known."""
    if watched.mode is not None:
        return watched.mode
    label, _, name = watched.metric.removeprefix(AVERAGED).partition(".")
    return "min" if label == VALIDATION else better(name)


def better(score: str) -> str | None:
    """Whether the largest or the smallest value of a task's score is the best, "max" or "min"; None
    where its name does not tell.
    """
    if _is_one_of(score, _UNKNOWN):
        return None
    if _is_one_of(score, _LOWER_IS_BETTER):
        return "min"
    return "max" if _is_one_of(score, _HIGHER_IS_BETTER) else None


def _is_one_of(score: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(score, pattern) for pattern in patterns)


def check(config: Config) -> None:
    """Refuse a metric that nothing measures, or of which nobody knows what is better."""
    for key, watched in (("checkpoint.best", best_of(config)), ("stop", config.stop)):
        if watched is None:
            continue
        _check_name(key, watched.metric, config)
        if mode_of(watched) is None:
            raise ValueError(
                f"{key}: whether more or less of {watched.metric} is better is not known; write "
                f"{{metric: {watched.metric}, mode: max}}, or mode: min"
            )
    if config.stop is not None:
        _check_frequency(config.stop, config)


def _check_name(key: str, metric: str, config: Config) -> None:
    # The moving average has the scores of every task, too.
    plain = metric.removeprefix(AVERAGED) if config.teacher.eval_ema else metric
    label, _, name = plain.partition(".")
    tasks = {task.label: task for task in config.eval}
    known: list[str] = []
    if label in tasks:
        known = scores(tasks[label])
    # The loss over held-out samples is of the plain weights.
    elif label == VALIDATION and config.validation is not None and metric == plain:
        known = ["loss", *(term.label for term in config.objective)]
    if is_listed(name, known):
        return

    labels = list(tasks)
    if config.validation is not None:
        labels.append(VALIDATION)
    offered = [f"{label}.{score}" for score in known] or [f"{one}.…" for one in labels]
    raise ValueError(
        f"{key}: nothing of this run measures {metric!r}{did_you_mean(metric, offered)}\n"
        "Tasks stand under eval, and val.loss comes with validation"
    )


def scores(task: Plugin) -> list[str]:
    """The scores that a task can give, `*` standing for what only an evaluation tells; of a file
    that does not list them the main one.
    """
    module = task.module
    if hasattr(module, "scores"):
        return list(module.scores(task.options))
    return list(module.SCORES if hasattr(module, "SCORES") else [module.MAIN])


def is_listed(score: str, listed: Sequence[str]) -> bool:
    """Whether a score is among those that a task lists, of which some may hold `*`."""
    # A group of the data may have any name, also one that reads as a pattern.
    return bool(score) and (score in listed or _is_one_of(score, listed))


def unlisted(task: Plugin, score: str) -> list[str]:
    """The scores that a task can give, where `score` is none of them; empty where it is one, or
    where the task's file does not list them.
    """
    if not hasattr(task.module, "scores") and not hasattr(task.module, "SCORES"):
        return []
    known = scores(task)
    return [] if is_listed(score, known) else known


def _check_frequency(stop: Stop, config: Config) -> None:
    label = stop.metric.removeprefix(AVERAGED).partition(".")[0]
    for task in config.eval:
        if task.label == label and task.common.every is None:
            raise ValueError(
                f"stop: {stop.metric} is measured at the end of the run only; "
                f"set eval.{task.name}.every, such as 5%"
            )
