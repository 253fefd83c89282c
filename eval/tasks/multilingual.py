"""Retrieval in several languages: the recalls of every language, and their mean.

Each language is scored by itself, as `retrieval` does, over the images that have captions in it;
equal pictures of all languages are one and embedded once. Reads Crossmodal-3600, XTD,
Flickr30k-200, and a folder with a table a language (vlp.eval.datasets.languages).
clip_benchmark takes the first caption of Crossmodal-3600 alone: `captions_per_image=1`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlp.data.tables import TableOptions
from vlp.eval import choices, embed, metrics
from vlp.eval.datasets import languages
from vlp.eval.datasets.source import Source, equal_pictures, join_equal_pictures
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, retrieval

VERSION = 2  # 1 took equal pictures for several images
KNOWN_AS = "zeroshot_retrieval"
MAIN = "mean_image_retrieval_recall@1"
# of every language, and their mean
SCORES = tuple(f"*_{name}" for name in retrieval.OF_FLOAT if "recall" in name)


@dataclass(frozen=True)
class Options(TableOptions):
    """Which captions, and in which languages."""

    data: str  # a folder of one of the layouts
    images: str | None = None  # a folder or a .tar; None: where the layout has them
    languages: list[str] = field(default_factory=list)  # empty: all that there are
    split: str = "test"  # of tables that name one
    captions_per_image: int | None = None  # the first so many; None: all
    missing: Literal["error", "skip"] = "error"  # annotations without their image
    language: str = "multilingual"  # recorded in the result

    def __post_init__(self) -> None:
        if self.captions_per_image is not None and self.captions_per_image < 1:
            raise ValueError(
                f"captions_per_image is {self.captions_per_image}; expected at least 1"
            )


def read(options: Options) -> dict[str, Source]:
    """The captions of each language that is asked for; equal pictures are one in all of them."""
    sources = languages.read(
        Path(options.data), options.images, options.split, options.missing, options
    )
    unknown = [language for language in options.languages if language not in sources]
    if unknown:
        raise DataError(
            f"{options.data} has no captions in {', '.join(unknown)}; it has {', '.join(sources)}"
        )
    chosen = {language: sources[language] for language in options.languages or sources}

    # Copies of a picture would tie with each other; they are looked for once, not by language.
    every_record = chain.from_iterable(source.records for source in chosen.values())
    first_of = equal_pictures(record.picture for record in every_record)
    for language, source in chosen.items():
        joined, n_joined = join_equal_pictures(source, first_of)
        captioned = retrieval.with_captions(joined, source.name, options.missing)
        chosen[language] = replace(captioned, n_joined=n_joined)
    return chosen


def run(
    encoder: Encoder, data: dict[str, Source], options: Options, context: Context
) -> TaskResult:
    """The recalls of every language and their mean."""
    every_record = chain.from_iterable(source.records for source in data.values())
    pictures = list(dict.fromkeys(record.picture for record in every_record))
    place = {picture: number for number, picture in enumerate(pictures)}

    # Texts first: where the model cannot read a language, no time goes into pictures.
    captions_of: dict[str, list[list[str]]] = {}
    texts_of: dict[str, Tensor] = {}
    for language, source in data.items():
        captions = [list(r.captions[: options.captions_per_image]) for r in source.records]
        captions_of[language] = captions
        texts_of[language] = embed.texts(encoder, list(chain.from_iterable(captions)), context)
    image = embed.images(encoder, pictures, context)

    result = TaskResult(Path(options.data).name, counts={"images": len(pictures)})
    measures: list[str] = []
    for language, source in data.items():
        counts = torch.tensor([len(of_image) for of_image in captions_of[language]])
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        rows = image[[place[record.picture] for record in source.records]]

        of_language = TaskResult(language)
        ranks = metrics.retrieval_ranks(rows, texts_of[language], owner)
        retrieval.score(of_language, *ranks, owner)
        measures = list(of_language.chance)  # the recalls alone have one
        group = choices.group_score(language)
        for name, chance in of_language.chance.items():
            result.items[f"{group}_{name}"] = of_language.items[name]
            result.chance[f"{group}_{name}"] = chance

    _mean_over_languages(result, list(map(choices.group_score, data)), measures)
    result.counts |= {
        "languages": len(data),
        "captions": sum(map(len, texts_of.values())),
        "skipped": sum(len(source.skipped) for source in data.values()),
    }
    n_joined = sum(source.n_joined for source in data.values())
    if n_joined:
        result.counts["equal_pictures_joined"] = n_joined
    result.digest = context.digest(pictures, list(captions_of.items()))
    return result


def _mean_over_languages(result: TaskResult, names: list[str], measures: list[str]) -> None:
    """Fill in the mean of every recall, and of what guessing gives."""
    for measure in measures:
        scores = [result.items[f"{name}_{measure}"].double().sum(0) for name in names]
        chances = [result.chance[f"{name}_{measure}"] for name in names]
        shares = [float(parts[0] / parts[1]) for parts in scores]
        result.values[f"mean_{measure}"] = sum(shares) / len(shares)
        result.chance[f"mean_{measure}"] = sum(chances) / len(chances)
