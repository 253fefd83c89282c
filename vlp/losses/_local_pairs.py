"""InfoNCE on scores of pairs that many rows a sample make: of tokens and patches, of sentences.

    L = ½ mean_i [CE(z_i·, i) + CE(z_·i, i)],  z = scale·s

The scores s_ij of all pairs are n² numbers, which a rank holds; what they are made of, n² times the
tokens of both sides, is there for a block of pairs at a time, and where there are several computed
again in backward. Texts are gathered over the group, then the scores: each pair is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from vlp.losses._places import NUMBERS, recomputed
from vlp.losses._softmax import negative_log_probability
from vlp.pairwise import Pairs

# Scores [S, i, j] of i images with j texts, of rows of both.
Scores = Callable[..., Tensor]


def scores_of_group(
    scores: Scores,
    image: Sequence[Tensor],  # [b, …] each: this rank's rows
    text: Sequence[Tensor],  # [b, …]
    numbers: int,  # that `scores` holds of a pair
    pairs: Pairs,
) -> Tensor:
    """The scores of all pairs of the group, [S, n, n], whole on each of its ranks."""
    texts = [_gathered(rows, pairs) for rows in text]

    # Blocks as square as the bound allows: of both sides few rows are then read again.
    n_at_once = max(1, NUMBERS // numbers)
    n_images = min(len(image[0]), max(1, int(n_at_once**0.5)))
    n_texts = max(1, n_at_once // n_images)

    image_blocks = list(zip(*(rows.split(n_images) for rows in image)))
    text_blocks = list(zip(*(rows.split(n_texts) for rows in texts)))
    is_one_block = len(image_blocks) == len(text_blocks) == 1
    scores_of = scores if is_one_block else partial(recomputed, scores)

    strips = []
    for images in image_blocks:
        blocks = [scores_of(*images, *block) for block in text_blocks]
        strips.append(torch.cat(blocks, 2))

    # A rank's rows first, as ranks exchange rows.
    own = torch.cat(strips, 1).transpose(0, 1).contiguous()
    return pairs.gather(own).transpose(0, 1)


def contrast(
    image_scores: Tensor,  # [n, n] z of the group, whose rows are compared along texts
    text_scores: Tensor,  # [n, n] z of the group, whose columns are compared along images
    valid: Tensor,  # [b] bool: this rank's samples that take part
    pairs: Pairs,
) -> Tensor:
    """This rank's share of L over the samples that take part, of all ranks."""
    n_rows = len(valid)
    first = pairs.group.index * n_rows
    of_rank = slice(first, first + n_rows)
    places = torch.arange(first, first + n_rows, device=valid.device)
    takes_part = _gathered(valid, pairs)

    total = image_scores.new_zeros(())
    for z in (image_scores[of_rank], text_scores[:, of_rank].T):
        # A row that takes no part has no positive either: any finite one will do.
        masked = z.masked_fill(~takes_part, -torch.inf)
        finite = torch.where(valid.unsqueeze(1), masked, 0)
        total = total + pairs.mean(negative_log_probability(finite, places), valid)
    return total / 2


def _gathered(rows: Tensor, pairs: Pairs) -> Tensor:
    # Ranks exchange numbers.
    if rows.dtype == torch.bool:
        return pairs.gather(rows.to(torch.uint8)).bool()
    return pairs.gather(rows)
