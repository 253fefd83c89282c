"""Joint example selection (JEST, Evans et al. 2024, arXiv 2406.17711): train on the most learnable
part of a larger batch.

Of a super-batch of N = B / keep pairs, the B that are hard for the model of the moment θ and easy
for a reference. With

    ℓ_ii = softplus(−(scale·x_i·t_i + bias)),   ℓ_ij = softplus(scale·x_i·t_j + bias) for j ≠ i      (the sigmoid loss)
    S_ij = ℓ_ij(θ) − ℓ_ij(reference)                                                                 (learnability)

`chunks` equal chunks are drawn one after another, each without replacement with probabilities
    softmax over the pairs not yet chosen of  S_ii + Σ_{k chosen} (S_ik + S_ki).

Every rank draws the same set from numbers derived from (seed, step, chunk); then chosen rows
travel, so that every rank trains on B/W. `train.batch` stays B, and samples count when trained on;
an epoch ends when every sample was *loaded* once, so it holds keep·n trained samples. Apart from
rounding the set is a function of seed, step and weights, at any W.

Cost a step: N rows embedded by θ without gradient (in evaluation mode: no dropout, no patch drop)
and N by the reference, in parts of a micro-batch; logged as jest.scored_rows and
jest.reference_rows. The reference's N are saved by `vlp data embed` and `reference: precomputed`,
where pictures are not augmented. Scoring needs up to 2·N·B pairs for each model, shared by the
ranks; memory O(N/W·D + B/chunks·D) a rank besides tiles of `_BLOCK` × B/chunks scores, never N².

Both models need a bias, which the sigmoid loss is made for: train with the term `siglip` and
`model.bias`. A reference without one (CLIP) takes it from the option `bias`. Its embedding size is
its own affair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp import dist, teacher
from vlp.config import Config
from vlp.engines import Engine
from vlp.models.dual_encoder import DualEncoder
from vlp.seeds import derive
from vlp.selection import Selection
from vlp.step import Training
from vlp.types import Batch

_BLOCK = 1024  # rows of a tile of scores


@dataclass(frozen=True)
class Options:
    """Keys of `selection: {jest: …}`."""

    # a run, checkpoint, export or hf-hub:user/name; or `precomputed`: teacher_image, teacher_text
    # of the data
    reference: str
    keep: float = 0.2  # share of the super-batch that is trained on; 1 / keep is a whole number
    chunks: int = 16  # must divide train.batch
    scale: float | None = None  # of the reference; None: its own
    bias: float | None = None  # of the reference; None: its own

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or abs(1 / self.keep - round(1 / self.keep)) > 1e-6:
            raise ValueError(
                f"keep is {self.keep}; its inverse must be a whole number: 0.5, 0.2, 0.1, …"
            )
        if self.chunks < 1 or (self.scale is not None and self.scale <= 0):
            raise ValueError(
                f"chunks {self.chunks} must be at least 1, scale {self.scale} positive"
            )
        if self.reference == "precomputed" and None in (self.scale, self.bias):
            raise ValueError(
                "precomputed embeddings come without scale and bias; set both to those of the model that made them"
            )


def open(options: Options, config: Config, model: DualEncoder, engine: Engine) -> Selection:
    """Load the reference onto the engine's device; ValueError where batch, model and reference do
    not fit each other.
    """
    batch = config.train.batch
    if batch % options.chunks:
        raise ValueError(
            f"{options.chunks} chunks of jest do not divide train.batch {batch}; change one of them"
        )
    if config.data.together > 1:
        raise ValueError(
            "jest chooses single samples and would tear groups apart; leave out data.together"
        )
    if config.model.precomputed:
        raise ValueError(
            "jest embeds the pixels of its super-batches; set model.image_tower.precomputed: false"
        )
    if model.logit_bias is None:
        raise ValueError(
            "jest scores pairs by the sigmoid loss, which needs a logit bias; set model.bias (-10) and train siglip"
        )
    loaded = batch * round(1 / options.keep)
    if options.reference == "precomputed":
        return Selection(
            loaded, needs=frozenset({"teacher_image", "teacher_text"}), choose=Chooser(options)
        )
    reference = teacher.frozen(options.reference, model, "selection.jest.reference").to(
        engine.device
    )
    chooser = Chooser(options, reference)
    if chooser.bias is None:
        raise ValueError(
            f"{options.reference} has no logit bias, which the sigmoid loss needs; set selection.jest.bias, or take a reference "
            "trained with the term siglip"
        )
    return Selection(loaded, choose=chooser)


@dataclass(frozen=True)
class Embedded:
    """What one model makes of this rank's rows, and the sigmoid loss of their pairs."""

    image: Tensor  # [r, D] unit rows
    text: Tensor  # [r, D] unit rows
    scale: Tensor | float
    bias: Tensor | float

    def own_loss(self) -> Tensor:
        """ℓ_ii, [r]."""
        return F.softplus(-self.scale * (self.image * self.text).sum(1) - self.bias)

    def loss_with(self, numbers: Tensor) -> Tensor:
        """Σ_k (ℓ_ik + ℓ_ki), [r], over the rows k of all ranks with these numbers; of no use for a
        row that is one of them.
        """
        image, text = (_rows_of_all_ranks(rows, numbers) for rows in (self.image, self.text))
        pairs = ((self.image, text), (self.text, image))
        return sum(
            torch.cat([self._row_sums(block, others) for block in own.split(_BLOCK)])
            for own, others in pairs
        )

    def _row_sums(self, rows: Tensor, others: Tensor) -> Tensor:
        return F.softplus(self.scale * (rows @ others.T) + self.bias).sum(1)


