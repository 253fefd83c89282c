"""mteb's tasks over our models, and our own figures on the same sets."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from tests.eval.parity import inputs
from tests.eval.parity.compare import Declared, Figures
from vlp.eval import embed, metrics, models, probes, ranked
from vlp.eval.datasets.source import Record
from vlp.eval.tasks import retrieval, winoground, zeroshot

PEER = "mteb"
PLACES = 5  # to which mteb rounds the scores of retrieval: ours are rounded as well
KS = (1, 5, 10)
TEMPLATE = "a photo of a {}."


def theirs(root: Path) -> Figures:
    """By mteb's evaluation of our model."""
    # mteb takes seconds to import, and our figures need nothing of it.
    from tests.eval.parity import mteb_tasks

    return mteb_tasks.theirs(root)


# --- data -----------------------------------------------------------------------------------------


def captioned(root: Path) -> list[Record]:
    return retrieval.read(retrieval.Options(str(root / "retrieval"))).records


def labelled(root: Path, name: str, split: str) -> zeroshot.Data:
    return zeroshot.read(zeroshot.Options(str(root / name), split=split))


def present(data: zeroshot.Data) -> tuple[list[str], Tensor]:
    """The classes that have a picture, and the labels among them."""
    numbers = data.labels.unique()
    return [data.classes[number] for number in numbers], torch.searchsorted(numbers, data.labels)


# --- ours -----------------------------------------------------------------------------------------


def ours(root: Path) -> Figures:
    """By our metrics."""
    encoder = models.load(str(root / "model"))
    context = inputs.context(root)
    records = captioned(root)
    images = embed.images(encoder, [record.picture for record in records], context)
    captions = list(chain.from_iterable(record.captions for record in records))
    texts = embed.texts(encoder, captions, context)
    counts = torch.tensor([len(record.captions) for record in records])
    owner = torch.arange(len(records)).repeat_interleave(counts)
    image_ranks, text_ranks = metrics.retrieval_ranks(images, texts, owner)
    of_photos = [(owner == number).nonzero()[:, 0].tolist() for number in range(len(records))]
    of_captions = [[number] for number in owner.tolist()]

    figures: Figures = {}
    figures |= _of_ranks("captions to photos", "recall", text_ranks)
    figures |= _of_lists("captions to photos", texts, images, of_captions)
    figures |= _of_ranks("photos to captions", "hit_rate", image_ranks)
    figures |= _of_lists("photos to captions", images, texts, of_photos)
    lists = list(ranked.found(images, texts, of_photos, 10))
    shares = [float(hits[:10].sum()) / len(right) for hits, right in zip(lists, of_photos)]
    figures["photos to captions: recall_at_10"] = round(sum(shares) / len(shares), PLACES)

    figures |= _our_zero_shot(root)
    figures |= _our_probes(root)
    result = winoground.run(
        encoder,
        winoground.read(winoground.Options(str(root / "winoground"))),
        winoground.Options(str(root / "winoground")),
        context,
    )
    for theirs, of_ours in (
        ("text_acc", "text_acc"),
        ("image_acc", "image_acc"),
        ("accuracy", "acc"),
    ):
        figures[f"winoground: {theirs}"] = float(result.items[of_ours][:, 0].mean())
    return figures


def _of_ranks(name: str, score: str, ranks: Tensor) -> Figures:
    """What the rank of the first right answer says."""
    figures: Figures = {
        f"{name}: {score}_at_{k}": round(float((ranks <= k).double().mean()), PLACES) for k in KS
    }
    reciprocal = torch.where(ranks <= 10, 1 / ranks.double(), 0)
    return figures | {f"{name}: mrr_at_10": reciprocal.mean()}


def _of_lists(name: str, queries: Tensor, candidates: Tensor, right: list[list[int]]) -> Figures:
    """What the places of all right answers say."""
    lists = list(ranked.found(queries, candidates, right, 10))
    gains = [
        ranked.ndcg(hits.double(), torch.ones(len(places)), 10)
        for hits, places in zip(lists, right)
    ]
    belongs = torch.zeros(len(candidates), len(queries), dtype=torch.bool)
    for query, places in enumerate(right):
        belongs[places, query] = True
    precision = metrics.average_precision(candidates @ queries.T, belongs)
    return {
        f"{name}: ndcg_at_10": round(sum(gains) / len(gains), PLACES),
        f"{name}: map_at_1000": round(float(precision.mean()), PLACES),
    }


def _our_zero_shot(root: Path, absent: bool = False) -> Figures:
    data = labelled(root, "zeroshot", "test")
    names, labels = (data.classes, data.labels) if absent else present(data)
    encoder = models.load(str(root / "model"))
    context = inputs.context(root)
    classes = zeroshot.class_embeddings(encoder, [TEMPLATE], names, context)
    images = embed.images(encoder, [r.picture for r in data.source.records], context)
    return _of_answers("zero-shot", metrics.nearest(images, classes), labels)


def _of_answers(name: str, answers: Tensor, labels: Tensor) -> Figures:
    """Accuracy, mean per-class recall and macro F1."""
    hits = (answers == labels).double()
    weights = metrics.per_class_weights(labels)
    return {
        f"{name}: accuracy": hits.mean(),
        f"{name}: f1": metrics.macro_f1(answers, labels),
        f"{name}: recall": (hits * weights).sum() / weights.sum(),
    }


def _our_probes(root: Path) -> Figures:
    encoder = models.load(str(root / "model"))
    rows, labels = {}, {}
    for split in ("train", "test"):
        data = labelled(root, "probe", split)
        pictures = [record.picture for record in data.source.records]
        rows[split] = embed.images(encoder, pictures, inputs.context(root))
        labels[split] = data.labels
    n_classes = int(labels["train"].max()) + 1

    # scikit-learn's C of 1 over the sum of losses, as a decay of their mean.
    decay = 1 / len(rows["train"])
    weight, bias = probes.logistic_regression(rows["train"], labels["train"], n_classes, decay)
    linear = (rows["test"].double() @ weight.T + bias).argmax(1)
    nearest = labels["train"][metrics.nearest(rows["test"], rows["train"])]
    figures = _of_answers("linear", linear, labels["test"])
    return figures | _of_answers("nearest neighbour", nearest, labels["test"])


def declared(root: Path) -> list[Declared]:
    """The mean over classes of which one has no picture."""
    from tests.eval.parity import mteb_tasks

    return [
        Declared(
            "zero-shot recall where a class has no picture",
            mteb_tasks.recall_with_absent(root),
            float(_our_zero_shot(root, absent=True)["zero-shot: recall"]),
            "the mean is over the classes that have pictures; an empty one counts as 0 there",
        )
    ]
