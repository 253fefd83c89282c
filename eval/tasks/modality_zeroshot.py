"""Zero-shot classification of any modality: the class whose prompts are nearest to a sample's
sound, video or other rows, as `zeroshot` classifies pictures (Radford et al. 2021).

Data are shards whose samples have a class, with rows of further modalities beside them (`vlp data
modality`) or members that the model decodes. A modality is scored over the samples that have it, as
NAME_acc1 and so on; `acc1` is the mean over modalities.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlp.eval import metrics, modalities
from vlp.eval.embed import Context
from vlp.eval.modalities import Beside
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, shared, zeroshot

VERSION = 1
KNOWN_AS = "zeroshot_classification"
MAIN = "acc1"
_SCORES = ("acc1", "acc5", "mean_per_class_recall")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is classified, into what, and how it is said."""

    data: str  # shards
    # folders of rows by the modalities' names, as the source's `modalities`; null: members of the
    # samples, as the model reads them. At least one
    modalities: dict[str, str | None] = field(default_factory=dict)
    split: str = "test"  # which split of the data is scored
    classes: str | list[str] | None = None  # as for zeroshot
    templates: str | list[str] | dict[str, list[str]] | None = None  # as for zeroshot
    missing: Literal["error", "skip"] = "error"  # annotations without their image
    language: str = "en"  # recorded in the result


@dataclass
class Data:
    """A labelled set, and where its further rows lie."""

    labelled: zeroshot.Data
    beside: Beside


def scores(options: Options) -> list[str]:
    """Accuracies of each modality, and their mean."""
    return [MAIN, *(f"{name}_{score}" for name in options.modalities for score in _SCORES)]


def read(options: Options) -> Data:
    """Open the set and settle class names and templates; DataError for several labels a sample."""
    if not options.modalities:
        raise DataError(
            "modalities names no folder of rows; write {audio: DIR}, or {audio: null} for "
            "members that the model decodes, or take zeroshot, which classifies pictures"
        )
    labelled = zeroshot.read(shared(zeroshot.Options, options))
    if labelled.labels.ndim == 2:
        raise DataError(f"{options.data} has several labels a sample; expected one")
    return Data(labelled, modalities.read(labelled.source, options.modalities))


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """Accuracies of the nearest class for each modality."""
    labelled = data.labelled
    rows = modalities.embedded(encoder, data.beside, context)
    class_rows = zeroshot.class_embeddings(encoder, labelled.templates, labelled.classes, context)

    result = zeroshot.blank_result(labelled, context)
    if result.digest:
        result.digest = context.digest([], result.digest, modalities.digest(data.beside, encoder))
    for name, (embeddings, has) in rows.items():
        if not has.any():
            raise DataError(f"no sample of {options.data} has {name}; leave it out")
        of_modality = TaskResult(result.dataset)
        labels = labelled.labels[has]
        ranks = metrics.class_ranks(embeddings[has], class_rows, labels)
        zeroshot.score(of_modality, ranks, labels, len(class_rows))
        result.items |= {f"{name}_{key}": value for key, value in of_modality.items.items()}
        result.chance |= {f"{name}_{key}": value for key, value in of_modality.chance.items()}
        result.counts[f"samples_with_{name}"] = int(has.sum())

    sums = [result.items[f"{name}_acc1"].sum(0).tolist() for name in rows]
    result.values[MAIN] = sum(hits / total for hits, total in sums) / len(sums)
    result.chance[MAIN] = 1 / len(class_rows)
    return result
