"""Late interaction: every token meets its best patch, and every patch its best token.

    L = ½ mean_i [CE(scale·s_i·, i) + CE(scale·s_·i, i)],   s_ij = ½ (a_ij + b_ij)
    a_ij = mean_m max_l v_im·w_jl,   b_ij = mean_l max_m v_im·w_jl

v: [b, P, D] the patches of the images, w: [b, L', D] the tokens of the texts; padding takes no
part, nor does a sample that has nothing else. With `scores: apart` images are compared by a and
texts by b. `keep` is the share of a picture's patches, and of a text's tokens, that remain: those
with the highest maximum over all places of the other side on this rank, which several ranks
therefore choose otherwise than one.

Relations:
- with one patch and one token it is `infonce` of these rows
- `fsc` compares tokens with those of a sample's own hard captions alone, at O(b)
- with `candidates: rank` the same as with groups of one rank (pairwise.topology), for this term

Papers:
- FILIP (arXiv 2111.07783), with model.embed_dim 256; that 25 % are kept is not confirmed from the
  paper itself: `objective: {filip: {scores: apart, keep: 0.25}}`
- beside whole embeddings, on the candidates of each rank: `objective: {infonce: {}, filip:
  {candidates: rank, weight: 0.5}}`

Needs: image_tokens, text_tokens, text_tokens_valid, scale

Cost: b·n·P·L'·D FLOPs in float32, a block of pairs at a time and computed again in backward; n·L'·D
memory for the group's tokens and n² for the scores: take small groups, or `candidates: rank`.
Patches and tokens of all micro-batches of a step are kept, b·(P + L')·D

Use: where words and parts of a picture should find each other, such as for grounding; evaluation
and export compare whole embeddings, so keep `infonce` beside it
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._local_pairs import contrast, scores_of_group
from vlp.losses._places import NUMBERS, patch_mask
from vlp.pairwise import Pairs

NEEDS = frozenset({"image_tokens", "text_tokens", "text_tokens_valid", "scale"})
OPTIONAL = frozenset({"image_tokens_valid"})


@dataclass(frozen=True)
class Options:
    # mean: both directions compare s; apart: images compare a, texts b (the paper)
    scores: Literal["mean", "apart"] = "mean"
    keep: float = 1.0  # share of patches and of tokens that remain, in (0, 1] (the paper: .25)
    # group: those of pairwise.topology; rank: this rank's alone
    candidates: Literal["group", "rank"] = "group"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep: found {self.keep}, expected 0 < share <= 1")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    inputs = inputs.wide()
    if options.candidates == "rank":
        pairs = pairs.alone

    patches = inputs.image_tokens, patch_mask(inputs)
    words = inputs.text_tokens, inputs.text_tokens_valid
    valid = patches[1].any(1) & words[1].any(1)

    # Each side by all places of the other.
    if options.keep < 1:
        kept_patches = _kept(*patches, *words, options.keep)
        kept_words = _kept(*words, *patches, options.keep)
        patches, words = kept_patches, kept_words

    numbers = patches[0].shape[1] * words[0].shape[1]
    scores = scores_of_group(_best, patches, words, numbers, pairs)
    of_images, of_texts = torch.as_tensor(inputs.scale) * scores
    if options.scores == "mean":
        of_images = of_texts = (of_images + of_texts) / 2
    return contrast(of_images, of_texts, valid, pairs)


def _best(patches: Tensor, is_patch: Tensor, words: Tensor, is_word: Tensor) -> Tensor:
    """a and b of i images [i, P, D] with j texts [j, L', D], [2, i, j]."""
    similarities = torch.einsum("ipd,jld->ijpl", patches, words)
    of_patches = _highest(similarities, is_word[None, :, None])  # [i, j, P]
    of_words = _highest(similarities.mT, is_patch[:, None, None])  # [i, j, L']
    return torch.stack([_mean(of_patches, is_patch[:, None]), _mean(of_words, is_word[None])])


def _highest(similarities: Tensor, valid: Tensor) -> Tensor:
    """The maximum over the last dimension where it is valid; 0 where nothing is."""
    highest = similarities.masked_fill(~valid, -torch.inf).amax(-1)
    return highest.masked_fill(~valid.any(-1), 0)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """The mean over the last dimension where it is valid; 0 where nothing is."""
    return torch.where(valid, values, 0).sum(-1) / valid.sum(-1).clamp(min=1)


def _kept(
    places: Tensor,  # [b, P, D]
    is_place: Tensor,  # [b, P] bool
    others: Tensor,  # [b, L', D]
    is_other: Tensor,  # [b, L'] bool
    share: float,
) -> tuple[Tensor, Tensor]:
    """The `share` of each sample's places with the highest maxima, and which of them it has."""
    n_kept = math.ceil(share * places.shape[1])
    highest = _highest_of_rank(places, others, is_other).masked_fill(~is_place, -torch.inf)
    best = highest.topk(n_kept, dim=1).indices

    # Best first: of a shorter text fewer remain.
    n_of_sample = (share * is_place.sum(1, keepdim=True).double()).ceil()
    remains = torch.arange(n_kept, device=places.device) < n_of_sample
    rows = best.unsqueeze(2).expand(-1, -1, places.shape[2])
    return places.gather(1, rows), remains


@torch.no_grad()
def _highest_of_rank(places: Tensor, others: Tensor, is_other: Tensor) -> Tensor:
    """Each place's maximum over all places of all samples of the other side, [b, P]."""
    highest = places.new_full(places.shape[:2], -torch.inf)
    n_at_once = max(1, NUMBERS // highest.numel())

    chunks = zip(others.flatten(0, 1).split(n_at_once), is_other.flatten().split(n_at_once))
    for candidates, valid in chunks:
        similarities = (places @ candidates.T).masked_fill(~valid, -torch.inf)
        highest = torch.maximum(highest, similarities.amax(-1))
    return highest
