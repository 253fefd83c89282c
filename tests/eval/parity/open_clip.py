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
        figures |= _prefixed(name, _their_retrieval(root, model, PAIRS))
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


def _their_retrieval(root: Path, theirs: Theirs, n_pairs: int) -> Figures:
    records = _records(root, n_pairs)
    images = theirs.images(theirs.pixels(records))
    texts = theirs.texts([record.captions[0] for record in records])
    return train.get_clip_metrics(images, texts, torch.tensor(1.0))


# --- ours -----------------------------------------------------------------------------------------


def ours(root: Path) -> Figures:
    """By our tasks."""
    figures: Figures = {}
    for name in MODELS:
        encoder = models.load(str(root / name))
        figures |= _prefixed(name, our_zero_shot(root, encoder))
        figures |= _prefixed(name, _our_retrieval(root, encoder, PAIRS))
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


def _our_retrieval(root: Path, encoder: Encoder, n_pairs: int) -> Figures:
    records = _records(root, n_pairs)
    context = inputs.context(root)
    images = embed.images(encoder, [record.picture for record in records], context)
    texts = embed.texts(encoder, [record.captions[0] for record in records], context)
    owner = torch.arange(len(images))
    result = TaskResult("pairs")
    retrieval.score(result, *metrics.retrieval_ranks(images, texts, owner), owner)

    figures: Figures = {}
    for direction, kind in (("image_to_text", "text"), ("text_to_image", "image")):
        for theirs, of_ours in SCORES.items():
            figures[f"{direction}_{theirs}"] = score(result, f"{kind}_retrieval_{of_ours}")
    return figures


def declared(root: Path) -> list[Declared]:
    """The median of an even number of ranks."""
    figure = "image_to_text_median_rank"
    encoder = models.load(str(root / "model"))
    n_pairs, of_ours = next(
        (n_pairs, median)
        for n_pairs in range(PAIRS - 1, 10, -2)
        if (median := _our_retrieval(root, encoder, n_pairs)[figure]) % 1
    )
    of_theirs = _their_retrieval(root, Theirs(root / "model"), n_pairs)[figure]
    return [
        Declared(
            f"{figure} of {n_pairs} pairs",
            float(of_theirs),
            of_ours,
            "the median of an even number lies between two ranks; open_clip takes the lower",
        )
    ]
