"""Multiple instances: a sentence belongs to a picture where one of its patches does.

    L = ½ mean_i [CE(scale·s_i·, i) + CE(scale·s_·i, i)]
    s_ij = mean_k (1/γ) log Σ_m e^{γ·v_im·t_jk}

v: [b, P, D] the patches of the images, t: [b, K', D] the sentences of the texts, t_jk being caption
k of sample j. Sentences that are not valid take no part, nor do samples without any.

Relations:
- γ → ∞ gives each sentence its best patch; with one patch and one sentence it is `infonce`
- `captions` compares sentences with the whole picture
- `filip` matches tokens, and patches with them as well

Papers:
- the local part of LSE (arXiv 2212.05561), whose γ and second, global part are not confirmed here:
  `objective: {infonce: {}, mil: {gamma: 10}}`

Needs: image_tokens, captions, captions_valid, scale

Cost: b·n·P·K'·D FLOPs, a block of pairs at a time and computed again in backward; n·K'·D memory for
the group's sentences and n² for the scores. Patches of all micro-batches of a step are kept, b·P·D

Use: for long texts whose sentences tell of parts of the picture, such as reports (data.captions:
{choose: sentences, n: 8}); evaluation compares whole embeddings, so keep `infonce` beside it
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._local_pairs import contrast, scores_of_group
from vlp.losses._places import patch_mask
from vlp.pairwise import Pairs, logsumexp

NEEDS = frozenset({"image_tokens", "captions", "captions_valid", "scale"})
OPTIONAL = frozenset({"image_tokens_valid"})


@dataclass(frozen=True)
class Options:
    gamma: float = 10.0  # γ: how much the best patch of a sentence outweighs the others
    # group: those of pairwise.topology; rank: this rank's alone
    candidates: Literal["group", "rank"] = "group"

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ValueError(f"gamma: found {self.gamma}, expected γ > 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    inputs = inputs.wide()
    if options.candidates == "rank":
        pairs = pairs.alone

    patches = inputs.image_tokens, patch_mask(inputs)
    sentences = inputs.captions, inputs.captions_valid
    valid = patches[1].any(1) & sentences[1].any(1)

    numbers = patches[0].shape[1] * sentences[0].shape[1]
    of_block = partial(_scores, gamma=options.gamma)
    scores = scores_of_group(of_block, patches, sentences, numbers, pairs)[0]
    z = torch.as_tensor(inputs.scale) * scores
    return contrast(z, z, valid, pairs)


def _scores(
    patches: Tensor,  # [i, P, D]
    is_patch: Tensor,  # [i, P] bool
    sentences: Tensor,  # [j, K', D]
    is_sentence: Tensor,  # [j, K'] bool
    *,
    gamma: float,
) -> Tensor:
    """s of i images with j texts, [1, i, j]; 0 where one of them takes no part."""
    similarities = torch.einsum("ipd,jkd->ijkp", patches, sentences)
    # A picture without patches takes no part; its numbers need only be finite.
    is_patch = (is_patch | ~is_patch.any(1, keepdim=True))[:, None, None]
    of_sentences = logsumexp((gamma * similarities).masked_fill(~is_patch, -torch.inf), -1) / gamma

    n_sentences = is_sentence.sum(1).clamp(min=1)
    return (torch.where(is_sentence, of_sentences, 0).sum(-1) / n_sentences).unsqueeze(0)
