"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1).

A class is the mean of its prompts' unit embeddings, made a unit vector again; a picture gets the
class of highest cosine. Scores: acc1, acc5 (from five classes on), mean_per_class_recall; for
several labels a picture mean_average_precision. Reads whatever `vlp.eval.datasets.open_source`
reads, ImageNet's relatives by their folders' names included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlp import dist, log
from vlp.data.tables import TableOptions
from vlp.data.trees import class_name
from vlp.eval import choices, classes, embed, imagenet, metrics, prompts
from vlp.eval.classes import ClassList
from vlp.eval.datasets import open_source
from vlp.eval.datasets.source import Record, Source
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 saw transparency on black; called ImageNet-V2's classes by number
KNOWN_AS = "zeroshot_classification"
MAIN = "acc1"  # mean_average_precision for several labels
SCORES = ("acc1", "acc5", "mean_per_class_recall", "mean_average_precision")


@dataclass(frozen=True)
class Options(TableOptions):
    """What is classified, into what, and how it is said."""

    data: str  # see vlp.eval.datasets
    images: str | None = None  # where a table's images are: a folder or a .tar; None: beside it
    split: str = "test"  # which split of the data is scored
    # names, a file of them (vlp.eval.classes), imagenet, or imagenet_zh, _ja, _it, _ar (from
    # clip_benchmark's package); None: the data's own
    classes: str | list[str] | None = None
    # a set, a file or sentences, for all classes or (.json) for each; None: the data's own,
    # imagenet80, the language's of `classes`, or photo
    templates: str | list[str] | dict[str, list[str]] | None = None
    partial: bool = False  # score among some of ImageNet's classes only
    missing: Literal["error", "skip"] = "error"  # annotations without their image
    language: str = "en"  # recorded in the result


@dataclass
class Data:
    """An evaluation set with numbered classes."""

    source: Source
    classes: list[str]
    templates: prompts.Templates
    labels: Tensor  # [n] int64, or [n, C] bool for several labels


# --- reading --------------------------------------------------------------------------------------


def read(options: Options) -> Data:
    """Open the set and settle class names and templates."""
    source = _open(options)
    by_name = _labelled_by_name(source, options)
    names, labels = _named(source, options) if by_name else _numbered(source, options)
    return Data(source, names, _templates(source, options, names), labels)


def _open(options: Options) -> Source:
    """The set's records; of an ObjectNet those of ImageNet's classes."""
    root = Path(options.data)

    # ObjectNet is told by its mappings; its class folders lie deeper than the root.
    objectnet = imagenet.objectnet_folders(root)
    place = options.data if objectnet is None else str(imagenet.objectnet_images(root))
    source = open_source(place, options.split, options.missing, options.images, options)
    return source if objectnet is None else _objectnet(source, objectnet)


def _objectnet(source: Source, folders: dict[str, str]) -> Source:
    """ObjectNet's pictures of the overlapping classes, without the red frame that marks them (2 px,
    as in wise-ft).
    """
    kept = []
    for record in source.records:
        folder = Path(record.picture.path).parent.name
        if folder in folders:
            kept.append(Record(replace(record.picture, border=2), label=folders[folder]))
    return replace(source, records=kept, name="objectnet")


def _labelled_by_name(source: Source, options: Options) -> bool:
    """Whether the labels are class names; else they are numbers. Raises DataError for a mixture."""
    unlabelled = [record.picture.name for record in source.records if record.label is None]
    if unlabelled:
        raise DataError(
            f"{len(unlabelled)} images of {options.data} have no class, e.g. {unlabelled[0]}; "
            "give a .cls or a class, or name a table's column: class_column=NAME"
        )

    by_name = isinstance(source.records[0].label, str)
    if any(isinstance(record.label, str) != by_name for record in source.records):
        raise DataError(
            f"some classes of {options.data} are numbers and some are names; "
            "give every sample the same kind"
        )
    return by_name


