"""Hard negatives mixed from a queue: InfoNCE with a queue and synthetic keys between its hardest.

    L = ½ Σ_directions mean_i −log [ e^{z_ii} / (Σ_j e^{z_ij} + Σ_{q ∈ Q} e^{scale·x_i·q}
                                                             + Σ_{h ∈ H_i} e^{scale·x_i·h}) ]

x, t: [b, D] images and texts; Q: [Q, D] the queue of the other modality, rows of zeros being empty.
H_i: [mixed, D] are mixtures of pairs of the N members of Q that score highest with x_i,
norm(α q + (1−α) q'), α ~ U(0, 1), and of the query with one of them, norm(β x_i + (1−β) q), β ~
U(0, ½). Neither Q nor H has a gradient. Draws are a function of (seed, step, row of the step),
whatever the ranks.

With `extrapolate` a, the score of a pair is that of norm(m x_i + (1−m) t_i) and
norm(m t_i + (1−m) x_i), m = 1 + Beta(a, a) drawn for each coordinate: a harder positive. With
`interpolate` a, every key of the queue becomes norm(λ q + (1−λ) q_π), π a permutation of the queue
and λ ~ Beta(a, a) for each coordinate.

Relations:
- with nothing mixed this is `infonce` with a queue
- m = 1 and λ = 1, as with 0 for both keys, leave the plain loss
- in the paper, which has one modality, the pair itself is the only candidate of the batch
  (`in_batch: false`)

Papers:
- MoCHi (arXiv 2010.01028):
  `objective: {mixing: {hardest: 1024, mixed_pairs: 1024, mixed_queries: 128, in_batch: false}}`
- transformed features (arXiv 2108.02982), at a temperature of .07: `objective: {mixing:
  {mixed_pairs: 0, mixed_queries: 0, in_batch: false, extrapolate: 2, interpolate: 1.6}}`; the
  release compares the extrapolated query with the queue as well, and does not normalise by default

Needs: image, text, scale, queue_image, queue_text

Cost: the pairs and b·(Q + mixed) scores a direction; rows are mixed in blocks of the queue's size
and again in backward, so that memory is O((b + Q)·D + b·(N + mixed))

Use: where the queue's own keys have become easy
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlp.losses._draws import beta, draws
from vlp.losses._inputs import Inputs
from vlp.losses._queue import filled
from vlp.pairwise import Pairs, logaddexp, softplus, widened
from vlp.seeds import derive

NEEDS = frozenset({"image", "text", "scale", "queue_image", "queue_text"})


@dataclass(frozen=True)
class Options:
    hardest: int = 1024  # N, or as many as the queue holds
    mixed_pairs: int = 1024  # mixtures of two of them
    mixed_queries: int = 128  # mixtures of the query with one of them
    in_batch: bool = True  # the other pairs of the batch are candidates too
    # a of m = 1 + Beta(a, a), by which the two sides of a pair move apart; 0: they stay
    extrapolate: float = 0.0
    # a of Beta(a, a), by which keys of the queue mix with one another; 0: they stay
    interpolate: float = 0.0

    def __post_init__(self) -> None:
        if min(self.extrapolate, self.interpolate) < 0:
            raise ValueError(
                "extrapolate and interpolate: found "
                f"{self.extrapolate} and {self.interpolate}, expected numbers >= 0"
            )
        if self.hardest < 1 or min(self.mixed_pairs, self.mixed_queries) < 0:
            raise ValueError(
                f"expected hardest >= 1, mixed_pairs and mixed_queries >= 0, found {self}"
            )

    @property
    def n_mixed(self) -> int:
        return self.mixed_pairs + self.mixed_queries


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    inputs = inputs.operands()
    wide = inputs.wide()
    step = inputs.step or 0
    scale = torch.as_tensor(inputs.scale, device=inputs.image.device)
    if options.in_batch:
        rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, scale)
    else:
        # No candidate of the batch: empty sums.
        positive = scale * (wide.image * wide.text).sum(1)
        rows = columns = torch.full_like(positive, -torch.inf)
    if options.extrapolate:
        positive = scale * _extrapolated(wide, step, pairs, options.extrapolate)

    # The queues join the denominators.
    texts = _from_queue(inputs.image, inputs.queue_text, scale, step, "text", pairs, options)
    images = _from_queue(inputs.text, inputs.queue_image, scale, step, "image", pairs, options)
    rows, columns = logaddexp(rows, texts), logaddexp(columns, images)
    return pairs.mean(softplus(rows - positive) + softplus(columns - positive)) / 2


def _extrapolated(wide: Inputs, step: int, pairs: Pairs, alpha: float) -> Tensor:
    """Cosines of the pairs whose sides moved apart, [b]."""
    n_rows, width = wide.image.shape
    first_row = pairs.backend.ranks.index * n_rows
    rows = first_row + torch.arange(n_rows, device=wide.image.device)
    drawn, *_ = draws(rows, derive(pairs.backend.seed, "extrapolation", step), width)
    factor = 1 + beta(drawn, alpha).to(wide.image.dtype)

    image = F.normalize(torch.lerp(wide.text, wide.image, factor), dim=1)
    text = F.normalize(torch.lerp(wide.image, wide.text, factor), dim=1)
    return (image * text).sum(1)


def interpolated(queue: Tensor, seed: int, alpha: float) -> Tensor:
    """The keys [Q, D], each mixed with another; the same on every rank, which holds them whole."""
    places = torch.arange(len(queue), device=queue.device)
    drawn, order, _ = draws(places, seed, queue.shape[1])
    others = queue[order[:, 0].argsort()]
    factor = beta(drawn, alpha)
    return F.normalize(
        torch.lerp(widened(others), widened(queue), factor.to(widened(queue))), dim=1
    )


def _from_queue(
    query: Tensor,  # [b, D]
    queue: Tensor,  # [Q, D]
    scale: Tensor,
    step: int,
    name: str,
    pairs: Pairs,
    options: Options,
) -> Tensor:
    """log Σ over the queue and the mixtures, [b]."""
    queue = filled(queue, len(query), pairs)
    if options.interpolate and len(queue):
        seed = derive(pairs.backend.seed, "interpolated queue", name, step)
        queue = interpolated(queue, seed, options.interpolate)

    # The queue itself; while it is empty there is nothing to mix.
    log_sums = pairs.alone.row_logsumexp(query, queue, scale)
    if not options.n_mixed or not len(queue):
        return log_sums

    n_hardest = min(options.hardest, len(queue))
    hardest = pairs.alone.hardest(query, queue, n_hardest, paired=False)
    first_row = pairs.backend.ranks.index * len(query)
    seed = derive(pairs.backend.seed, "mixing", name, step)

    # A block of rows mixes at most as many keys as the queue holds.
    size = max(len(queue) // options.n_mixed, 1)
    parts = []
    for start in range(0, len(query), size):
        rows = slice(start, start + size)
        part = checkpoint(
            _mixed_logsumexp,
            widened(query[rows]),
            queue,
            scale,
            hardest[rows],
            first_row + start,
            seed,
            options,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        parts.append(part)
    return logaddexp(log_sums, torch.cat(parts))


def _mixed_logsumexp(
    query: Tensor,
    queue: Tensor,
    scale: Tensor,
    hardest: Tensor,
    first_row: int,  # the number of the first query among the rows of the step
    seed: int,
    options: Options,
) -> Tensor:
    """log Σ over the mixtures of each query, [b]."""
    # Mixtures are constants: only the query that they are compared with learns.
    with torch.no_grad():
        rows = first_row + torch.arange(len(query), device=query.device)
        mixed = mix(query, queue, hardest, draws(rows, seed, options.n_mixed), options)
    return torch.logsumexp(scale * torch.einsum("bd,bmd->bm", query, mixed), 1)


def mix(
    query: Tensor,  # [b, D]
    queue: Tensor,  # [Q, D]
    hardest: Tensor,  # [b, N] places in the queue
    drawn: Iterator[Tensor],  # uniform numbers [b, mixed], three times
    options: Options,
) -> Tensor:
    """H: [b, mixed_pairs + mixed_queries, D] unit rows."""
    # Two different places among the hardest, where there are two.
    n_hardest = hardest.shape[1]
    which, other, weight = drawn
    first = (which * n_hardest).long().clamp(max=n_hardest - 1)
    second = (first + 1 + (other * (n_hardest - 1)).long()) % n_hardest
    first, second = (widened(queue[hardest.gather(1, place)]) for place in (first, second))

    # The last mixtures are with the query, which has less than half of the weight.
    with_query = slice(options.mixed_pairs, None)
    second[:, with_query] = query.unsqueeze(1)
    weight[:, with_query] = 1 - weight[:, with_query] / 2
    return F.normalize(torch.lerp(second, first, weight.unsqueeze(2).to(first)), dim=2)
