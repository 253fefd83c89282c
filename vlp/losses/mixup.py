"""Mixup of embeddings: a mixture of two images must find both of their texts, and texts alike.

    L = ½ Σ_modalities ½ [ mean_i CE(z_i·, T_i·) + mean_j CE(z_·j, T_·j) ],   z_ij = x̃_i·t_j / τ
    x̃_i = norm(β_i x_i + (1−β_i) x_π(i)),   T_ii = β_i and T_iπ(i) = 1 − β_i

x, t: [b, D] images and texts; of the other modality t̃_i meets the images. CE(z, T) = −Σ T log
softmax(z), where a column of T need not sum to 1. π is a permutation of the group and β_i ~
Beta(alpha, alpha), or 1 for the rows that are not mixed; both are functions of (seed, step, row of
the step), whatever the ranks, and differ between modalities.

After the share `until` of the run nothing is mixed: L becomes the mean over images and texts u of
InfoNCE with the soft targets softmax_j(u_i·u_j / τ'), by the rows themselves without gradient. A
call that does not know the run's length mixes always.

Relations:
- with share 0 it is `infonce` at scale 1/temperature
- after `until` it is `infonce` with targets, {alpha: 1, of: image} and {alpha: 1, of: text}, whose
  teacher is the model

Papers:
- M3CoL (arXiv 2409.17777), which sums modalities and gives them .1, beside its classifiers:
  `objective: {mixup: {weight: 0.2}}`; its release mixes features before they are normalised and
  lets the soft targets learn
- Metrix (arXiv 2106.04990) mixes embeddings in metric learning

Needs: image, text

Cost: two passes over the pairs and the rows of both modalities gathered once; O(n·D) memory

Use: on small data sets, where samples share what their captions do not say; beside `infonce`
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses import _soft_targets
from vlp.losses._draws import beta, draws
from vlp.losses._inputs import Inputs
from vlp.losses._soft_targets import Targets
from vlp.pairwise import Pairs, is_narrow, number, softplus, widened
from vlp.seeds import derive

NEEDS = frozenset({"image", "text"})


@dataclass(frozen=True)
class Options:
    alpha: float = 0.15  # of Beta(α, α), from which the weight of a row in its mixture is drawn
    share: float = 0.5  # of the rows that are mixed
    temperature: float = 0.1  # τ
    until: float = 0.33  # share of the run in which rows are mixed; 1: all of it
    target_temperature: float = 0.125  # τ and τ' of the soft targets that follow
    until_step: int | None = None  # the first step without mixing; null: as `until` says

    def __post_init__(self) -> None:
        if min(self.alpha, self.temperature, self.target_temperature) <= 0:
            raise ValueError(
                "alpha, temperature and target_temperature: found "
                f"{self.alpha}, {self.temperature} and {self.target_temperature}, expected "
                "numbers > 0"
            )
        if not (0 <= self.share <= 1 and 0 <= self.until <= 1):
            raise ValueError(
                f"share and until: found {self.share} and {self.until}, expected 0 to 1"
            )


def for_run(options: Options, samples: int | None, steps: int | None) -> Options:
    """The options with the step at which mixing ends."""
    if options.until_step is not None or steps is None or options.until == 1:
        return options
    return replace(options, until_step=int(options.until * steps))


def exported_scale(options: Options) -> float:
    """1/τ."""
    return 1 / options.temperature


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    step = inputs.step or 0
    if options.until_step is not None and step >= options.until_step:
        return _soft(inputs, pairs, options)

    by_image = _mixed(inputs.image, inputs.text, "image", step, pairs, options)
    by_text = _mixed(inputs.text, inputs.image, "text", step, pairs, options)
    return pairs.mean(by_image + by_text) / 2


def _mixed(
    rows: Tensor,  # [b, D], whose mixtures
    columns: Tensor,  # [b, D] look for these
    name: str,
    step: int,
    pairs: Pairs,
    options: Options,
) -> Tensor:
    """The mean of both directions of each row, [b]."""
    weight, partners, shares = drawn(len(rows), name, step, pairs, options, rows.device)
    weight, shares = weight.to(widened(rows)), shares.to(widened(rows))

    partner_rows = widened(pairs.gather(rows))[partners]
    mixture = torch.lerp(partner_rows, widened(rows), weight.unsqueeze(1))
    mixture = torch.where(weight.unsqueeze(1) < 1, F.normalize(mixture, dim=1), widened(rows))
    partner_columns = widened(pairs.gather(columns))[partners]

    scale = 1 / options.temperature
    of_partner = scale * (mixture * partner_columns).sum(1)
    if is_narrow(rows):
        mixture = mixture.to(rows.dtype)
    by_row, by_column, own = pairs.logsumexp(mixture, columns, scale)

    # Centred on the row's own score: of a row that is not mixed nothing but InfoNCE is left.
    others = (1 - weight) * of_partner
    rows_loss = softplus(by_row - own) + (1 - weight) * own - others
    columns_loss = shares * softplus(by_column - own) + (shares - weight) * own - others
    return (rows_loss + columns_loss) / 2


def drawn(
    n_rows: int, name: str, step: int, pairs: Pairs, options: Options, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's rows β [b], π [b] as places in the group, and Σ_i T_ij [b]; float64."""
    first_row = pairs.backend.ranks.index * n_rows
    rows = pairs.gather(first_row + torch.arange(n_rows, device=device))
    seed = derive(pairs.backend.seed, "mixup", name, step)
    is_mixed, of_beta, order = (numbers[:, 0] for numbers in draws(rows, seed, 1))

    weight = torch.where(is_mixed < options.share, beta(of_beta, options.alpha), 1)
    partners = order.argsort()

    # What a column is the target of: its own row, and the row whose partner it is.
    shares = weight.index_add(0, partners, 1 - weight)
    own = slice(pairs.group.index * n_rows, (pairs.group.index + 1) * n_rows)
    return weight[own], partners[own], shares[own]


def _soft(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L after the rows have been mixed."""
    τ = options.target_temperature
    own = replace(
        inputs,
        scale=number(1 / τ, inputs.image),
        teacher_image=inputs.image.detach(),
        teacher_text=inputs.text.detach(),
    )
    by_image = Targets(by="softmax", of="image", alpha=1.0, temperature=τ)
    losses = [
        *_soft_targets.of_pairs(own, pairs, by_image),
        *_soft_targets.of_pairs(own, pairs, replace(by_image, of="text")),
    ]
    return pairs.mean(torch.stack(losses, 1))
