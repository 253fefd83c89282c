"""Latent translation: a modality is found where it is translated to, and comes back as it was.

    L = ½ Σ_{a → c} [ M(y, c) + cycle·mean_i d(y'_i, a_i) ],   y = g_ac(a),   y' = g_ca(y)
    M = ½ [ mean_i CE(z_i·, i) + mean_j CE(z_·j, j) ],   z_ij = scale·y_i·c_j
    M = mean_i d(y_i, c_i)   with `match: distance`

a, c: [b, D] the rows of two modalities, both ways of each pair in the sum; y, y': [b, D] the unit
rows that the translators of `model.heads.translators` make of them (`translated`, `cycled`,
[X, b, D], of the directions `translations`); d: ‖·‖, its square, or the sum of absolute
differences. M is over the samples that have both modalities, the way back over those that have a; a
batch without any gives 0. The log holds the two means over the directions as `match` and `cycle`.

Relations:
- with translators that change nothing and cycle 0 it is `modality_pairs` of the same pairs
- `siam` predicts without candidates, targets without gradient, and no way back

Papers:
- LaT (arXiv 2207.04858), text and video: `objective: {modality_pairs: {pairs: [[text, video]]},
  translation: {}}`; not confirmed beyond translators both ways and a loss of the cycle: the loss of
  a translation (`match`), the distance, its weight, the depth of a translator, and that rows are
  unit; evaluation compares embeddings, not translations

Needs: image, text, scale, translated, cycled; where the call carries them others, others_valid,
other_names and translations

Cost: one pass over the candidates for each direction, 8·b·n·D FLOPs; O((O + X)·b·D) memory, and the
translators'

Use: beside a contrastive term, where a joint space distorts what a modality says by itself
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses import _modalities
from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text", "scale", "translated", "cycled"})
OPTIONAL = _modalities.BY_NAME | {"translations"}


@dataclass(frozen=True)
class Options:
    # how a translation finds its target: among the candidates, or by its distance alone
    match: Literal["contrast", "distance"] = "contrast"
    distance: Literal["l2", "squared", "l1"] = "l2"  # d
    cycle: float = 1.0  # weight of the way back; 0: translations alone

    def __post_init__(self) -> None:
        if self.cycle < 0:
            raise ValueError(f"cycle: found {self.cycle}, expected a weight >= 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    rows, masks = _modalities.by_name(inputs)

    matches, cycles = [], []
    for place, (source, target) in enumerate(_directions(inputs, list(rows))):
        from_source, shared = masks[source], _modalities.both(masks[source], masks[target])
        there = _present(inputs.translated[place], from_source)
        back = _present(inputs.cycled[place], from_source)

        cycles.append(pairs.mean(_distance(back, rows[source], options), from_source))
        if options.match == "contrast":
            # What lacks the target is no candidate: its rows are selected by the mask.
            match = _modalities.infonce(there, rows[target], shared, inputs.scale, pairs)
        else:
            match = pairs.mean(_distance(there, rows[target], options), shared)
        matches.append(match)

    match, cycle = torch.stack(matches), torch.stack(cycles)
    pairs.note("match", match.mean())
    pairs.note("cycle", cycle.mean())
    return (match + options.cycle * cycle).sum() / 2


def _directions(inputs: Inputs, names: list[str]) -> list[tuple[str, str]]:
    """From which modality to which each translation leads; without names text to image and back,
    and so with each further modality.
    """
    n_translations = len(inputs.translated)
    if inputs.translations is not None:
        unknown = {name for direction in inputs.translations for name in direction} - set(names)
        if unknown:
            raise ValueError(
                f"translations: found {', '.join(sorted(unknown))}, expected modalities of the "
                f"call: {', '.join(names)}"
            )
        return list(inputs.translations)

    targets = [name for name in names if name != "text"]
    if n_translations != 2 * len(targets):
        raise ValueError(
            f"translated: found {n_translations} translations, expected {2 * len(targets)}, of "
            f"text to {', '.join(targets)} and back; name them: translations=((from, to), …)"
        )
    directions = []
    for target in targets:
        directions += [("text", target), (target, "text")]
    return directions


def _present(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The same with zeros for the samples that lack the modality, whatever was made of them."""
    return rows if mask is None else torch.where(mask.unsqueeze(1), rows, 0)


def _distance(rows: Tensor, targets: Tensor, options: Options) -> Tensor:
    """d of each row and its target, [b]."""
    # Half precision would round the difference of rows that are close.
    narrow = rows.dtype in (torch.bfloat16, torch.float16)
    difference = rows.float() - targets.float() if narrow else rows - targets
    if options.distance == "squared":
        return difference.square().sum(1)
    if options.distance == "l1":
        return difference.abs().sum(1)
    # Its gradient is 0 where nothing is left, and not NaN as that of a root.
    return torch.linalg.vector_norm(difference, dim=1)
