"""Image-text retrieval with several captions an image (Karpathy and Fei-Fei 2015; COCO, Flickr30k,
Flickr8k).

Text retrieval counts an image as found if any of its captions is among the k best of all captions;
image retrieval is counted over captions, each of which seeks its one image. Ranks are exact; a tie
counts against the model (vlp.eval.metrics).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vlp.data.captions import Texts
from vlp.data.tables import TableOptions
from vlp.eval import embed, metrics
from vlp.eval.datasets import Source, join_equal_pictures, open_source
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 2  # 1 took equal pictures for several images
KNOWN_AS = "zeroshot_retrieval"
KS = (1, 5, 10)


@dataclass(frozen=True)
class Options(Texts, TableOptions):
    """Which images and captions. `captions` and `lines`: which texts of shards are captions."""

    # shards, a folder, or a table of any kind: CSV, JSONL, COCO's and Karpathy's JSON
    # (vlp.eval.datasets)
    data: str
    images: str | None = None  # where a table's images are: a folder or a .tar; None: beside it
    split: str = "test"  # which split of the data is scored
    captions_per_image: int | None = None  # the first so many; None: all
    missing: Literal["error", "skip"] = (
        "error"  # annotations without their image, images without a caption
    )
    language: str = "en"  # recorded in the result

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.captions, dict):
            raise ValueError(
                f"captions is {self.captions}; shares have no meaning in evaluation: give a list of names"
            )
        if self.captions_per_image is not None and self.captions_per_image < 1:
            raise ValueError(
                f"captions_per_image is {self.captions_per_image}; expected at least 1"
            )


def read(options: Options) -> Source:
    """Open the set; every image must have a caption."""
    source = open_source(
        options.data, options.split, options.missing, options.images, options, options
    )
    source, n_joined = join_equal_pictures(source)
    spoken = [r for r in source.records if any(caption.strip() for caption in r.captions)]
    silent = [
        r.picture.name for r in source.records if not any(caption.strip() for caption in r.captions)
    ]
    if not spoken:
        raise DataError(
            f"none of the {len(source.records)} images of {options.data} has a caption; if their "
            "captions are in a table, name it: --data TABLE images=FOLDER"
        )
    if silent and options.missing == "error":
        raise DataError(
            f"{len(silent)} of {len(source.records)} images have no caption, e.g. {silent[0]}; add one, remove the image, or "
            "pass missing=skip to evaluate without them"
        )
    return replace(source, records=spoken, skipped=[*source.skipped, *silent], n_joined=n_joined)


def run(encoder: Any, data: Source, options: Options, context: embed.Context) -> TaskResult:
    pictures = [r.picture for r in data.records]
    captions = [list(r.captions[: options.captions_per_image]) for r in data.records]
    owner = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])
    image = embed.images(encoder, pictures, context)
    text = embed.texts(encoder, [caption for texts in captions for caption in texts], context)
    image_rank, text_rank = metrics.retrieval_ranks(image, text, owner)
    result = TaskResult(
        data.name,
        counts={"images": len(image), "captions": len(text), "skipped": len(data.skipped)},
        digest=context.digest(pictures, captions),
    )
    if data.n_joined:
        result.counts["equal_pictures_joined"] = data.n_joined
    per_image = torch.bincount(owner, minlength=len(image)).double()

    def by_image(values: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(image), dtype=torch.float64).index_add_(0, owner, values.double())
        return torch.stack(
            [sums, per_image], 1
        )  # an image and its captions are drawn together in the bootstrap

    one = torch.ones(len(image), dtype=torch.float64)
    for k in KS:
        result.items[f"image_retrieval_recall@{k}"] = by_image(text_rank <= k)
        result.items[f"text_retrieval_recall@{k}"] = torch.stack(
            [(image_rank <= k).double(), one], 1
        )
        result.chance[f"image_retrieval_recall@{k}"] = min(1.0, k / len(image))
        result.chance[f"text_retrieval_recall@{k}"] = _chance_any(per_image, len(text), k)
    result.items["image_retrieval_mean_rank"] = by_image(text_rank)
    result.items["text_retrieval_mean_rank"] = torch.stack([image_rank.double(), one], 1)
    result.values["image_retrieval_median_rank"] = float(text_rank.double().quantile(0.5))
    result.values["text_retrieval_median_rank"] = float(image_rank.double().quantile(0.5))
    return result


def _chance_any(own: torch.Tensor, total: int, k: int) -> float:
    """Mean over images of 1 − C(total − own, k) / C(total, k): some own caption among k drawn at
    random.
    """
    counts, sizes = own.unique(return_counts=True)
    draws = math.comb(total, min(k, total))
    missed = [math.comb(total - int(c), min(k, total)) / draws for c in counts]
    return 1 - sum(m * int(s) for m, s in zip(missed, sizes)) / len(own)
