"""Self-supervision of the image tower: SimCLR's NT-Xent between two more views of each image.

    L = (1/2n) Σ_i −log [ e^{v_i·v_i'/τ} / Σ_{k≠i} e^{v_i·v_k/τ} ]

over the 2n views v of the group's n images, v_i' being the other view of the same image. The views
are `image_views`[0] and [1], [b, D] unit rows from a projection of their own.

Relations:
- as `infonce` between the two views, but views of the same side are candidates too
- the contrastive loss of images and texts is a term of its own

Papers:
- SLIP (arXiv 2112.12750): `objective: {infonce: {}, slip: {temperature: 0.1}}`

Needs: image_views

Cost: three passes over pairs of views; O(b·D) memory, and the image tower on 2·b images more

Use: where captions are few or poor for the number of images
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, logaddexp, softplus

NEEDS = frozenset({"image_views"})
MIN_VIEWS = 2


@dataclass(frozen=True)
class Options:
    temperature: float = 0.1  # τ

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: found {self.temperature}, expected a number > 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    if len(inputs.image_views) < MIN_VIEWS:
        raise ValueError(
            f"found {len(inputs.image_views)} image views, expected at least 2; raise data.views.n"
        )

    first, second = inputs.image_views[:2]
    scale = 1 / options.temperature
    rows, columns, positive = pairs.logsumexp(first, second, scale)

    # The other images' views of the same side join the denominator.
    rows = logaddexp(rows, pairs.row_logsumexp(first, first, scale, paired=True))
    columns = logaddexp(columns, pairs.row_logsumexp(second, second, scale, paired=True))
    return pairs.mean(softplus(rows - positive) + softplus(columns - positive)) / 2