class Chooser:
    """`Selection.choose` of jest. `reference`: None where the batch brings its embeddings."""

    def __init__(self, options: Options, reference: DualEncoder | None = None) -> None:
        self.options, self.reference = options, reference
        self.scale, self.bias = options.scale, options.bias
        if reference is not None:
            with torch.no_grad():
                own = reference()
            self.scale, self.bias = (
                options.scale or own.scale,
                own.bias if options.bias is None else options.bias,
            )

    @torch.no_grad()
    def __call__(self, training: Training, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        device, more = training.engine.device, round(1 / self.options.keep)
        with torch.autocast(device.type, torch.bfloat16, enabled=training.dtype == torch.bfloat16):
            learner, reference = self._embed(
                training.engine.model, batch.split(training.micro_batches * more), device
            )
        n_loaded = len(batch) * dist.world_size()
        chosen, own = select(
            learner, reference, n_loaded // more, self.options.chunks, training.seed, training.step
        )
        n_embedded = 0 if self.reference is None else n_loaded
        return exchange(batch, chosen, device), {
            "jest.learnability": own.mean(),
            "jest.learnability_chosen": own[chosen].mean(),
            "jest.scored_rows": torch.tensor(n_loaded),
            "jest.reference_rows": torch.tensor(n_embedded),
        }

    def _embed(
        self, model: nn.Module, parts: list[Batch], device: torch.device
    ) -> tuple[Embedded, Embedded]:
        """Embed by the learner, wrapped, which every rank calls equally often, and by the
        reference.

        One part at a time is on the device. The reference sees every row in its place of its part
        and nothing is remembered between steps: the bits of a row may depend on its place and on
        the shape of its batch, and a resumed run must find the same ones.
        """
        learner_rows, reference_rows = [], []
        model.eval()
        for part in parts:
            part = part.to(device)
            learner = model(part.image, part.text)
            learner_rows.append((learner.image, learner.text))
            if self.reference is None:
                reference_rows.append((part.teacher_image, part.teacher_text))
            else:
                reference = self.reference(part.image, part.text)
                reference_rows.append((reference.image.float(), reference.text.float()))
        model.train()

        image, text = (torch.cat(rows) for rows in zip(*learner_rows))
        reference_image, reference_text = (torch.cat(rows) for rows in zip(*reference_rows))
        return (
            Embedded(image, text, learner.scale, learner.bias),
            Embedded(reference_image, reference_text, self.scale, self.bias),
        )


def select(
    learner: Embedded, reference: Embedded, n_chosen: int, chunks: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Draw from the rows of all ranks, numbered rank by rank. Collective; the result is the same on
    every rank.

    Returns the numbers of the chosen rows, ascending [n_chosen], and S_ii of all rows [N] float64,
    both on the CPU.
    """
    models = ((learner, 1), (reference, -1))
    scores = sum(sign * model.own_loss() for model, sign in models)
    own = gathered = _of_all_ranks(scores)
    taken = torch.zeros(len(own), dtype=torch.bool)
    for chunk in range(chunks):
        generator = torch.Generator().manual_seed(derive(seed, "jest", step, chunk))
        # The largest of logits + Gumbel noise are a draw without replacement (Kool et al. 2019).
        noise = -torch.rand(len(own), dtype=torch.float64, generator=generator).log().neg().log()
        drawn = (gathered + noise).masked_fill(taken, -torch.inf).topk(n_chosen // chunks).indices
        taken[drawn] = True
        if chunk + 1 < chunks:
            scores = scores + sum(sign * model.loss_with(drawn) for model, sign in models)
            gathered = _of_all_ranks(scores)
    return taken.nonzero().flatten(), own


def exchange(batch: Batch, chosen: Tensor, device: torch.device) -> Batch:
    """This rank's equal share of the `chosen` rows, in the order of their numbers; only chosen rows
    travel. Collective.
    """
    group = dist.world()
    rows, share = len(batch), len(chosen) // group.size
    owner, reader = chosen // rows, torch.arange(len(chosen)) // share
    mine = chosen[owner == group.index] - rows * group.index
    send = reader[owner == group.index].bincount(minlength=group.size).tolist()
    receive = owner[reader == group.index].bincount(minlength=group.size).tolist()
    moved = {
        name: dist.exchange_rows(getattr(batch, name)[mine].to(device), send, receive, group)
        for name in sorted(batch.carries() - {"key"})  # sorted: every rank in the same order
    }
    keys = [
        key for part in dist.gather_objects([batch.key[i] for i in mine.tolist()]) for key in part
    ]
    return replace(batch, key=keys[share * group.index : share * (group.index + 1)], **moved)


def _of_all_ranks(scores: Tensor) -> Tensor:
    return dist.all_gather(scores, dist.world()).double().cpu()


def _rows_of_all_ranks(own: Tensor, numbers: Tensor) -> Tensor:
    """Rows by their numbers among the rows of all ranks. Collective."""
    group = dist.world()
    here = numbers // len(own) == group.index
    found = own.new_zeros(len(numbers), own.shape[1])
    found[here] = own[numbers[here] - group.index * len(own)]
    return dist.all_reduce(found, group)
