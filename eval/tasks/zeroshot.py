"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1).

A class is the mean of its prompts' unit embeddings, made a unit vector again; a picture gets the
class of highest cosine. Scores: acc1, acc5 (from five classes on), mean_per_class_recall; for
several labels a picture mean_average_precision. Reads whatever `vlp.eval.datasets.open_source`
reads, ImageNet's relatives by their folders' names included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vlp import dist, log
from vlp.data.tables import TableOptions
from vlp.data.trees import class_name
from vlp.eval import classes, embed, imagenet, metrics, prompts
from vlp.eval.classes import ClassList
from vlp.eval.datasets import Record, Source, open_source
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "zeroshot_classification"


@dataclass(frozen=True)
class Options(TableOptions):
    """What is classified, into what, and how it is said."""

    data: str  # see vlp.eval.datasets
    images: str | None = None  # where a table's images are: a folder or a .tar; None: beside it
    split: str = "test"  # which split of the data is scored
    classes: str | list[str] | None = (
        None  # names, a file of them (vlp.eval.classes), or imagenet; None: the data's own
    )
    templates: str | list[str] | None = (
        None  # a set, a file or sentences; None: the data's own, imagenet80 or photo
    )
    partial: bool = False  # score among some of ImageNet's classes only
    missing: Literal["error", "skip"] = "error"  # annotations without their image
    language: str = "en"  # recorded in the result


@dataclass
class Data:
    """An evaluation set with numbered classes."""

    source: Source
    classes: list[str]
    templates: list[str]
    labels: torch.Tensor  # [n] int64, or [n, C] bool for several labels


def read(options: Options) -> Data:
    """Open the set and settle class names and templates."""
    objectnet = imagenet.objectnet_folders(Path(options.data))
    place = (
        options.data if objectnet is None else str(imagenet.objectnet_images(Path(options.data)))
    )
    source = open_source(place, options.split, options.missing, options.images, options)
    if objectnet is not None:
        source = _objectnet(source, objectnet)
    unlabelled = [r.picture.name for r in source.records if r.label is None]
    if unlabelled:
        raise DataError(
            f"{len(unlabelled)} images of {options.data} have no class, e.g. {unlabelled[0]}; give a .cls or a class, or name a "
            "table's column: class_column=NAME"
        )
    by_name = isinstance(source.records[0].label, str)
    if any(isinstance(r.label, str) != by_name for r in source.records):
        raise DataError(
            f"some classes of {options.data} are numbers and some are names; give every sample the same kind"
        )
    names, labels = _named(source, options) if by_name else _numbered(source, options)
    is_imagenet = imagenet.looks_like(source) or options.classes == "imagenet"
    choice = options.templates or source.templates or ("imagenet80" if is_imagenet else "photo")
    try:
        templates = prompts.templates(choice)
    except ValueError as error:
        raise DataError(str(error)) from error
    return Data(source, names, templates, labels)


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    if (
        context.progress
        and dist.is_main()
        and all(name.isdecimal() for name in data.classes)
        and len(data.classes) > 10
    ):
        log.warn(
            f"the classes are called {data.classes[0]} … {data.classes[-1]}, also in the prompts; classes=FILE names them"
        )
    pictures = [r.picture for r in data.source.records]
    text = embed.texts(encoder, prompts.fill(data.templates, data.classes), context)
    class_rows = torch.nn.functional.normalize(
        text.view(len(data.classes), len(data.templates), -1).mean(1), dim=-1
    )
    image = embed.images(encoder, pictures, context)
    n, n_classes = len(image), len(class_rows)
    result = TaskResult(
        data.source.name,
        counts={
            "images": n,
            "classes": n_classes,
            "templates": len(data.templates),
            "skipped": len(data.source.skipped),
        },
        digest=context.digest(pictures, data.classes, data.templates, data.labels.tolist()),
    )
    if data.labels.ndim == 2:
        precision = metrics.average_precision(image @ class_rows.T, data.labels)
        result.values["mean_average_precision"] = float(precision.mean())
        result.chance["mean_average_precision"] = float(data.labels.double().mean())
        return result
    ranks = metrics.class_ranks(image, class_rows, data.labels)
    first, one = (ranks == 1).double(), torch.ones(n, dtype=torch.float64)
    weights = metrics.per_class_weights(data.labels)
    result.items["acc1"] = torch.stack([first, one], 1)
    result.chance["acc1"] = 1 / n_classes
    if n_classes >= 5:
        result.items["acc5"] = torch.stack([(ranks <= 5).double(), one], 1)
        result.chance["acc5"] = 5 / n_classes
    result.items["mean_per_class_recall"] = torch.stack([first * weights, weights], 1)
    result.chance["mean_per_class_recall"] = 1 / n_classes
    return result


def _objectnet(source: Source, folders: dict[str, str]) -> Source:
    """ObjectNet's pictures of the overlapping classes, without the red frame that marks them (2 px,
    as in wise-ft).
    """
    kept = [
        Record(replace(r.picture, border=2), label=folders[name])
        for r in source.records
        if (name := Path(r.picture.path).parent.name) in folders
    ]
    return replace(source, records=kept, name="objectnet")


def _given(options: Options) -> ClassList | None:
    if options.classes is None:
        return None
    if isinstance(options.classes, list):
        return classes.checked(ClassList(options.classes))
    path = Path(options.classes).expanduser()
    if not path.exists():
        raise DataError(
            f"classes={options.classes!r} is neither imagenet nor a file with a class name a line"
        )
    return classes.read_list(path)


def _named(source: Source, options: Options) -> tuple[list[str], torch.Tensor]:
    """Classes that the data call by name (folders, "class" in JSON)."""
    labels = [str(r.label) for r in source.records]
    if options.classes == "imagenet" or (options.classes is None and imagenet.looks_like(source)):
        names, number = imagenet.classes_of(source, options.partial)
        return names, torch.tensor([number[label] for label in labels])
    given = _given(options) or (
        ClassList(source.classes, origin="classnames.txt") if source.classes else None
    )
    if given is None:
        names = list(dict.fromkeys(class_name(label) for label in classes.in_order(labels)))
        return names, torch.tensor([names.index(class_name(label)) for label in labels])
    number = classes.assign(labels, given, options.data)
    return given.names, torch.tensor([number[label] for label in labels])


def _numbered(source: Source, options: Options) -> tuple[list[str], torch.Tensor]:
    """Classes that the data give by number (.cls, .npy, a label column)."""
    given = ClassList(imagenet.names()) if options.classes == "imagenet" else _given(options)
    own = source.classes
    if given is None and own is None:
        raise DataError(
            f"{options.data} numbers its classes but has no classnames.txt; add it (a line a name) or classes=FILE"
        )
    numbers = [r.label if isinstance(r.label, tuple) else (r.label,) for r in source.records]
    highest = max((max(several) for several in numbers if several), default=0)
    names = given.names if given is not None else own
    if highest >= len(own or names):
        raise DataError(
            f"{options.data} has class number {highest} but only {len(own or names)} class names, which count from 0; "
            "complete the list"
        )
    # Where the set names its classes too, a list in another order goes by name.
    place = list(range(len(names)))
    if given is not None and own is not None:
        number = classes.assign(own, given, options.data)
        place = [number[name] for name in own]
    if source.multilabel:
        hot = torch.zeros(len(numbers), len(names), dtype=torch.bool)
        for row, several in zip(hot, numbers):
            row[[place[n] for n in several]] = True
        return names, hot
    return names, torch.tensor([place[n] for (n,) in numbers])
