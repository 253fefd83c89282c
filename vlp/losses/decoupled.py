"""Decoupled contrastive learning: InfoNCE without the positive in its denominator.

    L = ½ Σ_directions mean_i [ −w_i z_ii + log Σ_{j≠i} e^{z_ij} ],      z_ij = scale·x_i·t_j

x, t: [b, D] images and texts. w_i = 1 (DCL), or with `weighted` (DCLW) w_i = 2 −
n·softmax_i(s_ii/σ), detached, over the group: pairs that already agree weigh less.

`positives`, `form`, `ignore`, `hardest` and `within` are those of `infonce`. No positive is in a
denominator: with N_i the negatives of a row, its term is log Σ_{j∈N_i} e^{z_ij} less the mean of
z_ip (forms out and decoupled) or log Σ_p e^{z_ip} (form in) over its positives, and 0 where it has
no negative.

Relations:
- equivalent to `infonce`, but the gradient of a pair does not vanish as its probability nears 1
- `hn_nce` with alpha 0 and beta 0 equals this one

Papers:
- DCL (arXiv 2110.06848): `objective: {decoupled: {}}`
- DCLW (arXiv 2110.06848): `objective: {decoupled: {weighted: true, sigma: 0.5}}`

Needs: image, text, scale; with positives and ignore what `infonce` needs

Cost: one pass over the pairs, 8·b·n·D FLOPs forward and backward; O(b·D) memory. With positives or
masks as `infonce`

Use: at small batches, where the coupling of positive and negatives slows `infonce` down
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses import _masked
from vlp.losses._candidate_options import Formed
from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text", "scale"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options(Formed):
    weighted: bool = False  # DCLW
    sigma: float = 0.5  # σ of its weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma <= 0:
            raise ValueError(f"sigma: found {self.sigma}, expected a number > 0")
        if self.weighted and not self.plain:
            raise ValueError(
                "weighted: DCLW weighs the one positive of a row; drop positives, ignore, hardest "
                "and within, or weighted"
            )


def needs(options: Options) -> frozenset[str]:
    return NEEDS | options.needs()


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    if not options.plain:
        by_image, by_text = _masked.of_pairs(inputs, pairs, options, alpha=0.0)
        return pairs.mean((by_image + by_text) / 2)

    rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, inputs.scale)

    # The mean of the margins, without InfoNCE's softplus around them.
    if not options.weighted:
        return pairs.mean((rows + columns) / 2 - positive)

    # The softmax over positives needs only those of the group: n numbers.
    cosine = (positive / inputs.scale).detach() / options.sigma
    share = (cosine - pairs.log_sum(cosine)).exp()
    weight = 2 - pairs.candidates(len(rows)) * share
    return pairs.mean((rows + columns) / 2 - weight * positive)
