"""Several true captions a sample: InfoNCE of every column of captions, or of all of them at once.

    mean       L = Σ_k w_k L_CLIP(x, t_·k) / Σ_k w_k
    decoupled  L = ½ mean_i avg_p [ softplus(LSE_{(j,k): j≠i} z_i,jk − z_i,ip) + CE(z_·,ip, i) ]

x: [b, D] images, t: [b, K', D], t_jk being caption k of sample j, z_i,jk = scale·x_i·t_jk; avg_p is
the mean over the captions p of sample i, weighted by w_p. A caption that is not valid takes no
part: sample i is in column k of `mean` where its caption k is valid, and in `decoupled` where any
of its captions is. Columns with fewer than two samples do not count, nor do groups of ranks that
have fewer in a column. `weights` are w by role, in the order of the columns (data.captions.roles);
else all are 1.

With `short` the images of one column are cut to their principal components: L_CLIP(PCA(x), t_·k),
PCA(x) = (x − μ)VVᵀ + μ with the mean μ and the first components V of the group's images of that
column, both without gradient. `renormalise` makes the rows unit again. label_smoothing is that of
`infonce`, in `mean` alone.

Relations:
- with one caption a sample, both forms equal `infonce`; `mean` also with copies of one caption
- `decoupled` is `infonce` with all captions of a sample as positives, each against other samples'
  captions alone (DEXML's form)
- `short` with components = D equals the plain term of its column
- hard negatives belong to the row's `text`, which is one of the captions (data.captions)

Papers:
- Long-CLIP (arXiv 2403.15378), with data.captions: {choose: first_sentence, n: 1}: `objective:
  {infonce: {label_smoothing: 0.1}, captions: {label_smoothing: 0.1, short: {components: 32}}}`
- DEXML's loss (arXiv 2310.10636) over captions: `objective: {captions: {form: decoupled}}`
- DreamLIP (arXiv 2403.17007), its global part: `objective: {captions: {}}`; its captions are drawn
  one by one, with data.captions: {choose: sentences, n: 8}, and matched with patches as well

Needs: image, scale, captions, captions_valid

Cost: mean two passes over b × n pairs a column, decoupled one over b × n·K'; O(b·K'·D) memory, and
the text tower on b·K' captions more; short also D² numbers summed over ranks, and D³ FLOPs

Use: where samples have several captions, such as rewritten ones; `decoupled` where they say
different things of one picture. With one caption a sample drawn anew (data.captions.choose: random)
`infonce` is cheaper
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._captions_at_once import decoupled
from vlp.losses._inputs import Inputs
from vlp.losses._principal import cut
from vlp.pairwise import Pairs, softplus
from vlp.pairwise.reduction import accumulation_dtype, widened

NEEDS = frozenset({"image", "scale", "captions", "captions_valid"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Short:
    """Short captions, whose images lose their detail (Long-CLIP)."""

    components: int = 32  # principal components that the images keep
    column: int = -1  # which captions are short: their column, −1 for the last
    renormalise: bool = False  # the cut images are unit rows again; the release leaves them

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components: found {self.components}, expected at least 1")


@dataclass(frozen=True)
class Options:
    # mean: each column of captions by itself; decoupled: all captions against other samples' alone
    form: Literal["mean", "decoupled"] = "mean"
    # w by role, in the order of the columns: {long: 1, short: 0.5}; empty: all alike
    weights: dict[str, float] = field(default_factory=dict)
    label_smoothing: float = 0.0  # ε of mean, in [0, 1)
    short: Short | None = None  # of mean: one column is of short captions

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: found {self.label_smoothing}, expected 0 <= ε < 1")
        if self.form != "mean" and (self.label_smoothing or self.short):
            raise ValueError(
                f"label_smoothing and short belong to form: mean, not {self.form}; remove them"
            )
        weights = self.weights.values()
        if min(weights, default=0) < 0 or (weights and not max(weights)):
            raise ValueError(
                f"weights: found {self.weights}, expected numbers >= 0, one of them above 0"
            )


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    weights = _weights(inputs, options)
    if options.form == "decoupled":
        return decoupled(inputs, pairs, weights)

    n_columns = len(weights)
    short = options.short
    short_column = -1 if short is None else _column(short, n_columns)

    # A column without two samples anywhere does not count, which only the ranks together know.
    total, total_weight = weights.new_zeros(()), weights.new_zeros(())
    for k in range(n_columns):
        valid = _with_another(inputs.captions_valid[:, k], pairs)
        image = inputs.image
        if short is not None and k == short_column:
            image = cut(image, valid, pairs, short.components, short.renormalise)

        counts = (pairs.sum_over_ranks(valid.float().sum()) > 0).to(weights.dtype)
        total = total + weights[k] * _column_loss(image, inputs, k, valid, pairs, options)
        total_weight = total_weight + weights[k] * counts
    return total / torch.where(total_weight > 0, total_weight, 1)


def _weights(inputs: Inputs, options: Options) -> Tensor:
    """w of each column, [K'] in the dtype of losses."""
    n_columns = inputs.captions.shape[1]
    values = list(options.weights.values()) or [1.0] * n_columns
    if len(values) != n_columns:
        raise ValueError(
            f"weights are of {', '.join(options.weights)}, and samples have {n_columns} columns of "
            "captions; name a weight for each, in the order of data.captions.roles"
        )
    dtype = accumulation_dtype(inputs.image)
    return torch.tensor(values, dtype=dtype, device=inputs.image.device)


def _column(short: Short, n_columns: int) -> int:
    """The number of the short column, 0 ≤ k < K'."""
    if not -n_columns <= short.column < n_columns:
        raise ValueError(
            f"short.column: found {short.column}, expected one of {n_columns} columns of captions"
        )
    return short.column % n_columns


def _with_another(valid: Tensor, pairs: Pairs) -> Tensor:
    """The rows [b] bool that are valid and not alone in their group."""
    return valid & (pairs.sum(valid.float()) >= 2)


def _column_loss(
    image: Tensor,  # [b, D]
    inputs: Inputs,
    k: int,
    valid: Tensor,  # [b] bool
    pairs: Pairs,
    options: Options,
) -> Tensor:
    """This rank's share of L_CLIP of one column, over the samples that are valid in it."""
    caption, scale = inputs.captions[:, k], inputs.scale
    positive = _own_scores(image, caption, scale)

    # One direction at a time: what is masked are columns, and a sample leaves both sides.
    to_text = pairs.row_logsumexp(image, caption, scale, valid=valid, paired=True)
    to_image = pairs.row_logsumexp(caption, image, scale, valid=valid, paired=True)
    losses = softplus(to_text - positive) + softplus(to_image - positive)

    if options.label_smoothing:
        losses = losses + options.label_smoothing * _smoothing(
            image, caption, scale, positive, valid, pairs
        )
    return pairs.mean(losses / 2, valid)


def _smoothing(
    image: Tensor,
    caption: Tensor,
    scale: Tensor,
    positive: Tensor,
    valid: Tensor,
    pairs: Pairs,
) -> Tensor:
    """What a smoothed target adds to both cross-entropies for each ε: Σ_directions z_ii − mean_j
    z_ij.
    """
    # Candidates are the valid rows of the group: the others are zeros in the sums.
    takes_part = valid.unsqueeze(1)
    row_sums, column_sums = pairs.linear_sums(
        torch.where(takes_part, image, 0), torch.where(takes_part, caption, 0), scale
    )
    n_candidates = pairs.sum(valid.to(positive.dtype)).clamp(min=1)
    return 2 * positive - (row_sums + column_sums) / n_candidates


def _own_scores(image: Tensor, caption: Tensor, scale: Tensor | float) -> Tensor:
    """scale·x_i·t_i of each row, [b], in float32 at least."""
    return torch.as_tensor(scale) * (widened(image) * widened(caption)).sum(-1)
