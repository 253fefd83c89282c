"""Image-text retrieval with several captions an image (Karpathy and Fei-Fei 2015; COCO, Flickr30k,
Flickr8k).

Text retrieval counts an image as found if any of its captions is among the k best of all captions;
image retrieval is counted over captions, each of which seeks its one image. `mean_recall` is the
mean of R@1, R@5 and R@10 one way, as Chinese-CLIP reports it. Ranks are exact; a tie counts against
the model (vlp.eval.metrics).

With `stored_as` the recalls are also those of a search over embeddings of a byte or a bit a number,
of which the k·`rescore` best are compared as floats (vlp.eval.quantised), as *_int8 and *_binary
beside the float's; the counts say what the embeddings take.

With `certainty` R@1 is also that of the share of queries that is most certain (`recall@1_of_50%`),
and `certainty_spearman` says whether it rises with certainty, over ten bins (vlp.eval.certainty).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from vlp.data.captions import Texts
from vlp.data.tables import TableOptions
from vlp.eval import certainty, embed, metrics, quantised
from vlp.eval.datasets import open_source
from vlp.eval.datasets.source import Record, Source, join_equal_pictures
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult

VERSION = 3  # 1 took equal pictures for several images; 2 tied what a collapsed model tells apart
KNOWN_AS = "zeroshot_retrieval"
MAIN = "image_retrieval_recall@1"
KS = (1, 5, 10)
_OF_RANKS = (*(f"recall@{k}" for k in KS), "mean_recall", "mean_rank", "median_rank")
_OF_HITS = (*(f"recall@{k}" for k in KS), "mean_recall")
WAYS = ("image", "text")
OF_FLOAT = tuple(f"{way}_retrieval_{name}" for way in WAYS for name in _OF_RANKS)


@dataclass(frozen=True)
class Options(Texts, TableOptions):
    """Which images and captions. `captions` and `lines`: which texts of shards are captions."""

    # shards, a folder, or a table of any kind: CSV, JSONL, COCO's and Karpathy's JSON
    # (vlp.eval.datasets)
    data: str
    images: str | None = None  # where a table's images are: a folder or a .tar; None: beside it
    split: str = "test"  # which split of the data is scored
    captions_per_image: int | None = None  # the first so many; None: all
    # annotations without their image, images without a caption
    missing: Literal["error", "skip"] = "error"
    language: str = "en"  # recorded in the result
    # also search embeddings of fewer bits: int8, a byte a number; binary, a bit
    stored_as: list[Literal["int8", "binary"]] = field(default_factory=list)
    # m: of the k·m best by those, the k best by float; 1: none but the k
    rescore: int = 4

    # how certain queries are: adapter.safetensors of `vlp data certainty`, or model, for what a run
    # with model.heads.concentration says itself; None: not asked
    certainty: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.stored_as)) < len(self.stored_as):
            raise ValueError(f"stored_as is {self.stored_as}; name each kind once")
        if self.rescore < 1:
            raise ValueError(f"rescore is {self.rescore}; expected at least 1")
        if isinstance(self.captions, dict):
            raise ValueError(
                f"captions is {self.captions}; shares and roles have no meaning in evaluation: "
                "give a list of names"
            )
        if self.captions_per_image is not None and self.captions_per_image < 1:
            raise ValueError(
                f"captions_per_image is {self.captions_per_image}; expected at least 1"
            )


def scores(options: Options) -> list[str]:
    """The recalls and ranks both ways, and the recalls of embeddings of fewer bits."""
    of_hits = [f"{way}_retrieval_{name}" for way in WAYS for name in _OF_HITS]
    of_certainty = [] if options.certainty is None else [*map(certainty.names, WAYS)]
    stored = [f"{name}_{kind}" for kind in options.stored_as for name in of_hits]
    return [*OF_FLOAT, *stored, *chain.from_iterable(of_certainty)]


def read(options: Options) -> Source:
    """Open the set; every image must have a caption."""
    if options.certainty is not None:
        certainty.check(options.certainty)
    source = open_source(
        options.data, options.split, options.missing, options.images, options, options
    )

    # Copies of a picture would tie with each other, and a tie counts against every model.
    source, n_joined = join_equal_pictures(source)
    return replace(with_captions(source, options.data, options.missing), n_joined=n_joined)


def with_captions(source: Source, data: str, missing: str) -> Source:
    """The images of a set that have a caption; a DataError where some have none, unless they may be
    left out.
    """
    with_caption = [record for record in source.records if _has_caption(record)]
    silent = [record.picture.name for record in source.records if not _has_caption(record)]
    if not with_caption:
        raise DataError(
            f"none of the {len(source.records)} images of {data} has a caption{source.unread}; if "
            "their captions are in a table, name it: --data TABLE images=FOLDER"
        )
    if silent and missing == "error":
        raise DataError(
            f"{len(silent)} of {len(source.records)} images have no caption, e.g. {silent[0]}; "
            "add one, remove the image, or pass missing=skip to evaluate without them"
            f"{source.unread}"
        )
    return replace(source, records=with_caption, skipped=[*source.skipped, *silent])


def _has_caption(record: Record) -> bool:
    return any(caption.strip() for caption in record.captions)


def run(encoder: Encoder, data: Source, options: Options, context: Context) -> TaskResult:
    """Recalls and ranks both ways, over all images and captions of the split."""
    pictures = [record.picture for record in data.records]
    captions = [list(record.captions[: options.captions_per_image]) for record in data.records]
    every_caption = list(chain.from_iterable(captions))
    n_captions = torch.tensor([len(of_image) for of_image in captions])
    owner = torch.arange(len(captions)).repeat_interleave(n_captions)

    # Texts first: where the model cannot read them, no time goes into pictures.
    text = embed.texts(encoder, every_caption, context)
    image = embed.images(encoder, pictures, context)
    image_rank, text_rank = metrics.retrieval_ranks(image, text, owner)

    result = TaskResult(
        data.name,
        counts={
            "images": len(image),
            "captions": len(text),
            "skipped": len(data.skipped),
        },
        digest=context.digest(pictures, captions),
    )
    if data.n_joined:
        result.counts["equal_pictures_joined"] = data.n_joined
    score(result, image_rank, text_rank, owner)
    if options.stored_as:
        score_stored(result, image, text, owner, options)
    if options.certainty is not None:
        rows = {"image": image, "text": text}
        of_queries = certainty.of_queries(
            options.certainty, encoder, rows, pictures, every_caption, context
        )
        # An image seeks its texts, and a text its image.
        for way, side, rank in (("text", "image", image_rank), ("image", "text", text_rank)):
            result.values |= certainty.scores(way, rank == 1, of_queries[side])
    return result


def score(
    result: TaskResult,
    image_rank: Tensor,  # [N] of each image's best caption
    text_rank: Tensor,  # [M] of each caption's image
    owner: Tensor,  # [M] the image of each caption
) -> None:
    """Fill in recalls, mean and median ranks both ways, and the recalls' chance."""
    k = torch.tensor(KS)
    n_images = len(image_rank)
    _score_recalls(result, image_rank.unsqueeze(1) <= k, text_rank.unsqueeze(1) <= k, owner)

    result.items["image_retrieval_mean_rank"] = _by_image(text_rank, owner, n_images)
    result.items["text_retrieval_mean_rank"] = _of_images(image_rank)
    result.values["image_retrieval_median_rank"] = float(text_rank.double().quantile(0.5))
    result.values["text_retrieval_median_rank"] = float(image_rank.double().quantile(0.5))


