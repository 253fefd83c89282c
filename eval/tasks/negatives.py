"""A caption against hard negatives that lie in the shards themselves: JSON "negatives", and
"caption" where it is given.

The form that `vlp data negatives` and the proof sets of `vlp data scenes` write. A caption must
score strictly above all its negatives. Where "negatives_of" says from which caption each was made,
every caption stands against its own (and against those given for the picture), and the score is the
share of captions; else the first caption stands against all. Masked negatives do not count. Where
"negative_kinds" says how each was made, the pairwise accuracy of every kind is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlp.data import wrong_captions
from vlp.data.tables import TableOptions
from vlp.eval import choices as _choices
from vlp.eval import embed, metrics
from vlp.eval.datasets import Record, Source, open_source
from vlp.eval.pictures import DataError, Picture
from vlp.eval.tasks import TaskResult

VERSION = 2
KNOWN_AS = "image_caption_selection"


@dataclass(frozen=True)
class Options(TableOptions):
    """Which shards."""

    data: str  # see vlp.eval.datasets
    split: str = "test"  # which split of the data is scored
    missing: Literal["error", "skip"] = "error"  # annotations without their image


@dataclass(frozen=True)
class Choice:
    """One caption of a picture and the negatives that belong to it."""

    picture: Picture
    captions: list[str]  # the true one, then the negatives
    kinds: list[str]  # of the negatives, where they are known


@dataclass
class Data:
    """What stands to choose, the captions of one picture side by side, and how many samples offer
    nothing.
    """

    source: Source
    choices: list[Choice]
    n_without: int  # samples without valid negatives
    n_malformed: int  # samples whose "negatives_of" cannot be right


def read(options: Options) -> Data:
    source = open_source(options.data, options.split, options.missing, options=options)
    offered = [choices_of(record) for record in source.records]
    problems = [
        wrong_captions.read(record.meta, "negatives", record.captions).problem
        for record in source.records
    ]
    problems = [problem for problem in problems if problem]

    choices = [choice for own in offered for choice in own]
    if not choices:
        why = f" ({len(problems)} samples: {problems[0]})" if problems else ""
        raise DataError(
            f"no sample of {options.data} has negatives in its JSON{why}; write them with `vlp data negatives`"
        )
    return Data(source, choices, offered.count([]) - len(problems), len(problems))


def choices_of(record: Record) -> list[Choice]:
    """Each caption of a picture that has valid negatives, with those that belong to it."""
    negatives = wrong_captions.read(record.meta, "negatives", record.captions)
    captions = list(dict.fromkeys(record.captions))
    if record.meta.get("negatives_of") is None:
        # Nothing says whose they are: they stand against the first caption.
        captions = [record.meta["caption"]] if record.meta.get("caption") else captions[:1]
    kinds = record.meta.get("negative_kinds")
    if not isinstance(kinds, list) or len(kinds) != len(negatives.texts):
        kinds = []

    choices = []
    for caption in captions:
        places = [place for place in negatives.of(caption) if negatives.valid[place]]
        texts = [negatives.texts[place] for place in places]
        if texts:
            own_kinds = [kinds[place] for place in places] if kinds else []
            choices.append(Choice(record.picture, [caption, *texts], own_kinds))
    return choices


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    pictures = [choice.picture for choice in data.choices]
    captions = [choice.captions for choice in data.choices]
    scores = _choices.cosines(encoder, pictures, captions, context)

    hits = _choices.first_is_best(scores).tolist()
    told: dict[str, list[tuple[Picture, float]]] = {"acc": list(zip(pictures, hits))}
    for choice, s in zip(data.choices, scores):
        above = metrics.strictly_above(s[0], s[1:]).tolist()
        for kind, hit in zip(choice.kinds, above):
            told.setdefault(f"acc_{kind.replace(' ', '_')}", []).append(
                (choice.picture, float(hit))
            )

    chance = sum(1 / len(group) for group in captions) / len(captions)
    return TaskResult(
        data.source.name,
        items={name: _by_picture(told[name]) for name in sorted(told)},
        chance={name: chance if name == "acc" else 0.5 for name in told},
        counts={
            "images": len(set(pictures)),
            "captions": len(captions),
            "negatives": sum(map(len, captions)) - len(captions),
            "without_negatives": data.n_without,
            "malformed": data.n_malformed,
            "skipped": len(data.source.skipped),
        },
        digest=context.digest(pictures, captions),
    )


def _by_picture(hits: list[tuple[Picture, float]]) -> Tensor:
    """[n, 2] items: of each picture, which is what could have been drawn otherwise, the hits and
    how many could be.
    """
    sums: dict[Picture, list[float]] = {}
    for picture, hit in hits:
        own = sums.setdefault(picture, [0.0, 0.0])
        own[0] += hit
        own[1] += 1
    return torch.tensor(list(sums.values()), dtype=torch.float64)
