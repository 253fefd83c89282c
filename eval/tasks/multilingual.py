"""Retrieval in several languages: the recalls of every language, and their mean.

Each language is scored by itself, as `retrieval` does, over the images that have captions in it;
images are embedded once. Reads Crossmodal-3600, XTD, and a folder with a table a language
(vlp.eval.datasets.languages). clip_benchmark takes the first caption of Crossmodal-3600 alone:
`captions_per_image=1`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import torch

from vlp.data.tables import TableOptions
from vlp.eval import embed, metrics
from vlp.eval.datasets import languages
from vlp.eval.datasets.source import Source
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, retrieval

VERSION = 1
KNOWN_AS = "zeroshot_retrieval"
MAIN = "mean_image_retrieval_recall@1"
# of every language, and their mean
SCORES = tuple(f"*_{name}" for name in retrieval.SCORES if "recall" in name)


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
    """The captions of each language that is asked for."""
    sources = languages.read(
        Path(options.data), options.images, options.split, options.missing, options
    )
    unknown = [language for language in options.languages if language not in sources]
    if unknown:
        raise DataError(
            f"{options.data} has no captions in {', '.join(unknown)}; it has {', '.join(sources)}"
        )
    return {language: sources[language] for language in options.languages or sources}


def run(
    encoder: Encoder, data: dict[str, Source], options: Options, context: Context
) -> TaskResult:
    """The recalls of every language and their mean."""
    every_record = chain.from_iterable(source.records for source in data.values())
    pictures = list(dict.fromkeys(record.picture for record in every_record))
    place = {picture: number for number, picture in enumerate(pictures)}
    image = embed.images(encoder, pictures, context)

    result = TaskResult(Path(options.data).name, counts={"images": len(pictures)})
    annotations = []
    measures: list[str] = []
    for language, source in data.items():
        captions = [list(r.captions[: options.captions_per_image]) for r in source.records]
        annotations.append((language, captions))
        counts = torch.tensor([len(of_image) for of_image in captions])
        owner = torch.arange(len(captions)).repeat_interleave(counts)
        rows = image[[place[record.picture] for record in source.records]]
        text = embed.texts(encoder, list(chain.from_iterable(captions)), context)

        of_language = TaskResult(language)
        ranks = metrics.retrieval_ranks(rows, text, owner)
        retrieval.score(of_language, *ranks, owner)
        measures = list(of_language.chance)  # the recalls alone have one
        for name, chance in of_language.chance.items():
            result.items[f"{language}_{name}"] = of_language.items[name]
            result.chance[f"{language}_{name}"] = chance

    _mean_over_languages(result, list(data), measures)
    result.counts |= {
        "languages": len(data),
        "captions": sum(len(texts) for _, of_language in annotations for texts in of_language),
        "skipped": sum(len(source.skipped) for source in data.values()),
    }
    result.digest = context.digest(pictures, annotations)
    return result


def _mean_over_languages(result: TaskResult, names: list[str], measures: list[str]) -> None:
    """Fill in the mean of every recall, and of what guessing gives."""
    for measure in measures:
        scores = [result.items[f"{name}_{measure}"].double().sum(0) for name in names]
        chances = [result.chance[f"{name}_{measure}"] for name in names]
        shares = [float(parts[0] / parts[1]) for parts in scores]
        result.values[f"mean_{measure}"] = sum(shares) / len(shares)
        result.chance[f"mean_{measure}"] = sum(chances) / len(chances)