def _templates(source: Source, options: Options, names: list[str]) -> prompts.Templates:
    """The templates of the options, else the set's own, else the usual ones."""
    # ObjectNet is among ImageNet's relatives: clip_benchmark and wise-ft prompt it alike.
    is_imagenet = (
        imagenet.looks_like(source)
        or imagenet.is_list(options.classes)
        or imagenet.objectnet_folders(Path(options.data)) is not None
    )
    usual = "imagenet80" if is_imagenet else "photo"
    if imagenet.is_translated(options.classes):
        usual = str(options.classes)
    return checked_templates(options.templates or source.templates or usual, names)


def checked_templates(
    choice: str | list[str] | dict[str, list[str]], names: list[str]
) -> prompts.Templates:
    """The templates that are chosen, with some for every class; a DataError says what is wrong."""
    try:
        chosen = prompts.templates(choice)
        prompts.of_classes(chosen, names)
    except ValueError as error:
        raise DataError(str(error)) from error
    return chosen


def _listed_classes(options: Options) -> ClassList | None:
    """The class list that the options give, other than ImageNet's."""
    if options.classes is None:
        return None
    if isinstance(options.classes, list):
        return classes.checked(ClassList(options.classes))

    path = Path(options.classes).expanduser()
    if not path.exists():
        raise DataError(
            f"classes={options.classes!r} is neither imagenet, imagenet_zh, … nor a file with a "
            "class name a line"
        )
    return classes.read_list(path)


def _named(source: Source, options: Options) -> tuple[list[str], Tensor]:
    """Classes that the data call by name (folders, "class" in JSON)."""
    labels = [str(record.label) for record in source.records]
    if imagenet.is_list(options.classes) or (
        options.classes is None and imagenet.looks_like(source)
    ):
        which = str(options.classes or "imagenet")
        names, number = imagenet.classes_of(source, options.partial, which)
        return names, torch.tensor([number[label] for label in labels])

    # A list of the options goes before the set's own; without any the labels are the names.
    listed = _listed_classes(options)
    if listed is None and source.classes:
        listed = ClassList(source.classes, origin="classnames.txt")
    if listed is None:
        ordered = [class_name(label) for label in classes.in_order(labels)]
        names = list(dict.fromkeys(ordered))
        number = {label: names.index(class_name(label)) for label in set(labels)}
        return names, torch.tensor([number[label] for label in labels])

    number = classes.assign(labels, listed, options.data)
    return listed.names, torch.tensor([number[label] for label in labels])


def _numbered(source: Source, options: Options) -> tuple[list[str], Tensor]:
    """Classes that the data give by number (.cls, .npy, a label column)."""
    listed: ClassList | None
    if imagenet.is_list(options.classes):
        listed = ClassList(imagenet.names(str(options.classes)))
    else:
        listed = _listed_classes(options)
    names_of_set = source.classes
    names = listed.names if listed is not None else names_of_set
    if names is None:
        raise DataError(
            f"{options.data} numbers its classes but has no classnames.txt; "
            "add it (a line a name) or classes=FILE"
        )

    numbers = [_class_numbers(record.label) for record in source.records]
    highest = max((max(several) for several in numbers if several), default=0)

    # Numbers count in the set's own list where it has one.
    n_names = len(names_of_set or names)
    if highest >= n_names:
        raise DataError(
            f"{options.data} has class number {highest} but only {n_names} class names, "
            "which count from 0; complete the list"
        )

    # Where the set names its classes too, a list in another order goes by name.
    place = list(range(len(names)))
    if listed is not None and names_of_set is not None:
        number = classes.assign(names_of_set, listed, options.data)
        place = [number[name] for name in names_of_set]

    if source.multilabel:
        return names, _multi_hot(numbers, place)
    return names, torch.tensor([place[number] for (number,) in numbers])


