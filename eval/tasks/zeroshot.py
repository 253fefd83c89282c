"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1).

A class is the mean of its prompts' unit embeddings, made a unit vector again; a picture gets the class of highest cosine.
Scores: acc1, acc5 (from five classes on), mean_per_class_recall; for several labels a picture mean_average_precision.
Reads whatever `vlp.eval.datasets.open_source` reads, ImageNet's relatives by their folders' names included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vlp.data.tables import TableOptions
from vlp.eval import embed, imagenet, metrics, prompts
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
    split: str = "test"
    classes: str | list[str] | None = None  # names, a text file of them, or imagenet; None: the data's own
    templates: str | list[str] | None = None  # a set, a file or sentences; None: the data's own, imagenet80 or photo
    partial: bool = False  # score among some of ImageNet's classes only
    missing: Literal["error", "skip"] = "error"  # annotations without their image
    language: str = "en"


@dataclass
class Data:
    """An evaluation set with numbered classes."""

    source: Source
    classes: list[str]
    templates: list[str]
    labels: torch.Tensor  # [n] int64, or [n, C] bool for several labels


def read(options: Options) -> Data:
    """Open the set and settle class names and templates."""
    source = open_source(options.data, options.split, options.missing, options.images, options)
    if folders := imagenet.objectnet_folders(Path(options.data)):
        source = _objectnet(source, folders)
    unlabelled = [r.picture.name for r in source.records if r.label is None]
    if unlabelled:
        raise DataError(
            f"{len(unlabelled)} images of {options.data} have no class, e.g. {unlabelled[0]}; give a .cls or a class, or name a "
            "table's column: class_column=NAME"
        )
    if isinstance(source.records[0].label, str):
        classes, labels = _named(source, options)
    else:
        classes, labels = _numbered(source, options)
    is_imagenet = imagenet.looks_like(source) or options.classes == "imagenet"
    choice = options.templates or source.templates or ("imagenet80" if is_imagenet else "photo")
    try:
        templates = prompts.templates(choice)
    except ValueError as error:
        raise DataError(str(error)) from error
    return Data(source, classes, templates, labels)


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    pictures = [r.picture for r in data.source.records]
    text = embed.texts(encoder, prompts.fill(data.templates, data.classes), context)
    classes = torch.nn.functional.normalize(text.view(len(data.classes), len(data.templates), -1).mean(1), dim=-1)
    image = embed.images(encoder, pictures, context)
    n, n_classes = len(image), len(classes)
    result = TaskResult(
        data.source.name,
        counts={"images": n, "classes": n_classes, "templates": len(data.templates), "skipped": len(data.source.skipped)},
        digest=context.digest(pictures, data.classes, data.templates, data.labels.tolist()),
    )
    if data.labels.ndim == 2:
        precision = metrics.average_precision(image @ classes.T, data.labels)
        result.values["mean_average_precision"] = float(precision.mean())
        result.chance["mean_average_precision"] = float(data.labels.double().mean())
        return result
    ranks = metrics.class_ranks(image, classes, data.labels)
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
    """ObjectNet's pictures of the overlapping classes, without the red frame that marks them (2 px, as in wise-ft)."""
    kept = [
        Record(replace(r.picture, border=2), label=folders[name])
        for r in source.records
        if (name := Path(r.picture.path).parent.name) in folders
    ]
    return replace(source, records=kept, name="objectnet")


def _given(options: Options) -> list[str] | None:
    if isinstance(options.classes, str) and options.classes != "imagenet":
        path = Path(options.classes)
        if not path.is_file():
            raise DataError(f"classes={options.classes!r} is neither imagenet nor a file with a class name a line")
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list(options.classes) if isinstance(options.classes, list) else None


def _named(source: Source, options: Options) -> tuple[list[str], torch.Tensor]:
    """Classes that the data call by name (folders, "class" in JSON)."""
    if options.classes == "imagenet" or (options.classes is None and imagenet.looks_like(source)):
        classes, number = imagenet.classes_of(source, options.partial)
    else:
        present = list(dict.fromkeys(str(r.label) for r in source.records))
        names = _given(options) or source.classes
        ordered = sorted(present) if not all(p.isdigit() for p in present) else sorted(present, key=int)
        plain = {p: p.replace("_", " ").lower() for p in ordered}
        if names is None:
            classes, number = [p.replace("_", " ") for p in ordered], {p: i for i, p in enumerate(ordered)}
        elif known := {name.replace("_", " ").lower(): i for i, name in enumerate(names)}:
            classes = names
            if all(p in known for p in plain.values()):
                number = {p: known[plain[p]] for p in ordered}
            elif len(names) == len(ordered) and options.classes:
                number = {p: i for i, p in enumerate(ordered)}  # names for the folders, in their sorted order
            else:
                lost = [p for p in ordered if plain[p] not in known]
                raise DataError(
                    f"{len(names)} class names for {len(ordered)} classes in the data, {len(lost)} of them unknown by name "
                    f"({', '.join(lost[:5])}); give a name for each, in the folders' sorted order, or under the same names"
                )
    return classes, torch.tensor([number[str(r.label)] for r in source.records])


def _numbered(source: Source, options: Options) -> tuple[list[str], torch.Tensor]:
    """Classes that the data give by number (.cls, .npy, a label column)."""
    names = imagenet.names() if options.classes == "imagenet" else _given(options)
    if names is not None and source.classes is not None and len(names) != len(source.classes):
        raise DataError(f"classes= lists {len(names)} names but {options.data} has {len(source.classes)} classes")
    names = names or source.classes
    if names is None:
        raise DataError(f"{options.data} numbers its classes but has no classnames.txt; add it (a line a name) or classes=FILE")
    if source.multilabel:
        numbers = [set(r.label) for r in source.records]  # type: ignore[arg-type]
        highest = max((max(s) for s in numbers if s), default=0)
    else:
        numbers = [r.label for r in source.records]
        highest = max(numbers)  # type: ignore[type-var]
    if highest >= len(names):
        raise DataError(f"{options.data} has class number {highest} but only {len(names)} class names; complete the list")
    if source.multilabel:
        return names, torch.tensor([[c in s for c in range(len(names))] for s in numbers])
    return names, torch.tensor(numbers)
