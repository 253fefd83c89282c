"""Retrieval between any two modalities: A_to_B is the share of samples whose B is among the k best
of all Bs, over the samples that have both; `mean_recall` is the mean of R@1, R@5 and R@10 over all
directions.

Data are shards, with rows of further modalities beside them (`vlp data modality`) or members that
the model decodes, and a run whose model has towers for them. Image and text are compared as in the
task `retrieval`, which joins equal pictures, where here every sample is one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vlp.data.captions import Texts
from vlp.eval import embed, metrics, modalities
from vlp.eval.datasets import open_source
from vlp.eval.datasets.source import Source
from vlp.eval.embed import Context
from vlp.eval.modalities import Beside
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, retrieval

VERSION = 1
KNOWN_AS = "zeroshot_retrieval"
MAIN = "mean_recall"
_RECALLS = ("recall@1", "recall@5", "recall@10", "mean_recall")


@dataclass(frozen=True)
class Options(Texts):
    """Which samples and modalities. `captions` and `lines`: which texts are captions."""

    data: str  # shards
    # folders of rows by the modalities' names, as the source's `modalities`; null: members of the
    # samples, as the model reads them
    modalities: dict[str, str | None] = field(default_factory=dict)
    # all, or names two by two: [[text, audio], [image, audio]]
    pairs: list[tuple[str, str]] | Literal["all"] = "all"
    split: str = "test"  # which split of the data is scored

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted({name for pair in self.chosen for name in pair} - set(self.modality_names))
        if unknown or not self.chosen or any(a == b for a, b in self.chosen):
            raise ValueError(
                f"pairs is {self.pairs}; expected pairs of two of {', '.join(self.modality_names)}"
            )

    @property
    def modality_names(self) -> list[str]:
        """Of all modalities."""
        return ["image", "text", *self.modalities]

    @property
    def chosen(self) -> list[tuple[str, str]]:
        """The pairs that are compared."""
        if self.pairs == "all":
            return list(itertools.combinations(self.modality_names, 2))
        return list(self.pairs)


@dataclass
class Data:
    """The samples, and where their further rows lie."""

    source: Source
    beside: Beside


def scores(options: Options) -> list[str]:
    """The recalls of both directions of every pair."""
    ways = [way for a, b in options.chosen for way in (f"{a}_to_{b}", f"{b}_to_{a}")]
    return [MAIN, *(f"{way}_{recall}" for way in ways for recall in _RECALLS)]


def read(options: Options) -> Data:
    """Open the set; every sample must have a caption."""
    source = open_source(options.data, options.split, texts=options)
    source = retrieval.with_captions(source, options.data, "error")
    return Data(source, modalities.read(source, options.modalities))


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """Recalls of both directions of every pair."""
    pictures = [record.picture for record in data.source.records]
    captions = [list(record.captions) for record in data.source.records]
    rows = modalities.embedded(encoder, data.beside, context)

    everywhere = torch.ones(len(pictures), dtype=torch.bool)
    named = {name for pair in options.chosen for name in pair}
    if "text" in named:
        # The first caption is the text: what other modalities have one of.
        first = [of_sample[0] for of_sample in captions]
        rows["text"] = embed.texts(encoder, first, context), everywhere
    if "image" in named:
        rows["image"] = embed.images(encoder, pictures, context), everywhere

    result = TaskResult(
        data.source.name,
        counts={"samples": len(pictures), "skipped": len(data.source.skipped)},
        digest=context.digest(pictures, captions, modalities.digest(data.beside, encoder)),
    )
    means = []
    for a, b in options.chosen:
        means += _score(result, a, b, rows[a], rows[b])
    result.values[MAIN] = sum(means) / len(means)
    return result


def _score(
    result: TaskResult,
    a: str,
    b: str,
    of_a: tuple[Tensor, Tensor],  # [n, D], and who has it [n]
    of_b: tuple[Tensor, Tensor],
) -> list[float]:
    """Fill in the recalls of a pair; returns the mean recall of both directions."""
    both = of_a[1] & of_b[1]
    if not both.any():
        raise DataError(f"no sample of {result.dataset} has both {a} and {b}; leave the pair out")
    result.counts[f"samples_with_{a}_and_{b}"] = int(both.sum())

    # As images and their one caption each.
    owner = torch.arange(int(both.sum()))
    of_pair = TaskResult(result.dataset)
    ranks = metrics.retrieval_ranks(of_a[0][both], of_b[0][both], owner)
    retrieval.score(of_pair, *ranks, owner)

    means = []
    for ours, theirs in ((f"{a}_to_{b}", "text"), (f"{b}_to_{a}", "image")):
        for recall in _RECALLS:
            result.items[f"{ours}_{recall}"] = of_pair.items[f"{theirs}_retrieval_{recall}"]
            result.chance[f"{ours}_{recall}"] = of_pair.chance[f"{theirs}_retrieval_{recall}"]
        numerator, denominator = result.items[f"{ours}_mean_recall"].sum(0).tolist()
        means.append(numerator / denominator)
    return means
