"""Effective robustness (Taori et al. 2020): accuracy on a shifted set beyond what its accuracy on
the standard set leads to expect of a model.

    acc1_standard, acc1_shifted   zero-shot accuracies as of `zeroshot`, among the same classes
    expected_acc1_shifted         on the line of the reference models in logits
    effective_robustness          acc1_shifted − expected_acc1_shifted; 0 is on the line
    reference_residual            how far reference models lie off their own line, as a deviation

The references are yours: `reference` names a table with the columns standard and shifted (shares),
or results.json files of several models; none are shipped, and the number means what they are. It
says nothing where the model's standard accuracy lies outside of theirs. Without `reference` the two
accuracies are scored, which makes such files. The interval draws both sets' pictures anew and keeps
the line. Protocol and fit: vlp.eval.robustness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp import dist, log
from vlp.eval import choices, confidence, embed, metrics, robustness
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.robustness import Line
from vlp.eval.tasks import TaskResult, shared, zeroshot

VERSION = 1
KNOWN_AS = "zeroshot_classification"
MAIN = "effective_robustness"
SCORES = (
    *robustness.SCORES,
    "effective_robustness",
    "expected_acc1_shifted",
    "reference_residual",
)


@dataclass(frozen=True)
class Options(zeroshot.Options):
    """The two sets, and the reference models; the other keys hold for both sets."""

    shifted: str = ""  # the shifted set, as data
    shifted_images: str | None = None  # as images, of the shifted set
    shifted_split: str | None = None  # None: as split
    # a table with standard and shifted, results.json files, or a folder of them; None: no line
    reference: str | list[str] | None = None


@dataclass
class Data:
    """Both sets with the same classes, and the line of the references."""

    standard: zeroshot.Data
    shifted: zeroshot.Data
    line: Line | None


def read(options: Options) -> Data:
    """Open both sets; their classes must be the same. Fit the line."""
    if not options.shifted:
        raise DataError(f"data={options.data} is the standard set; give the other as shifted=PATH")
    standard = zeroshot.read(shared(zeroshot.Options, options))
    other = {
        "data": options.shifted,
        "images": options.shifted_images,
        "split": options.shifted_split or options.split,
    }
    shifted = zeroshot.read(shared(zeroshot.Options, options, **other))

    for data, place in ((standard, options.data), (shifted, options.shifted)):
        if data.labels.ndim == 2:
            raise DataError(f"{place} has several labels an image; robustness needs one")
    in_one_only = sorted(set(standard.classes) ^ set(shifted.classes))
    if in_one_only:
        raise DataError(
            f"{options.data} and {options.shifted} have different classes: "
            f"{', '.join(in_one_only[:5])}; give both the same with classes=FILE, or a standard "
            "set of the shifted one's classes and partial=true"
        )

    line = None
    if options.reference is not None:
        names = (standard.source.name, shifted.source.name)
        line = robustness.read(options.reference, names)
    return Data(standard, shifted, line)


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """Both accuracies, and the distance from the line."""
    sets = {"acc1_standard": data.standard, "acc1_shifted": data.shifted}
    result = TaskResult(f"{data.standard.source.name} → {data.shifted.source.name}")
    for name, of_set in sets.items():
        result.items[name] = choices.accuracy(_hits(encoder, of_set, context))
        result.chance[name] = 1 / len(of_set.classes)

    result.counts = {
        "standard_images": len(data.standard.labels),
        "shifted_images": len(data.shifted.labels),
        "classes": len(data.standard.classes),
        "skipped": len(data.standard.source.skipped) + len(data.shifted.source.skipped),
    }
    digests = [zeroshot.blank_result(of_set, context).digest for of_set in sets.values()]
    result.digest = context.digest([], digests, data.line)
    if data.line is not None:
        result.counts["reference_models"] = data.line.n
        _score_against(data.line, result, quiet=not context.progress)
    return result


def _hits(encoder: Encoder, data: zeroshot.Data, context: Context) -> Tensor:
    """[n] bool: whether a picture gets its class."""
    class_rows = zeroshot.class_embeddings(encoder, data.templates, data.classes, context)
    pictures = [record.picture for record in data.source.records]
    image = embed.images(encoder, pictures, context)
    return metrics.class_ranks(image, class_rows, data.labels) == 1


def _score_against(line: Line, result: TaskResult, quiet: bool) -> None:
    """Fill in the distance from the references' line and its interval."""
    standard_items, shifted_items = (result.items[name] for name in robustness.SCORES)
    standard, shifted = confidence.score(standard_items), confidence.score(shifted_items)
    if not line.lowest <= standard <= line.highest and not quiet and dist.is_main():
        log.warn(
            f"the standard accuracy {standard:.4f} lies outside of the references' "
            f"({line.lowest:.4f} … {line.highest:.4f}); there the line says little"
        )

    # Half a picture from 0 and 1, where the logit has no value.
    margin = 0.5 / len(standard_items)
    drawn_standard = confidence.resampled(standard_items).clamp(margin, 1 - margin)
    drawn_shifted = confidence.resampled(shifted_items, seed=1)
    bounds = confidence.middle(drawn_shifted - line.expected(drawn_standard))

    inside = torch.tensor(standard, dtype=torch.float64).clamp(margin, 1 - margin)
    expected = float(line.expected(inside))
    result.values["effective_robustness"] = shifted - expected
    result.values["expected_acc1_shifted"] = expected
    result.values["reference_residual"] = line.residual
    result.intervals["effective_robustness"] = bounds