def _class_numbers(label: int | str | tuple[int, ...] | None) -> tuple[int, ...]:
    """The classes of one image, of which a multilabel set gives several."""
    if isinstance(label, tuple):
        return label
    assert isinstance(label, int)  # `read` has seen that the labels are numbers
    return (label,)


def _multi_hot(numbers: list[tuple[int, ...]], place: list[int]) -> Tensor:
    """[n, C] bool: which classes apply. `place`: of a number in the list of classes."""
    hot = torch.zeros(len(numbers), len(place), dtype=torch.bool)
    for row, several in zip(hot, numbers):
        row[[place[number] for number in several]] = True
    return hot


# --- scores ---------------------------------------------------------------------------------------


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """Accuracies of the nearest class, or the mean average precision for several labels."""
    if context.progress and dist.is_main():
        _warn_of_numbers(data.classes)

    pictures = [record.picture for record in data.source.records]
    class_rows = class_embeddings(encoder, data.templates, data.classes, context)
    image = embed.images(encoder, pictures, context)

    result = blank_result(data, context)

    # Several labels a picture have no single right class, so no accuracy.
    if data.labels.ndim == 2:
        precision = metrics.average_precision(image @ class_rows.T, data.labels)
        result.values["mean_average_precision"] = float(precision.mean())
        result.chance["mean_average_precision"] = float(data.labels.double().mean())
    else:
        ranks = metrics.class_ranks(image, class_rows, data.labels)
        score(result, ranks, data.labels, len(class_rows))
    return result


def blank_result(data: Data, context: Context) -> TaskResult:
    """The set's name, counts and digest, without scores yet."""
    pictures = [record.picture for record in data.source.records]
    return TaskResult(
        data.source.name,
        counts={
            "images": len(pictures),
            "classes": len(data.classes),
            "templates": _n_templates(data.templates),
            "skipped": len(data.source.skipped),
        },
        digest=context.digest(pictures, data.classes, data.templates, data.labels.tolist()),
    )


def _warn_of_numbers(names: list[str]) -> None:
    # Ten classes may be digits; more that are called by numbers have lost their names.
    if len(names) > 10 and all(name.isdecimal() for name in names):
        log.warn(
            f"the classes are called {names[0]} … {names[-1]}, also in the prompts; "
            "classes=FILE names them"
        )


def _n_templates(templates: prompts.Templates) -> int:
    """How many each class has; of those with their own the most."""
    if isinstance(templates, list):
        return len(templates)
    return max(map(len, templates.values()))


def class_embeddings(
    encoder: Encoder, templates: prompts.Templates, names: list[str], context: Context
) -> Tensor:
    """[C, D] unit rows: a class is the mean of its prompts' unit rows, normalised again."""
    of_classes = prompts.of_classes(templates, names)
    text = embed.texts(encoder, list(chain.from_iterable(of_classes)), context)
    counts = [len(of_class) for of_class in of_classes]

    # A view where all have as many; else class by class.
    if len(set(counts)) == 1:
        mean = text.view(len(names), counts[0], -1).mean(1)
    else:
        mean = torch.stack([rows.mean(0) for rows in text.split(counts)])
    return torch.nn.functional.normalize(mean, dim=-1)


def score(result: TaskResult, ranks: Tensor, labels: Tensor, n_classes: int) -> None:
    """Fill in accuracies and the mean per-class recall, from the ranks of the right classes."""
    first = (ranks == 1).double()
    result.items["acc1"] = choices.accuracy(first)
    result.chance["acc1"] = 1 / n_classes

    # Among fewer than five classes the top five are all.
    if n_classes >= 5:
        result.items["acc5"] = choices.accuracy(ranks <= 5)
        result.chance["acc5"] = 5 / n_classes

    weights = metrics.per_class_weights(labels)
    result.items["mean_per_class_recall"] = torch.stack([first * weights, weights], 1)
    result.chance["mean_per_class_recall"] = 1 / n_classes
