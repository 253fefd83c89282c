"""Local hard negatives: each token of a text looks for its patches, and all tokens make the score.

    L = mean_i Σ_k y_k (1−p_k)^γ (−log p_k),   p = softmax of {S(x_i, t_i), S(x_i, n_i1), …}
    S(x, t) = log Σ_l e^{scale·w_l·u_l},   u_l = unit(Σ_m a_lm v_m)

v: [b, P, D] the patches of the images, w: [b, L', D] the tokens of the texts and [b, K, L', D]
those of the hard captions n_ik; y the target of `hard_negatives` (own) with ε. The attention a_l of
a token over the patches has no gradient; of s'_lm = w_l·v_m, less its least over m and divided by
its spread,

    minmax    a_lm = s'_lm / Σ_m s'_lm         softmax    a_l = softmax of s'_lm over m

Padding takes no part, nor do hard captions that are not valid or have no token. The mean runs over
samples with a valid hard caption, of all ranks. Patches that are all alike weigh the same.

Relations:
- a sample term: rows of a batch do not meet
- with one patch and one token a text, `hard_negatives: {form: own}` of these rows
- `filip` compares the tokens of all samples; its cost is the square of the batch

Papers:
- FSC-CLIP (arXiv 2410.05210), whose release takes patches that are no unit rows:
  `objective: {infonce: {}, hard_negatives: {form: own, focal: 2, smoothing: 0.02, weight: 0.5},
  fsc: {weight: 0.2}}`

Needs: image_tokens, text_tokens, text_tokens_valid, negatives, negatives_valid, negative_tokens,
negative_tokens_valid, scale

Cost: O(b·(P + (1 + K)·L')·D) memory for the tokens, kept in all micro-batches of a step; the
products, b·(1 + K)·L'·P·D FLOPs, a chunk at a time. The text tower runs on b·K captions more

Use: to fine-tune for composition where global hard negatives cost zero-shot accuracy; with
`hard_negatives` and a small weight
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._own_sample import focal_loss
from vlp.losses._places import in_chunks, patch_mask
from vlp.pairwise import Pairs, logsumexp

NEEDS = frozenset(
    {
        "image_tokens",
        "text_tokens",
        "text_tokens_valid",
        "negatives",
        "negatives_valid",
        "negative_tokens",
        "negative_tokens_valid",
        "scale",
    }
)
OPTIONAL = frozenset({"image_tokens_valid"})


@dataclass(frozen=True)
class Options:
    # how similarities between 0 and 1 become weights: by their share, as released, or by a softmax
    attention: Literal["minmax", "softmax"] = "minmax"
    focal: float = 2.0  # γ
    smoothing: float = 0.02  # ε

    def __post_init__(self) -> None:
        if self.focal < 0 or not 0 <= self.smoothing < 1:
            raise ValueError(f"expected focal >= 0, 0 <= smoothing < 1, found {self}")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    inputs = inputs.wide()
    tokens = torch.cat([inputs.text_tokens.unsqueeze(1), inputs.negative_tokens], 1)
    is_token = torch.cat([inputs.text_tokens_valid.unsqueeze(1), inputs.negative_tokens_valid], 1)
    is_patch = patch_mask(inputs)

    # A text of padding alone has no score, nor has a picture without patches.
    has_tokens = is_token.any(2)
    valid = inputs.negatives_valid & has_tokens[:, 1:]
    takes_part = valid.any(1) & has_tokens[:, 0] & is_patch.any(1)

    rows = [inputs.image_tokens, is_patch, tokens, is_token]
    numbers = tokens.shape[1] * tokens.shape[2] * is_patch.shape[1]
    score = partial(_scores, attention=options.attention)
    scores = in_chunks(score, rows, torch.as_tensor(inputs.scale), numbers=numbers)

    # 0 for a sample that takes no part: the margin of −∞ would be NaN.
    z = torch.cat([scores[:, :1], scores[:, 1:].masked_fill(~valid, -torch.inf)], 1)
    z = torch.where(takes_part.unsqueeze(1), z, 0)
    losses = focal_loss(z, valid & takes_part.unsqueeze(1), options.focal, options.smoothing)
    return pairs.mean(losses, takes_part)


def _scores(
    patches: Tensor,  # [b, P, D]
    is_patch: Tensor,  # [b, P] bool
    tokens: Tensor,  # [b, 1 + K, L', D]
    is_token: Tensor,  # [b, 1 + K, L'] bool
    scale: Tensor,
    *,
    attention: str,
) -> Tensor:
    """S of each text of a sample with its image, [b, 1 + K]; −∞ for a text without tokens."""
    weights = _attention(patches, is_patch, tokens, attention)
    attended = torch.einsum("bklp,bpd->bkld", weights, patches)
    attended = F.normalize(attended, dim=-1)

    scores = scale * (tokens * attended).sum(-1)
    return logsumexp(scores.masked_fill(~is_token, -torch.inf), -1)


@torch.no_grad()
def _attention(patches: Tensor, is_patch: Tensor, tokens: Tensor, attention: str) -> Tensor:
    """a, [b, 1 + K, L', P]: rows whose sum is 1."""
    similarities = torch.einsum("bkld,bpd->bklp", tokens, patches)
    # A picture without patches takes no part; its numbers need only be finite.
    is_patch = (is_patch | ~is_patch.any(1, keepdim=True))[:, None, None]

    least = similarities.masked_fill(~is_patch, torch.inf).amin(-1, keepdim=True)
    most = similarities.masked_fill(~is_patch, -torch.inf).amax(-1, keepdim=True)
    spread = most - least
    shares = torch.where(spread > 0, (similarities - least) / spread, 1)

    if attention == "softmax":
        return shares.masked_fill(~is_patch, -torch.inf).softmax(-1)
    shares = torch.where(is_patch, shares, 0)
    return shares / shares.sum(-1, keepdim=True)
