"""Sentences find what they see among their report's other sentences, and patches predict theirs.

    L = mean_i [ λ·d_i + ½ mean_k (CE(z_k·, k) + CE(z_·k, k)) ],   z_kl = region_scale·t_ik·u_il

t: [b, K', D] the sentences of the texts, u: [b, K', D] what each of them sees of its picture, by
sigmoid gates over the patches, and d: [b] how far the picture's patches are from what they see of
the text, in [0, 2]: 1 − the negative cosine of SimSiam (`vlp.models.regions` has u and d). The
cross-entropy is over the valid sentences of one text; k runs over them, i over samples with one.
λ is `patch_weight`, region_scale the head's own (default: the model's scale).

Relations:
- a sample term: rows of a batch do not meet. The release finds sentences of other reports to harm,
  as many of them say the same
- where all samples have one sentence, it is λ·d alone
- `mil` compares sentences with patches of all samples

Papers:
- PRIOR (arXiv 2307.12577), its local alignment; without the bank of prototypes and both
  reconstructions of the release: `objective: {infonce: {}, prior: {}}`

Needs: captions, captions_valid, attended_captions, patch_distances

Cost: O(b·K'·D) memory and b·K'²·D FLOPs; in the model b·P·K'·D, and no patches are kept

Use: with texts of several sentences of one picture each (data.captions: {choose: sentences, n: 8}),
where other samples say the same, such as reports
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._softmax import negative_log_probability
from vlp.pairwise import Pairs

NEEDS = frozenset({"captions", "captions_valid", "attended_captions", "patch_distances"})
OPTIONAL = frozenset({"region_scale"})


@dataclass(frozen=True)
class Options:
    patch_weight: float = 1.0  # λ: of the patches' part

    def __post_init__(self) -> None:
        if self.patch_weight < 0:
            raise ValueError(f"patch_weight: found {self.patch_weight}, expected a number >= 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    inputs = inputs.wide()
    scale = inputs.scale if inputs.region_scale is None else inputs.region_scale
    valid = inputs.captions_valid
    z = torch.as_tensor(scale) * inputs.captions @ inputs.attended_captions.mT  # [b, K', K']

    both = _own_places(z, valid) + _own_places(z.mT, valid)
    of_sentences = both.sum(1) / (2 * valid.sum(1).clamp(min=1))
    losses = options.patch_weight * inputs.patch_distances + of_sentences
    return pairs.mean(losses, valid.any(1))


def _own_places(
    z: Tensor,  # [b, K', K']
    valid: Tensor,  # [b, K'] bool
) -> Tensor:
    """−log of the softmax of each row at its own place, [b, K']; 0 where it takes no part."""
    masked = z.masked_fill(~valid.unsqueeze(1), -torch.inf)
    # A row that takes no part has no place of its own: any finite one will do.
    finite = torch.where(valid.unsqueeze(2), masked, 0)
    places = torch.arange(z.shape[1], device=z.device).expand(z.shape[:2])
    return torch.where(valid, negative_log_probability(finite, places), 0)
