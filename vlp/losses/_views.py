"""The views of a sample: its image, its text, and further augmentations of either.

`mv_infonce`, `mv_dhel` and `poly_view` read them by one key, `views`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses import _candidates
from vlp.losses._candidate_options import Ignoring
from vlp.losses._candidates import Chosen, Masks
from vlp.losses._inputs import Inputs
from vlp.pairwise import LOGSUMEXP, SUM, Pairs, Tile, number

# In one order on every rank, which compare them in that order.
_FIELDS = {
    "all": ("image_views", "text_views"),
    "image": ("image_views",),
    "text": ("text_views",),
    "augmented": ("image_views", "text_views"),
}


@dataclass(frozen=True)
class Viewed(Ignoring):
    """Keys of losses over all views of a sample."""

    # u_i1 … u_iM: image, text and the further views that there are; further views of the image, of
    # the text, or of both
    views: Literal["all", "image", "text", "augmented"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ignore.margin is not None:
            raise ValueError(
                "ignore.margin: views of one sample have several scores, and none is the row's "
                "own; use ignore.teacher, ignore.cluster or ignore.same_label"
            )

    def of(self, inputs: Inputs) -> list[Tensor]:
        """The views [b, D]; ValueError for fewer than two."""
        views = [inputs.image, inputs.text] if self.views == "all" else []
        for name in _FIELDS[self.views]:
            further = getattr(inputs, name)
            if further is not None:
                views += list(further)
        if len(views) < 2:
            raise ValueError(
                f"found {len(views)} view of a sample, expected at least 2; raise data.views.n"
            )
        return views


def needs(options: Viewed) -> frozenset[str]:
    """The keywords without which there are no such views."""
    views = ("image", "text") if options.views == "all" else _FIELDS[options.views]
    return frozenset({"scale", *views}) | options.ignore.needs()


def optional(options: Viewed) -> frozenset[str]:
    """The keywords whose views join where the call carries them."""
    return frozenset(_FIELDS["all"] if options.views == "all" else ())


def min_views(options: Viewed) -> int:
    """How many further views of each image the data have to give."""
    return 2 if options.views in ("image", "text") else 0


@dataclass(frozen=True)
class Scores:
    """Sums over pairs of views of different samples, and scores of the same; z = scale·u·u'."""

    pairs: Pairs
    chosen: Chosen
    scale: Tensor

    @classmethod
    def of(cls, inputs: Inputs, pairs: Pairs, options: Viewed) -> Scores:
        """By the rules of a loss's options."""
        chosen = _candidates.of_batch(inputs, pairs, options.candidates())
        return cls(pairs, chosen, number(inputs.scale, inputs.image))

    def between(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log Σ_j e^{z} of the first view's rows against the second's negatives [b], the same the
        other way round [b], and z of the sample itself [b].
        """
        if not self.chosen.rules:
            return self.pairs.logsumexp(first, second, self.scale)

        def function(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
            z = tile.shared[0] * tile.scores[0]
            by_row, by_column = (z.masked_fill(~kept, -torch.inf) for kept in masks.kept)
            return by_row, z.masked_fill(~tile.positive, 0), by_column

        rows, positive, columns = self.chosen.reduce(
            self.pairs,
            function,
            first,
            second,
            rows=(LOGSUMEXP, SUM),
            columns=(LOGSUMEXP,),
            shared=[self.scale],
        )
        return rows, columns, positive

    def within(self, view: Tensor) -> Tensor:
        """log Σ_j e^{z} of a view's rows against the negatives of the same view, [b]."""
        if not self.chosen.rules:
            return self.pairs.row_logsumexp(view, view, self.scale, paired=True)

        def function(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
            z = tile.shared[0] * tile.scores[0]
            return (z.masked_fill(~masks.kept[0], -torch.inf),)

        (rows,) = self.chosen.reduce(
            self.pairs, function, view, view, rows=(LOGSUMEXP,), shared=[self.scale]
        )
        return rows
