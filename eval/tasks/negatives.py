"""A caption against hard negatives that lie in the shards themselves: JSON "negatives", and "caption" where it is given.

The form that `vlp data negatives` and the proof sets of `vlp data scenes` write. The caption must score strictly above all
its negatives. Where "negative_kinds" says how each negative was made, the pairwise accuracy of every kind is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vlp.data.tables import TableOptions
from vlp.eval import embed, metrics
from vlp.eval.datasets import Source, open_source
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, _choices

VERSION = 1
KNOWN_AS = "image_caption_selection"


@dataclass(frozen=True)
class Options(TableOptions):
    """Which shards."""

    data: str  # see vlp.eval.datasets
    split: str = "test"
    missing: Literal["error", "skip"] = "error"  # annotations without their image


@dataclass
class Data:
    """The samples that have negatives, and how many have none."""

    source: Source
    n_without: int


def read(options: Options) -> Data:
    source = open_source(options.data, options.split, options.missing, options=options)
    kept = [r for r in source.records if r.meta.get("negatives") and (r.meta.get("caption") or r.captions)]
    if not kept:
        raise DataError(f"no sample of {options.data} has negatives in its JSON; write them with `vlp data negatives`")
    return Data(replace(source, records=kept), len(source.records) - len(kept))


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    records = data.source.records
    pictures = [r.picture for r in records]
    captions = [[r.meta.get("caption") or r.captions[0], *r.meta["negatives"]] for r in records]
    n_negatives = sum(map(len, captions)) - len(captions)
    scores = _choices.cosines(encoder, pictures, captions, context)
    result = TaskResult(
        data.source.name,
        items={"acc": _choices.accuracy(_choices.first_is_best(scores))},
        chance={"acc": sum(1 / len(group) for group in captions) / len(captions)},
        counts={
            "images": len(pictures), "negatives": n_negatives, "without_negatives": data.n_without,
            "skipped": len(data.source.skipped),
        },
        digest=context.digest(pictures, captions),
    )
    kinds: dict[str, list[float]] = {}
    for record, s in zip(records, scores):
        for kind, hit in zip(record.meta.get("negative_kinds", []), metrics.strictly_above(s[0], s[1:]).tolist()):
            kinds.setdefault(f"acc_{kind.replace(' ', '_')}", []).append(float(hit))
    result.items |= {kind: _choices.accuracy(torch.tensor(hits)) for kind, hits in sorted(kinds.items())}
    result.chance |= dict.fromkeys(kinds, 0.5)
    return result
