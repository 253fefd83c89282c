"""open_clip's zero-shot classifier, and the retrieval that its trainer measures."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip_train import train, zero_shot
from torch import Tensor

from tests.eval.parity import inputs
from tests.eval.parity.compare import Declared, Figures
from vlp import plugin
from vlp.eval import embed, metrics, models
from vlp.eval.datasets.source import Record
from vlp.eval.models import Encoder
from vlp.eval.result import TaskResult
from vlp.eval.tasks import retrieval, zeroshot

PEER = "open_clip_torch"
MODELS = ("model", "siglip")
PAIRS = inputs.N_CAPTIONED  # an odd number: see `declared`
CLOSE, COLLAPSED = 0.3, 0.03  # how far rows lie from their centre
Pairs = tuple[Tensor, Tensor]  # [n, D] unit rows of photos and of their captions
SCORES = {  # our names of the trainer's scores
    "mean_rank": "mean_rank",
    "median_rank": "median_rank",
    "R@1": "recall@1",
    "R@5": "recall@5",
    "R@10": "recall@10",
}


def obstacle() -> str | None:
    """Why its code cannot run here; None: it can."""
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"its accuracy fails on numpy {np.__version__}; it needs one before 2.4"
    return None


def _zeroshot(root: Path) -> tuple[Any, zeroshot.Data]:
    """The task as `vlp eval` reads it, and its data."""
    options = {"zeroshot": {"data": str(root / "zeroshot")}}
    (task,) = plugin.keyed("vlp.eval.tasks", options)
    return task, task.module.read(task.options)


def _records(root: Path, n_pairs: int) -> list[Record]:
    """Photos, of whose captions the first counts."""
    return retrieval.read(retrieval.Options(str(root / "retrieval"))).records[:n_pairs]


def gathered(pairs: Pairs, apart: float) -> Pairs:
    """The pairs of a model that says nearly the same of everything: rows around one of them."""
    centre = torch.ones(pairs[0].shape[1], dtype=torch.float64)
    centre /= centre.norm()
    images, texts = (
        torch.nn.functional.normalize(centre + apart * rows.double(), dim=1) for rows in pairs
    )
    return images, texts


# --- theirs ---------------------------------------------------------------------------------------


class Theirs:
    """A folder's model as open_clip loads it."""

    def __init__(self, folder: Path) -> None:
        reference = f"local-dir:{folder}"
        self.model, _, self.transform = open_clip.create_model_and_transforms(
            reference, output_dict=True
        )
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(reference)

    def pixels(self, records: list[Record]) -> Tensor:
        return torch.stack([self.transform(record.picture.open()) for record in records])

    def images(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.encode_image(pixels, normalize=True)

    def texts(self, texts: list[str]) -> Tensor:
        with torch.no_grad():
            return self.model.encode_text(self.tokenizer(texts), normalize=True)


def theirs(root: Path) -> Figures:
    """By open_clip's classifier and its trainer's functions."""
    figures: Figures = {}
    for name in MODELS:
        model = Theirs(root / name)
        figures |= _prefixed(name, _their_zero_shot(root, model))
        pairs = _their_pairs(root, model, PAIRS)
        figures |= _prefixed(name, _their_retrieval(pairs))
        figures |= _prefixed(f"{name}, close rows", _their_retrieval(gathered(pairs, CLOSE)))
    return figures


def _prefixed(name: str, figures: Figures) -> Figures:
    return {f"{name}: {figure}": value for figure, value in figures.items()}


def _their_zero_shot(root: Path, theirs: Theirs) -> Figures:
    _, data = _zeroshot(root)
    classifier = open_clip.build_zero_shot_classifier(
        theirs.model, theirs.tokenizer, data.classes, data.templates
    )
    pixels = theirs.pixels(data.source.records)
    batches = list(zip(pixels.split(64), data.labels.split(64)))
    settings = Namespace(device="cpu", precision="fp32", batch_size=64)
    acc1, acc5 = zero_shot.run(theirs.model, classifier, batches, settings)
    return {
        "zero-shot classifier": classifier.T,
        "cosines with the classes": theirs.images(pixels) @ classifier,
        "acc1": acc1,
        "acc5": acc5,
    }


def _their_pairs(root: Path, theirs: Theirs, n_pairs: int) -> Pairs:
    records = _records(root, n_pairs)
    images = theirs.images(theirs.pixels(records))
    return images, theirs.texts([record.captions[0] for record in records])


def _their_retrieval(pairs: Pairs) -> Figures:
    return train.get_clip_metrics(*pairs, torch.tensor(1.0))


# --- ours -----------------------------------------------------------------------------------------


def ours(root: Path) -> Figures:
    """By our tasks."""
    figures: Figures = {}
    for name in MODELS:
        encoder = models.load(str(root / name))
        figures |= _prefixed(name, our_zero_shot(root, encoder))
        pairs = _our_pairs(root, encoder, PAIRS)
        figures |= _prefixed(name, _our_retrieval(pairs))
        figures |= _prefixed(f"{name}, close rows", _our_retrieval(gathered(pairs, CLOSE)))
    return figures


def our_zero_shot(root: Path, encoder: Encoder) -> Figures:
    task, data = _zeroshot(root)
    context = inputs.context(root)
    classes = zeroshot.class_embeddings(encoder, data.templates, data.classes, context)
    images = embed.images(encoder, [r.picture for r in data.source.records], context)
    result = task.module.run(encoder, data, task.options, context)
    return {
        "zero-shot classifier": classes,
        "cosines with the classes": images @ classes.T,
        "acc1": score(result, "acc1"),
        "acc5": score(result, "acc5"),
    }


def score(result: TaskResult, name: str) -> float:
    """A score of a task, by its name."""
    if name in result.values:
        return result.values[name]
    numerator, denominator = result.items[name].sum(0)
    return float(numerator / denominator)


def _our_pairs(root: Path, encoder: Encoder, n_pairs: int) -> Pairs:
    records = _records(root, n_pairs)
    context = inputs.context(root)
    images = embed.images(encoder, [record.picture for record in records], context)
    return images, embed.texts(encoder, [record.captions[0] for record in records], context)


def _our_retrieval(pairs: Pairs) -> Figures:
    images, texts = pairs
    owner = torch.arange(len(images))
    result = TaskResult("pairs")
    retrieval.score(result, *metrics.retrieval_ranks(images, texts, owner), owner)

    figures: Figures = {}
    for direction, kind in (("image_to_text", "text"), ("text_to_image", "image")):
        for theirs, of_ours in SCORES.items():
            figures[f"{direction}_{theirs}"] = score(result, f"{kind}_retrieval_{of_ours}")
    return figures


def declared(root: Path) -> list[Declared]:
    """The median of an even number of ranks, and near ties of a model that has collapsed."""
    figure = "image_to_text_median_rank"
    encoder, model = models.load(str(root / "model")), Theirs(root / "model")
    for n_pairs in range(PAIRS - 1, 10, -2):
        of_ours = _our_retrieval(_our_pairs(root, encoder, n_pairs))[figure]
        if of_ours % 1:
            break
    median = Declared(
        f"{figure} of {n_pairs} pairs",
        float(_their_retrieval(_their_pairs(root, model, n_pairs))[figure]),
        of_ours,
        "the median of an even number lies between two ranks; open_clip takes the lower",
    )

    pairs = gathered(_our_pairs(root, encoder, PAIRS), COLLAPSED)
    theirs, ours = _their_retrieval(pairs), _our_retrieval(pairs)
    reason = "scores within a thousandth of their spread are a tie, which counts against the model"
    return [median] + [
        Declared(f"{figure} of nearly collapsed rows", float(theirs[figure]), ours[figure], reason)
        for figure in ("image_to_text_mean_rank", "text_to_image_R@1")
    ]
