"""Softmax losses over candidates that are positives, negatives or neither.

With P_i the positives of row i, its own pair among them, N_i its negatives, and
H_i = log Σ_{j∈N_i} e^{z_ij}, −∞ where there is none, the row's loss is

    out         (1/|P_i|) Σ_{p∈P_i} log [ (α Σ_{q∈P_i} e^{z_iq} + e^{H_i}) / e^{z_ip} ]
    in          log [ α + e^{H_i} / Σ_{p∈P_i} e^{z_ip} ]
    decoupled   (1/|P_i|) Σ_{p∈P_i} log [ α + e^{H_i − z_ip} ]

`infonce` is α = 1, `decoupled` α = 0, and `hn_nce` weighs its negatives, which changes H_i alone.
With one positive the three are one. Nothing cancels where a row is sure of its pair: its own score
leaves every sum. With α = 0 a row without negatives has nothing to be compared with, and counts 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlp.losses import _candidates
from vlp.losses._candidate_options import Candidates, Formed
from vlp.losses._candidates import Chosen, Masks
from vlp.losses._inputs import Inputs
from vlp.pairwise import LOGSUMEXP, SUM, Pairs, Tile, logaddexp, number, softplus

# What a row is worth, by name: H_i and, for weighted negatives, its divisor; how many negatives no
# rule ignores; and of the positives but the pair log Σ e^z, Σ z and their number.
KINDS = {
    "negatives": LOGSUMEXP,
    "flat": LOGSUMEXP,
    "n_kept": SUM,
    "n_further": SUM,
    "further_log_sum": LOGSUMEXP,
    "further_sum": SUM,
}
Statistics = dict[str, Tensor]  # [b] each


def of_pairs(
    inputs: Inputs,
    pairs: Pairs,
    options: Formed,
    alpha: float = 1.0,
    beta: float | None = None,  # concentration of weighted negatives, see `hn_nce`
) -> tuple[Tensor, Tensor]:
    """Losses of images against texts [b], and of texts against images [b]."""
    chosen = _candidates.of_batch(inputs, pairs, options)
    names, scale = _names(options, beta), number(inputs.scale, inputs.image)
    kinds = tuple(KINDS[name] for name in names)

    def function(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
        z = tile.shared[0] * tile.scores[0]
        by_row = [_matrix(name, z, masks, 0, beta) for name in names]
        by_column = [_matrix(name, z, masks, 1, beta) for name in names]
        return (z.masked_fill(~tile.positive, 0), *by_row, *by_column)

    own, *sums = chosen.reduce(
        pairs,
        function,
        inputs.image,
        inputs.text,
        rows=(SUM, *kinds),
        columns=kinds,
        shared=[scale],
    )
    sides = [dict(zip(names, sums[: len(names)])), dict(zip(names, sums[len(names) :]))]
    for side, rows, name in zip(sides, (inputs.image, inputs.text), ("image", "text")):
        side["negatives"] = _negatives(side, options, beta)
        if options.within in (name, "both"):
            others = _within(chosen, pairs, rows, scale)
            side["negatives"] = logaddexp(side["negatives"], others)
    n_others = pairs.candidates(len(own)) - 1
    note(pairs, options, sides, (n_others, n_others))

    if options.positives != "none" and options.form == "decoupled":
        _add_further_losses(sides, chosen, inputs, pairs, scale, alpha)
    by_image, by_text = (losses(side, own, options, alpha) for side in sides)
    return by_image, by_text


def of_queue(
    query: Tensor,  # [b, D]
    own: Tensor,  # [b], scores of the rows' own keys
    queue: Tensor,  # [Q, D]
    scale: float,
    chosen: Chosen,
    pairs: Pairs,
    options: Formed,
) -> tuple[Tensor, Statistics]:
    """Losses [b] of rows whose candidates are their own key and those of a queue; statistics."""
    names, factor = _names(options, None), number(scale, query)

    def function(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
        z = tile.shared[0] * tile.scores[0]
        return tuple(_matrix(name, z, masks, 0, None) for name in names)

    sums = chosen.reduce(
        pairs.alone,
        function,
        query,
        queue,
        rows=tuple(KINDS[name] for name in names),
        shared=[factor],
        paired=False,
    )
    side = dict(zip(names, sums))
    if options.positives != "none" and options.form == "decoupled":
        (side["further_losses"],) = _further_losses(
            [side], chosen, pairs.alone, query, queue, factor, 1.0, paired=False
        )
    return losses(side, own, options, 1.0), side


def losses(side: Statistics, own: Tensor, options: Formed, alpha: float) -> Tensor:
    """The loss of each row, [b], by its statistics and its own score."""
    negatives = side["negatives"]
    if options.positives == "none":
        values = _log_add(negatives - own, alpha)

    elif options.form == "out":
        # Every positive is compared with all candidates; on the mean, with the pair's own score.
        n_further, others = side["n_further"], negatives
        if alpha:
            others = logaddexp(others, side["further_log_sum"] + math.log(alpha))
        gain = (side["further_sum"] - n_further * own) / (1 + n_further)
        values = _log_add(others - own, alpha) - gain

    elif options.form == "in":
        values = _log_add(negatives - logaddexp(own, side["further_log_sum"]), alpha)

    else:
        total = _log_add(negatives - own, alpha) + side["further_losses"]
        values = total / (1 + side["n_further"])

    # Without the positive in the denominator, nothing is left of an empty one.
    return values if alpha else torch.where(negatives == -torch.inf, 0, values)


def note(
    pairs: Pairs,
    options: Candidates,
    sides: Sequence[Statistics],
    n_others: Sequence[Tensor | int],  # candidates of a row but its own, of each side
) -> None:
    """What the masks did, for the log: the share of ignored pairs and the mean of |P_i|."""
    further = [side.get("n_further", torch.zeros_like(side["n_kept"])) for side in sides]
    if options.positives != "none":
        pairs.note("positives", 1 + torch.stack(further).mean())

    if options.ignore.active:
        shares = []
        for side, positives, n in zip(sides, further, n_others):
            n_negatives = n - positives
            shares.append((n_negatives - side["n_kept"]) / n_negatives.clamp(min=1))
        pairs.note("ignored", torch.stack(shares).mean())


def _names(options: Formed, beta: float | None) -> list[str]:
    """The statistics that the options make necessary."""
    names = ["negatives"] if beta is None else ["negatives", "flat"]
    names.append("n_kept")
    if options.positives == "none":
        return names

    of_form = {"out": ["further_log_sum", "further_sum"], "in": ["further_log_sum"]}
    return [*names, "n_further", *of_form.get(options.form, [])]


def _matrix(name: str, z: Tensor, masks: Masks, side: int, beta: float | None) -> Tensor:
    """The entries that a statistic adds up, [m, n]; side: 0 of rows, 1 of columns."""
    hard, further = masks.hard[side], masks.further
    sharp = z if beta is None else (1 + beta) * z

    matrices: dict[str, Callable[[], Tensor]] = {
        "negatives": lambda: sharp.masked_fill(~hard, -torch.inf),
        "flat": lambda: ((beta or 0.0) * z).masked_fill(~hard, -torch.inf),
        "n_kept": lambda: masks.kept[side].to(z.dtype),
        "n_further": lambda: further.to(z.dtype),
        "further_log_sum": lambda: z.masked_fill(~further, -torch.inf),
        "further_sum": lambda: z.masked_fill(~further, 0),
    }
    return matrices[name]()


def _negatives(side: Statistics, options: Candidates, beta: float | None) -> Tensor:
    """H_i: of weighted negatives log|N_i| + Λ(1+β) − Λ(β), else the sum as it is."""
    if beta is None:
        return side["negatives"]

    # Of the hardest there are at most as many as were asked for.
    n_negatives = side["n_kept"].clamp(min=1, max=options.hardest)
    empty = side["negatives"] == -torch.inf
    sharp, flat = (side[name].masked_fill(empty, 0) for name in ("negatives", "flat"))
    return (n_negatives.log() + sharp - flat).masked_fill(empty, -torch.inf)


def _within(chosen: Chosen, pairs: Pairs, rows: Tensor, scale: Tensor) -> Tensor:
    """log Σ e^{scale·x_i·x_j} over the negatives j of the row's own modality, [b]."""

    def function(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
        z = tile.shared[0] * tile.scores[0]
        return (z.masked_fill(~masks.kept[0], -torch.inf),)

    (sums,) = chosen.reduce(pairs, function, rows, rows, rows=(LOGSUMEXP,), shared=[scale])
    return sums


def _add_further_losses(
    sides: list[Statistics],
    chosen: Chosen,
    inputs: Inputs,
    pairs: Pairs,
    scale: Tensor,
    alpha: float,
) -> None:
    """The decoupled losses of the positives but the pair, in a second pass: H_i comes first."""
    sums = _further_losses(sides, chosen, pairs, inputs.image, inputs.text, scale, alpha)
    for side, further in zip(sides, sums):
        side["further_losses"] = further


def _further_losses(
    sides: Sequence[Statistics],
    chosen: Chosen,
    pairs: Pairs,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    alpha: float,
    *,
    paired: bool = True,
) -> tuple[Tensor, ...]:
    """Σ log(α + e^{H_i − z_ip}) over the positives but the pair, of the rows, then the columns."""
    # An empty sum is no number to compute with; its row is settled afterwards.
    empty = [side["negatives"] == -torch.inf for side in sides]
    normalisers = [
        side["negatives"].masked_fill(nothing, 0).to(scale.dtype)
        for side, nothing in zip(sides, empty)
    ]

    def function(tile: Tile, masks: Masks) -> tuple[Tensor, ...]:
        z, others = tile.shared[0] * tile.scores[0], ~masks.further
        matrices = [_log_add(tile.row_values[0].unsqueeze(1) - z, alpha).masked_fill(others, 0)]
        if tile.column_values:
            gaps = tile.column_values[0].unsqueeze(0) - z
            matrices.append(_log_add(gaps, alpha).masked_fill(others, 0))
        return tuple(matrices)

    sums = chosen.reduce(
        pairs,
        function,
        left,
        right,
        rows=(SUM,),
        columns=(SUM,) * len(sides[1:]),
        row_values=normalisers[:1],
        column_values=normalisers[1:],
        shared=[scale],
        paired=paired,
    )
    # log(α + e^{−∞ − z}) of every positive.
    limit = math.log(alpha) if alpha else 0.0
    return tuple(
        torch.where(nothing, limit * side["n_further"], total)
        for side, nothing, total in zip(sides, empty, sums)
    )


def _log_add(q: Tensor, alpha: float) -> Tensor:
    """log(α + e^q), which for α = 1 is softplus."""
    if not alpha:
        return q
    log_alpha = math.log(alpha)
    return softplus(q - log_alpha) + log_alpha
