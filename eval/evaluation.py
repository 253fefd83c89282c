"""Tasks carried out for a model: by `vlp eval`, and as a callable for the training loop."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlp.eval.embed import Context
    from vlp.eval.models import Encoder
    from vlp.models.dual_encoder import DualEncoder
    from vlp.plugin import Plugin


def read_all(tasks: list[Plugin]) -> list[Any]:
    """Open every task's data, in the tasks' order: what is wrong with them shows here, unreadable
    pictures included.
    """
    from vlp.eval.pictures import refuse_unreadable

    opened = []
    for task in tasks:
        data = task.module.read(task.options)
        if not _may_skip(task):
            refuse_unreadable(data)
        opened.append(data)
    return opened


def needs_decoder(task: Plugin) -> bool:
    """Whether a task asks for a model that writes captions."""
    return getattr(task.module, "NEEDS_DECODER", False)


def _may_skip(task: Plugin) -> bool:
    """Whether a task may leave out what it cannot read."""
    return getattr(task.options, "missing", "error") == "skip"


def evaluate(
    encoder: Encoder,
    tasks: list[Plugin],
    context: Context,
    data: list[Any] | None = None,  # from `read_all`; None: read now
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Run the tasks. Returns their records (vlp.eval.report.records) and the outcomes by unit,
    "label/score" -> [U, 2].

    Collective: every rank calls it with the same tasks and gets the same results. The global random
    state is not touched.
    """
    from vlp import dist
    from vlp.eval import legible
    from vlp.eval.describers import no_decoder
    from vlp.eval.models import ModelError
    from vlp.eval.report import records

    # Before the first of them: a suite may take hours to come to the last.
    for task in tasks:
        if needs_decoder(task) and encoder.describer is None:
            raise ModelError(f"{task.label}: {no_decoder(encoder.name)}")
    if data is None:
        data = [task.module.read(task.options) for task in tasks]

    results: list[dict[str, Any]] = []
    items: dict[str, Tensor] = {}
    readings: dict[str, list[legible.Reading]] = {}  # by task, for one warning
    for task, opened in zip(tasks, data):
        if context.progress and dist.is_main():
            print(f"{task.label}: {getattr(task.options, 'data', '')}", file=sys.stderr, flush=True)

        # Inside training the caller counts them: a rank that fails must not leave others waiting.
        skips = context.unreadable is None and _may_skip(task)
        task_context = replace(context, unreadable={}) if skips else context
        context.readings.clear()
        result = task.module.run(encoder, opened, task.options, task_context)

        if skips:
            _count_unreadable(task, result.counts, task_context)
        readings[task.label] = list(context.readings.values())
        result.counts |= legible.count(readings[task.label])
        results.append(records.record(task, encoder, result))
        items |= {f"{task.label}/{name}": value for name, value in result.items.items()}

    legible.tell(readings)

    # Hashing large tars takes long; the next evaluation finds it done.
    if context.contents is not None and dist.is_main():
        context.contents.save()
    return results, items


def in_training(
    model: DualEncoder, tasks: list[Plugin], dtype: torch.dtype | None = None
) -> list[dict[str, Any]]:
    """The training loop's callable: the records of `tasks` for a model in memory, the same on every
    rank. The towers compute in `dtype`, the run's precision; None: float32.

    Nothing is kept on disk and data are not hashed. Each rank embeds its share; the model's mode is
    put back.
    """
    import torch

    from vlp.eval.models import from_model

    # Dropout and patch dropping off, and on again whatever happens.
    was_training = model.training
    model.eval()
    try:
        autocast = None if dtype == torch.float32 else dtype
        return attempt(from_model(model, autocast=autocast), tasks)
    finally:
        model.train(was_training)


def attempt(encoder: Encoder, tasks: list[Plugin]) -> list[dict[str, Any]]:
    """The records of `tasks`, whatever goes wrong: training never ends here. Collective. `items` of
    a record holds its outcomes by unit, "score" -> [U, 2].

    A picture that cannot be read is replaced by plain gray and counted in `counts.unreadable`. Of a
    task that fails there is a record with `error` and the metric `failed` alone.
    """
    return [_attempt(encoder, task) for task in tasks]


def _attempt(encoder: Encoder, task: Plugin) -> dict[str, Any]:
    """The record of one task, or of its failure. Ranks agree before and after the task."""
    from vlp.eval.embed import Context, usual_batch
    from vlp.lifetime import Interrupted

    context = Context(unreadable={}, batch=usual_batch(encoder.device))
    opened, failure = None, ""
    record: dict[str, Any] = {}
    try:
        opened = task.module.read(task.options)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"

    # Before the work begins, so that no rank waits in it for one that could not open its data.
    failure = _first_failure(failure)
    if failure:
        return _failed(task, failure)

    try:
        (record,), items = evaluate(encoder, [task], context, [opened])
    except Interrupted:  # of all ranks: no failure
        raise
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    failure = _first_failure(failure)
    if failure:
        return _failed(task, failure)

    _count_unreadable(task, record["counts"], context)
    of_score = {name.removeprefix(f"{task.label}/"): value for name, value in items.items()}
    return record | {"items": of_score}


def _first_failure(failure: str) -> str:
    """The failure of the first rank that has one, on every rank; "" if none has. Collective."""
    from vlp import dist

    return next(filter(None, dist.gather_objects(failure)), "")


def _failed(task: Plugin, failure: str) -> dict[str, Any]:
    """The record of a task that failed, with a warning from the first rank."""
    from vlp import dist, log

    if dist.is_main():
        log.warn(
            f"the evaluation {task.label!r} failed and is left out at this step; "
            f"training goes on. {failure}"
        )
    return {
        "label": task.label,
        "metrics": {"failed": 1.0},
        "error": failure,
    }


def _count_unreadable(task: Plugin, counts: dict[str, int], context: Context) -> None:
    """Count the pictures that any rank could not read, and say so. Collective."""
    from vlp import dist, log

    unreadable: dict[str, str] = {}
    for of_rank in dist.gather_objects(context.unreadable):
        unreadable |= of_rank
    if not unreadable:
        return

    counts["unreadable"] = len(unreadable)
    if dist.is_main():
        first = unreadable[min(unreadable)]
        log.warn(
            f"{task.label}: {len(unreadable)} images cannot be read and count as plain gray: "
            f"{first}"
        )