def score_stored(
    result: TaskResult,
    image: Tensor,  # [N, D]
    text: Tensor,  # [M, D]
    owner: Tensor,  # [M] the image of each caption
    options: Options,
) -> None:
    """Fill in the recalls of a search over embeddings of fewer bits, and what those take."""
    n_rows, width = len(image) + len(text), image.shape[1]
    result.counts["bytes_as_float32"] = n_rows * width * 4
    places = torch.arange(len(image))
    for kind in options.stored_as:
        of_image = quantised.hits(image, text, places, owner, kind, KS, options.rescore)
        of_text = quantised.hits(text, image, owner, places, kind, KS, options.rescore)
        _score_recalls(result, of_image, of_text, owner, f"_{kind}")
        result.counts[f"bytes_as_{kind}"] = n_rows * quantised.bytes_a_row(kind, width)


def _score_recalls(
    result: TaskResult,
    image_hits: Tensor,  # [N, len(KS)] bool: a caption of the image is among the k best
    text_hits: Tensor,  # [M, len(KS)] bool: the caption's image is
    owner: Tensor,
    suffix: str = "",
) -> None:
    """Fill in R@k and their mean both ways with their chances."""
    n_images, n_texts = len(image_hits), len(text_hits)
    per_image = torch.bincount(owner, minlength=n_images).double()

    # Image retrieval is counted over captions, text retrieval over images.
    for k, of_images, of_texts in zip(KS, image_hits.T, text_hits.T):
        image_retrieval = f"image_retrieval_recall@{k}{suffix}"
        text_retrieval = f"text_retrieval_recall@{k}{suffix}"
        result.items[image_retrieval] = _by_image(of_texts, owner, n_images)
        result.items[text_retrieval] = _of_images(of_images)
        result.chance[image_retrieval] = min(1.0, k / n_images)
        result.chance[text_retrieval] = _chance_any(per_image, n_texts, k)

    for way in WAYS:
        of_way = [f"{way}_retrieval_recall@{k}{suffix}" for k in KS]
        mean = torch.stack([result.items[name] for name in of_way]).mean(0)
        result.items[f"{way}_retrieval_mean_recall{suffix}"] = mean
        chances = [result.chance[name] for name in of_way]
        result.chance[f"{way}_retrieval_mean_recall{suffix}"] = sum(chances) / len(KS)


def _by_image(values: Tensor, owner: Tensor, n_images: int) -> Tensor:
    """[N, 2] of captions' values: an image and its captions are drawn together in the bootstrap."""
    sums = torch.zeros(n_images, dtype=torch.float64).index_add_(0, owner, values.double())
    return torch.stack([sums, torch.bincount(owner, minlength=n_images).double()], 1)


def _of_images(values: Tensor) -> Tensor:
    """[N, 2] of images' values."""
    return torch.stack([values.double(), torch.ones(len(values), dtype=torch.float64)], 1)


def _chance_any(n_captions: Tensor, total: int, k: int) -> float:
    """Mean over images of 1 − C(total − n, k) / C(total, k): one of an image's n captions is among
    k drawn at random.

    n_captions: [N] of each image. total: all captions.
    """
    # Few different numbers of captions occur: one binomial each instead of one an image.
    counts, n_images = n_captions.unique(return_counts=True)
    draws = math.comb(total, min(k, total))
    missed = [math.comb(total - int(count), min(k, total)) / draws for count in counts]
    n_missed = sum(share * int(n) for share, n in zip(missed, n_images))
    return 1 - n_missed / len(n_captions)
