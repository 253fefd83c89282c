"""The order in which a cross-encoder puts the candidates that the student finds hardest.

Whoever runs the cross-encoder asks `hardest` which pairs to judge, and gives the scores to
`ranking`; places are in the group's rows, and after them the queue's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlp.losses._distill_captions import list_mle
from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, widened


class Asked(NamedTuple):
    """What a term asks a cross-encoder of each row."""

    hardest: int  # R, candidates that are judged
    queue: bool  # keys of the queue are among them


@torch.no_grad()
def hardest(
    rows: Tensor,  # [b, D]
    columns: Tensor,  # [b, D], of the other modality
    k: int,
    pairs: Pairs,
    queue: Tensor | None = None,  # [Q, D], zeros where it holds no key
) -> Tensor:
    """Places of the k highest of the other pairs' columns and the queue's, [b, k], best first.

    ValueError where there are fewer.
    """
    if queue is None:
        return pairs.hardest(rows, columns, k)

    # The best of either; the best of both is among them.
    n_batch = pairs.candidates(len(columns))
    of_batch = pairs.hardest(rows, columns, min(k, n_batch - 1))
    # Empty places come last, by a coordinate of their own: zeros score above negative cosines.
    ones, below = rows.new_ones(len(rows), 1), -4 * (~queue.any(1, keepdim=True)).to(queue.dtype)
    of_queue = pairs.alone.hardest(
        torch.cat([rows, ones], 1),
        torch.cat([queue, below], 1),
        min(k, len(queue)),
        paired=False,
    )
    places = torch.cat([of_batch, n_batch + of_queue], 1)

    every = torch.cat([pairs.gather(columns), queue.to(columns.dtype)])
    scores = torch.einsum("bd,bkd->bk", widened(rows), widened(every)[places])
    scores = scores.masked_fill(~every.any(1)[places], -torch.inf)
    return places.gather(1, scores.topk(k, 1).indices)


def ranking(inputs: Inputs, pairs: Pairs, delta: float, queue: bool) -> Tensor:
    """ListMLE of the candidates of every image and every text, the mean of both directions."""
    queued = (inputs.queue_text, inputs.queue_image) if queue else (None, None)
    by_image = _one_side(
        inputs,
        pairs,
        (inputs.image, inputs.text, queued[0]),
        (inputs.candidate_texts, inputs.candidate_text_scores),
        delta,
    )
    by_text = _one_side(
        inputs,
        pairs,
        (inputs.text, inputs.image, queued[1]),
        (inputs.candidate_images, inputs.candidate_image_scores),
        delta,
    )
    return (by_image + by_text) / 2


def _one_side(
    inputs: Inputs,
    pairs: Pairs,
    sides: tuple[Tensor, Tensor, Tensor | None],  # rows, columns, the queue of columns
    judged: tuple[Tensor, Tensor],  # places and scores, [b, R]
    delta: float,
) -> Tensor:
    rows, columns, queue = sides
    places, scores = judged
    candidates = pairs.gather(columns)
    if queue is not None:
        candidates = torch.cat([candidates, queue.detach().to(candidates.dtype)])

    # Up to the first that is clearly less true than the pair itself: below it all is noise.
    valid = scores >= inputs.pair_score.unsqueeze(1) - delta
    z = torch.as_tensor(inputs.scale) * torch.einsum("bd,bkd->bk", rows, candidates[places])
    return pairs.mean(list_mle(z, scores, valid), valid.any(1))
