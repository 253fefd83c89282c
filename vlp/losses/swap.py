"""Swapped assignments: each pair of views predicts how the other pair assigns images to texts.

    L = mean over a, c of ½ [ mean_i CE(z_i·, Q_i·) + mean_j CE(z_·j, Q'_·j) ]
    z_ij = scale·x_ai·t_cj,   Q = Sinkhorn(S/ε),   S_ij = x_āi·t_c̄j

x_a, t_c: [b, D] for a, c = 1, 2 the first two of image_views and text_views [V, b, D], and ā the
other one of a. Sinkhorn scales columns to one sum and then rows to 1, `iterations` times; Q' is the
same with rows and columns exchanged. Q and Q' have no gradient: texts stand in the place of SwAV's
prototypes. The scale is that of views, or of the model.

Relations:
- with ε near 0, where views agree which text is nearest, `infonce` of the views
- `multi_view` compares the same views with the pairs themselves for a target

Papers:
- SwALIP of CLIP-rocket (arXiv 2305.08675) after SwAV (arXiv 2006.09882), with weight .2 and no
  label smoothing: `objective: {multi_view: {label_smoothing: 0}, swap: {weight: 0.2}}`

Needs: scale, image_views, text_views

Cost: 8 passes over the pairs forward and backward, and 16·iterations forward for Q; O(b·D) memory,
and both towers on two views more

Use: beside `multi_view`, to soften its targets by what the other views say. The paper finds plain
CLIP with the same augmentation to do better
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import LOGSUMEXP, SUM, Pairs, Reduction, Tile, number, softplus, widened

NEEDS = frozenset({"scale", "image_views", "text_views"})
OPTIONAL = frozenset({"view_scale"})
MIN_VIEWS = 2


@dataclass(frozen=True)
class Options:
    epsilon: float = 0.05  # ε, how soft assignments are
    iterations: int = 3  # of Sinkhorn's scaling

    def __post_init__(self) -> None:
        if self.epsilon <= 0 or self.iterations < 1:
            raise ValueError(
                f"epsilon and iterations: found {self.epsilon} and {self.iterations}, expected a "
                "number > 0 and at least 1"
            )


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    images, texts = inputs.image_views, inputs.text_views
    if min(len(images), len(texts)) < MIN_VIEWS:
        raise ValueError(
            f"found {len(images)} views of images and {len(texts)} of texts, expected at least 2; "
            "raise data.views.n"
        )

    given = inputs.scale if inputs.view_scale is None else inputs.view_scale
    scale = number(given, inputs.image_views)
    losses = [
        _predicted(
            (images[a], texts[c]),
            (images[1 - a].detach(), texts[1 - c].detach()),
            scale,
            pairs,
            options,
        )
        for a, c in itertools.product((0, 1), repeat=2)
    ]
    return pairs.mean(torch.stack(losses))


def _predicted(
    views: tuple[Tensor, Tensor],  # image and text, [b, D] each
    others: tuple[Tensor, Tensor],  # the other view of each
    scale: Tensor,
    pairs: Pairs,
    options: Options,
) -> Tensor:
    """The mean of both directions for each row, [b]."""
    image, text = views
    sharpness = number(1 / options.epsilon, image)
    row_potentials = _sinkhorn(*others, sharpness, pairs, options.iterations)
    column_potentials = _sinkhorn(*others[::-1], sharpness, pairs, options.iterations)

    # Centred on the pair: −Σ_j Q_ij log softmax_j = softplus(margin) − Σ_j Q_ij (z_ij − z_ii).
    rows, columns, positive = pairs.logsumexp(image, text, scale)
    cosine = (widened(image) * widened(text)).sum(1)
    row_gaps, column_gaps = pairs.reduce(
        Reduction(_expected_gaps, rows=(SUM,), columns=(SUM,)),
        [image, others[0]],
        [text, others[1]],
        row_values=[row_potentials[0], column_potentials[1], cosine],
        column_values=[row_potentials[1], column_potentials[0], cosine],
        shared=[sharpness],
    )
    losses = softplus(rows - positive) + softplus(columns - positive)
    return (losses - scale * (row_gaps + column_gaps)) / 2


def _expected_gaps(tile: Tile) -> tuple[Tensor, ...]:
    """Q_ij (s_ij − s_ii) and Q'_ij (s_ij − s_jj), [m, n]."""
    row_f, row_g, own_row = (values.unsqueeze(1) for values in tile.row_values)
    column_g, column_f, own_column = tile.column_values
    scores, exponents = tile.scores[0], tile.shared[0] * tile.scores[1].detach()

    assigned = (exponents + row_f + column_g).exp().masked_fill(tile.positive, 0)
    assigned_back = (exponents + row_g + column_f).exp().masked_fill(tile.positive, 0)
    return assigned * (scores - own_row), assigned_back * (scores - own_column)


@torch.no_grad()
def _sinkhorn(
    left: Tensor, right: Tensor, sharpness: Tensor, pairs: Pairs, iterations: int
) -> tuple[Tensor, Tensor]:
    """f [b] and g [b] of log Q_ij = s_ij/ε + f_i + g_j, where Σ_j Q_ij = 1.

    In logarithms, where e^{1/ε} cannot overflow. What all columns sum to is left out: the rows that
    are scaled after them take it back.
    """
    f = g = torch.zeros_like(widened(left[:, 0]))
    for _ in range(iterations):
        (sums,) = pairs.reduce(
            _COLUMN_SUMS, [left], [right], row_values=[f], shared=[sharpness], paired=False
        )
        g = -sums.to(f.dtype)
        (sums,) = pairs.reduce(
            _ROW_SUMS, [left], [right], column_values=[g], shared=[sharpness], paired=False
        )
        f = -sums.to(f.dtype)
    return f, g


_ROW_SUMS = Reduction(
    lambda tile: (tile.shared[0] * tile.scores[0] + tile.column_values[0],), rows=(LOGSUMEXP,)
)
_COLUMN_SUMS = Reduction(
    lambda tile: (tile.shared[0] * tile.scores[0] + tile.row_values[0].unsqueeze(1),),
    columns=(LOGSUMEXP,),
)
