"""Zero-shot classification over groups of pictures: every group's accuracy, and the worst.

As `zeroshot`, and of each group acc1 and acc5; `worst_group_acc1` and `worst_group_acc5` are those
of the group that has the lowest, with its Wilson interval and the distance from the best group.
The chance beside them is that of any one group: the lowest of several groups lies below it also by
guessing, the more so the smaller they are.

`f1_macro` is the mean over the classes that occur of their F1, as WILDS reports iWildCam. Sources:
Koh et al. 2021 and p-lambda/wilds, `common/metrics/all_metrics.py`; mlfoundations/datacomp@4afedc4,
`eval_utils/wilds_eval.py` and `fairness_eval.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vlp.eval import confidence, embed, metrics
from vlp.eval.datasets import open_source
from vlp.eval.datasets.source import Record
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, zeroshot

VERSION = 1
KNOWN_AS = "zeroshot_classification"
MAIN = "acc1"


@dataclass(frozen=True)
class Options(zeroshot.Options):
    """What is classified, and what the pictures' groups are."""

    # a column or a key of the samples' JSON; a number: a place in the vector (.npy) that shards of
    # WILDS carry; None: no groups
    group: int | str | None = None
    # among several questions of one set: class names and templates begin with "OBJECTIVE:"
    objective: str | None = None
    label: int | str | None = None  # of an objective: where its class number is, as `group`


@dataclass
class Data:
    """An evaluation set with numbered classes and the group of each picture."""

    labelled: zeroshot.Data
    groups: list[str]  # empty: none


# --- reading --------------------------------------------------------------------------------------


def read(options: Options) -> Data:
    """Open the set and settle classes, templates and groups."""
    if (options.objective is None) != (options.label is None):
        raise DataError(
            f"objective={options.objective} and label={options.label} go together: a question, and "
            "where its class numbers are"
        )

    labelled = zeroshot.read(options) if options.objective is None else _of_objective(options)
    if labelled.labels.ndim == 2:
        raise DataError(f"{options.data} has several labels an image; groups need one")
    if options.group is None:
        return Data(labelled, [])
    return Data(labelled, [_group(r, options.group) for r in labelled.source.records])


def _of_objective(options: Options) -> zeroshot.Data:
    """One question of a set with several."""
    if options.classes is not None:
        raise DataError(
            f"objective={options.objective} takes its classes from the set's classnames.txt; leave "
            "out classes"
        )
    source = open_source(options.data, options.split, options.missing, options.images, options)
    start = f"{options.objective}:"
    names = _beginning(source.classes, start)
    templates = options.templates or _beginning(source.templates, start)
    if not names or not templates:
        raise DataError(
            f"{options.data} has {len(names)} classes and {len(templates)} templates that begin "
            f"with {start!r}; expected some of both in classnames.txt and "
            "zeroshot_classification_templates.txt"
        )

    assert options.label is not None
    labels = [_number(record, options.label, len(names)) for record in source.records]
    chosen = zeroshot.checked_templates(templates, names)
    return zeroshot.Data(source, names, chosen, torch.tensor(labels))


def _beginning(lines: list[str] | None, start: str) -> list[str]:
    """What follows `start` in the lines that begin with it."""
    return [line.removeprefix(start) for line in lines or [] if line.startswith(start)]


def _group(record: Record, where: int | str) -> str:
    """The group of a record; of a vector whole numbers, as WILDS takes them."""
    value = _noted(record, where)
    if isinstance(where, str):
        return str(value)
    if not _is_number(value):
        raise DataError(f"{record.picture.name}: group {value!r}, expected a number")
    return str(int(value))


def _noted(record: Record, where: int | str) -> Any:
    """What a record notes under a key, or at a place of its vector."""
    place = f"{record.picture.name}: "
    if isinstance(where, str):
        if record.meta.get(where) is None:
            known = ", ".join(record.meta) or "nothing"
            raise DataError(f"{place}no {where!r} noted, only {known}; name a column that all have")
        return record.meta[where]

    vector = record.meta.get("npy")
    if not isinstance(vector, list) or not 0 <= where < len(vector):
        raise DataError(
            f"{place}no place {where} in a vector of metadata ({vector}); expected a .npy beside "
            "the picture, or give a column's name"
        )
    return vector[where]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(record: Record, where: int | str, n_classes: int) -> int:
    """A class number that a record notes."""
    value = _noted(record, where)
    if not _is_number(value) or value != int(value) or not 0 <= value < n_classes:
        raise DataError(
            f"{record.picture.name}: class {value!r}, expected a number from 0 to {n_classes - 1}"
        )
    return int(value)


# --- scores ---------------------------------------------------------------------------------------


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """Accuracies of all pictures, of every group and of the worst, and the macro F1."""
    labelled = data.labelled
    pictures = [record.picture for record in labelled.source.records]
    class_rows = zeroshot.class_embeddings(encoder, labelled.templates, labelled.classes, context)
    image = embed.images(encoder, pictures, context)

    result = zeroshot.blank_result(labelled, context)
    result.digest = context.digest(pictures, result.digest, data.groups)
    ranks = metrics.class_ranks(image, class_rows, labelled.labels)
    zeroshot.score(result, ranks, labelled.labels, len(class_rows))

    answers = metrics.nearest(image, class_rows)
    result.values["f1_macro"] = metrics.macro_f1(answers, labelled.labels)
    if data.groups:
        result.counts["groups"] = len(set(data.groups))
        for accuracy in [name for name in ("acc1", "acc5") if name in result.items]:
            _score_groups(result, accuracy, data.groups)
    return result


def _score_groups(result: TaskResult, accuracy: str, groups: list[str]) -> None:
    """Fill in an accuracy of every group and of the worst, from its outcomes by picture."""
    items, chance = result.items[accuracy], result.chance[accuracy]
    for name in sorted(set(groups)):
        of_group = torch.tensor([group == name for group in groups])
        result.items[f"{accuracy}_group_{name}"] = items[of_group]
        result.chance[f"{accuracy}_group_{name}"] = chance

    # No outcomes by picture: two models may have their worst in different groups.
    worst = confidence.worst_group(items[:, 0], groups)
    result.values[f"worst_group_{accuracy}"] = worst.accuracy
    result.intervals[f"worst_group_{accuracy}"] = worst.interval
    result.chance[f"worst_group_{accuracy}"] = chance
    result.values[f"group_gap_{accuracy}"] = worst.gap
