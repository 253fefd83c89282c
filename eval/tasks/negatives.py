"""A caption against hard negatives that lie in the shards themselves: JSON "negatives", and
"caption" where it is given.

The form that `vlp data negatives` and the proof sets of `vlp data scenes` write. A caption must
score strictly above all its negatives. Where "negatives_of" says from which caption each was made,
every caption stands against its own (and against those given for the picture), and the score is the
share of captions; else the first caption stands against all. Masked negatives do not count. Where
"negative_kinds" says how each was made, the pairwise accuracy of every kind is reported.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from vlp.data import wrong_captions
from vlp.data.tables import TableOptions
from vlp.eval import choices, metrics
from vlp.eval.choices import CaptionChoice, ChoiceSet
from vlp.eval.datasets import open_source
from vlp.eval.datasets.source import Record
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError, Picture
from vlp.eval.tasks import TaskResult

VERSION = 3  # 2 tied what a nearly collapsed model tells apart
KNOWN_AS = "image_caption_selection"
MAIN = "acc"


@dataclass(frozen=True)
class Options(TableOptions):
    """Which shards, or which table."""

    data: str  # see vlp.eval.datasets
    images: str | None = None  # where a table's images are: a folder or a .tar; None: beside it
    split: str = "test"  # which split of the data is scored
    missing: Literal["error", "skip"] = "error"  # annotations without their image


@dataclass(frozen=True)
class NegativesChoice(CaptionChoice):
    """One caption of a picture and the negatives that belong to it."""

    kinds: list[str] = field(default_factory=list)  # of the negatives, where they are known


@dataclass
class Data(ChoiceSet):
    """The captions that stand to choose, those of one picture side by side.

    `counts`: samples without valid negatives, and those whose "negatives_of" cannot be right.
    """

    choices: Sequence[NegativesChoice]
    name: str = ""


def read(options: Options) -> Data:
    """The choices that the shards offer; a DataError if there is none."""
    source = open_source(options.data, options.split, options.missing, options.images, options)
    offered = [choices_of(record) for record in source.records]
    problems = [
        wrong_captions.read(record.meta, "negatives", record.captions).problem
        for record in source.records
    ]
    problems = [problem for problem in problems if problem]

    # Negatives that cannot be right are told from samples that have none: both are counted.
    every_choice = list(chain.from_iterable(offered))
    if not every_choice:
        reason = f" ({len(problems)} samples: {problems[0]})" if problems else ""
        raise DataError(
            f"no sample of {options.data} has negatives in its JSON{reason}; "
            "write them with `vlp data negatives`"
        )

    counts = {
        "without_negatives": offered.count([]) - len(problems),
        "malformed": len(problems),
    }
    return Data(every_choice, source.skipped, counts, source.name)


def choices_of(record: Record) -> list[NegativesChoice]:
    """Each caption of a picture that has valid negatives, with those that belong to it."""
    negatives = wrong_captions.read(record.meta, "negatives", record.captions)
    captions = list(dict.fromkeys(record.captions))
    if record.meta.get("negatives_of") is None:
        # Nothing says whose they are: they stand against the first caption.
        captions = [record.meta["caption"]] if record.meta.get("caption") else captions[:1]

    # Kinds that do not match the negatives one to one say nothing.
    kinds = record.meta.get("negative_kinds")
    if not isinstance(kinds, list) or len(kinds) != len(negatives.texts):
        kinds = []
    if not all(isinstance(kind, str) for kind in kinds):
        kinds = []

    offered = []
    for caption in captions:
        places = [place for place in negatives.of(caption) if negatives.valid[place]]
        texts = [negatives.texts[place] for place in places]
        if texts:
            kinds_of_caption = [kinds[place] for place in places] if kinds else []
            offered.append(
                NegativesChoice(record.picture, [caption, *texts], kinds=kinds_of_caption)
            )
    return offered


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """How often a caption is above all its negatives, and above each kind of them."""
    pictures, captions = data.pictures, data.captions
    scores = choices.cosines(encoder, pictures, captions, context)

    # One score over all negatives of a caption, one a kind over single negatives.
    hits = choices.first_is_best(scores).tolist()
    hits_by_score = {"acc": list(zip(pictures, hits)), **_hits_by_kind(data.choices, scores)}

    chance = choices.chance(captions)
    return TaskResult(
        data.name,
        items={name: _by_picture(hits_by_score[name]) for name in sorted(hits_by_score)},
        chance={name: chance if name == "acc" else 0.5 for name in hits_by_score},
        counts={
            "images": len(set(pictures)),
            "captions": len(captions),
            "negatives": sum(map(len, captions)) - len(captions),
            **data.counts,
            "skipped": len(data.skipped),
        },
        digest=context.digest(pictures, captions),
    )


def _hits_by_kind(
    offered: Sequence[NegativesChoice], scores: list[Tensor]
) -> dict[str, list[tuple[Picture, float]]]:
    """For each kind of negative, where the caption is above it: (picture, 0 or 1) a pair."""
    hits_by_kind = defaultdict(list)
    tie = metrics.tie_of_groups(scores)
    for choice, of_captions in zip(offered, scores):
        above = metrics.strictly_above(of_captions[0], of_captions[1:], tie).tolist()
        for kind, hit in zip(choice.kinds, above):
            hits_by_kind[kind].append((choice.picture, float(hit)))

    # With "_" for blanks, unless another kind is written so.
    names = Counter(kind.replace(" ", "_") for kind in hits_by_kind)
    result = {}
    for kind, hits in hits_by_kind.items():
        joined = kind.replace(" ", "_")
        result[f"acc_{joined if names[joined] == 1 else kind}"] = hits
    return result


def _by_picture(hits: list[tuple[Picture, float]]) -> Tensor:
    """[n, 2] items: of each picture, which is what could have been drawn otherwise, the hits and
    how many could be.
    """
    # Captions of one picture are no independent draws, so that an interval over them is too narrow.
    sums: dict[Picture, list[float]] = {}
    for picture, hit in hits:
        of_picture = sums.setdefault(picture, [0.0, 0.0])
        of_picture[0] += hit
        of_picture[1] += 1
    return torch.tensor(list(sums.values()), dtype=torch.float64)
