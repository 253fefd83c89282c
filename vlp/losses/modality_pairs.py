"""InfoNCE of every two modalities: what binds many modalities by the pairs that data have.

    L = Σ_{(a, b) ∈ pairs} ½ [ mean_i CE(z_i·, i) + mean_j CE(z_·j, j) ],   z_ij = scale·r_a,i·r_b,j

r_m: [b, D] image, text, and further modalities [O, b, D] (`others`). Each sum is over the samples
that have both modalities (`others_valid`), whose others are the candidates; a pair that no sample
of a batch has gives 0, and `A_B` in the log is the share of the samples that have A and B.

Relations:
- of image and text alone it is `infonce`, bit for bit
- `gram` and `symile` compare all modalities of a sample at once

Papers:
- ImageBind (arXiv 2305.05665), whose pairs all hold the image: `objective: {modality_pairs:
  {pairs: [[image, text], [image, audio]]}}`; here all pairs share one scale
- LanguageBind (arXiv 2310.01852) binds to the text instead: `objective: {modality_pairs: {pairs:
  [[text, image], [text, audio]]}}`

Needs: image, text, scale; where the call carries them others, others_valid and other_names

Cost: one pass over the candidates for each pair, 8·b·n·D FLOPs; O(O·b·D) memory

Use: with data of which few samples have all modalities, or with a modality that is to be found by
any other
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses import _modalities
from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text", "scale"})
OPTIONAL = _modalities.BY_NAME


@dataclass(frozen=True)
class Options:
    # all, or names two by two: [[image, text], [text, audio]]
    pairs: list[tuple[str, str]] | Literal["all"] = "all"

    def __post_init__(self) -> None:
        if self.pairs == "all":
            return
        different = {frozenset(pair) for pair in self.pairs}
        if not self.pairs or len(different) < len(self.pairs) or min(map(len, different)) < 2:
            raise ValueError(
                f"pairs: found {self.pairs}, expected pairs of two different modalities, each once"
            )

    def of(self, names: list[str]) -> list[tuple[str, str]]:
        """The pairs that are compared; ValueError for a name that is not among `names`."""
        if self.pairs == "all":
            return list(itertools.combinations(names, 2))
        unknown = sorted({name for pair in self.pairs for name in pair} - set(names))
        if unknown:
            raise ValueError(
                f"pairs: found {', '.join(unknown)}, expected modalities of the run: "
                f"{', '.join(names)}"
            )
        return list(self.pairs)


def check_modalities(options: Options, names: list[str], width: int, n: int) -> None:
    """Refuse pairs of modalities that a run does not have. ValueError."""
    options.of(names)


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    rows, masks = _modalities.by_name(inputs)

    losses = []
    for first, second in options.of(list(rows)):
        mask = _modalities.both(masks[first], masks[second])
        losses.append(_modalities.infonce(rows[first], rows[second], mask, inputs.scale, pairs))
        if mask is not None:
            pairs.note(f"{first}_{second}", pairs.mean(mask.float()))
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]
