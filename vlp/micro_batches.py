"""Into how many micro-batches a rank's rows of a step are cut, where texts are bounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vlp import dist, log
from vlp.config.training import Train
from vlp.fields import EMBEDDED
from vlp.losses import Objective
from vlp.models.dual_encoder import DualEncoder


def embedded(objective: Objective, model: DualEncoder) -> frozenset[str]:
    """The fields that a step embeds for its terms: those that they need, and of those that they
    read where they are there what a head projects.
    """
    return objective.needs | (objective.reads & model.supplies())


def texts_a_row(widths: Mapping[str, int], reads: Iterable[str], n_sides: int = 1) -> int:
    """The texts that the text tower embeds for a row, at most: those of the pair, and those of
    further fields that terms read and the model embeds. widths: of the fields that the data offer;
    n_sides: of the pair that are texts.
    """
    further = [name for name in reads if name in EMBEDDED and EMBEDDED[name].tower == "text"]
    return n_sides + sum(widths.get(name, 0) for name in further if name != "text")


def count(train: Train, widths: Mapping[str, int], reads: Iterable[str], n_sides: int = 1) -> int:
    """`train.micro_batches`, or as many more as keep a micro-batch within `train.max_texts`.

    ValueError where even a single row has more texts.
    """
    if train.max_texts is None:
        return train.micro_batches

    texts, rows = texts_a_row(widths, reads, n_sides), train.batch // dist.world_size()
    divisors = [n for n in range(train.micro_batches, rows + 1) if rows % n == 0]
    for parts in divisors:
        if rows // parts * texts <= train.max_texts:
            if parts > train.micro_batches:
                log.say(
                    f"{parts} micro-batches instead of {train.micro_batches}: {rows} rows of "
                    f"{texts} texts each, at most {train.max_texts} at once (train.max_texts)"
                )
            return parts
    raise ValueError(
        f"train.max_texts is {train.max_texts}, and a row alone has {texts} texts (its own, and "
        "captions, negatives or views beside it); raise it, or carry fewer texts a row"
    )
