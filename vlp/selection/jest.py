"""Joint example selection: train on the most learnable part of a larger batch.

Of a super-batch of N = B / keep pairs, the B that are hard for the model of the moment θ and easy
for a reference. With the sigmoid loss and the learnability

    ℓ_ii = softplus(−(scale·x_i·t_i + bias)),   ℓ_ij = softplus(scale·x_i·t_j + bias) for j ≠ i
    S_ij = ℓ_ij(θ) − ℓ_ij(reference)

`chunks` equal chunks are drawn one after another, each without replacement with probabilities

    softmax over the pairs not yet chosen of  S_ii + Σ_{k chosen} (S_ik + S_ki).

Every rank draws the same set from numbers derived from (seed, step, chunk); then chosen rows
travel, so that every rank trains on B/W. `train.batch` stays B, and samples count when trained on;
an epoch ends when every sample was *loaded* once, so it holds keep·n trained samples. Apart from
rounding the set is a function of seed, step and weights, at any W.

Relations: with one chunk pairs are chosen independently of each other; the loss of the training
itself stays free, though scores are made for `siglip`

Papers: JEST (Evans et al. 2024, arXiv 2406.17711): `selection: {jest: {reference: RUN, keep: 0.2,
chunks: 16}}`

Needs: a reference with a logit bias, which the sigmoid loss is made for, and a model with one:
train with the term `siglip` and `model.bias`. A reference without one (CLIP) takes it from the
option `bias`. Its embedding size is its own affair

Cost: N rows a step embedded by θ without gradient (in evaluation mode: no dropout, no patch drop)
and N by the reference, in parts of a micro-batch; logged as jest.scored_rows and
jest.reference_rows. The reference's N are saved by `vlp data embed` and `reference: precomputed`,
where pictures are not augmented. Scoring needs up to 2·N·B pairs for each model, shared by the
ranks; memory O(N/W·D + B/chunks·D) a rank besides tiles of `_BLOCK` × B/chunks scores, never N²

Use: where a good reference exists and data is far larger than the budget
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp import dist, teacher
from vlp.config import Config
from vlp.engines import Engine
from vlp.models.concatenated import Concatenated
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
        if not 0 < self.keep <= 1 or abs(1 / self.keep - self.times) > 1e-6:
            raise ValueError(
                f"keep is {self.keep}; its inverse must be a whole number: 0.5, 0.2, 0.1, …"
            )
        if self.chunks < 1 or (self.scale is not None and self.scale <= 0):
            raise ValueError(
                f"chunks {self.chunks} must be at least 1, scale {self.scale} positive"
            )
        if self.reference == "precomputed" and None in (self.scale, self.bias):
            raise ValueError(
                "precomputed embeddings come without scale and bias; set both to those of the "
                "model that made them"
            )

    @property
    def times(self) -> int:
        """How many times larger than the batch the super-batch is."""
        return round(1 / self.keep)


def open(options: Options, config: Config, model: DualEncoder, engine: Engine) -> Selection:
    """Load the reference onto the engine's device.

    ValueError where batch, model and reference do not fit each other.
    """
    check(options, config, model)
    loaded = config.train.batch * options.times
    if options.reference == "precomputed":
        needs = frozenset({"teacher_image", "teacher_text"})
        return Selection(loaded, needs=needs, choose=Chooser(options))

    reference = teacher.frozen(options.reference, model, "selection.jest.reference")
    chooser = Chooser(options, reference.to(engine.device))
    # Only now: the options may leave the bias to the reference.
    if chooser.bias is None:
        raise ValueError(
            f"{options.reference} has no logit bias, which the sigmoid loss needs; set "
            "selection.jest.bias, or take a reference trained with the term siglip"
        )
    return Selection(loaded, choose=chooser)


def check(options: Options, config: Config, model: DualEncoder) -> None:
    """Refuse a batch, data or a model that jest cannot choose for. ValueError."""
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
            "jest scores pairs by the sigmoid loss, which needs a logit bias; set model.bias (-10) "
            "and train siglip"
        )


@dataclass(frozen=True)
class Embedded:
    """What one model makes of this rank's r rows, and the sigmoid loss of their pairs."""

    image: Tensor  # [r, D] unit rows
    text: Tensor  # [r, D] unit rows
    scale: Tensor | float
    bias: Tensor | float

    def own_loss(self) -> Tensor:
        """ℓ_ii, [r]."""
        return F.softplus(-self.scale * (self.image * self.text).sum(1) - self.bias)

    def loss_with(self, numbers: Tensor) -> Tensor:
        """Σ_k (ℓ_ik + ℓ_ki), [r], over the rows k of all ranks with these numbers.

        Of no use for a row that is one of them.
        """
        images, texts = (_rows_of_all_ranks(rows, numbers) for rows in (self.image, self.text))
        return self._loss_against(self.image, texts) + self._loss_against(self.text, images)

    def _loss_against(self, rows: Tensor, others: Tensor) -> Tensor:
        """Σ_k ℓ_ik, [r], a block of rows at a time."""
        return torch.cat([self._row_sums(block, others) for block in rows.split(_BLOCK)])

    def _row_sums(self, rows: Tensor, others: Tensor) -> Tensor:
        return F.softplus(self.scale * (rows @ others.T) + self.bias).sum(1)


class Chooser:
    """`Selection.choose` of jest. `reference`: None where the batch brings its embeddings."""

    def __init__(
        self, options: Options, reference: DualEncoder | Concatenated | None = None
    ) -> None:
        self.options, self.reference = options, reference
        self.scale, self.bias = options.scale, options.bias
        if reference is None:
            return

        # What the options leave open is the reference's own.
        with torch.no_grad():
            features = reference()
        self.scale = options.scale or features.scale
        if self.bias is None:
            self.bias = features.bias

    @torch.no_grad()
    def __call__(self, training: Training, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        """(this rank's rows of the step, scalars to log) of this rank's loaded rows."""
        device, times = training.engine.device, self.options.times
        parts = batch.split(training.micro_batches * times)
        with torch.autocast(device.type, torch.bfloat16, enabled=training.dtype == torch.bfloat16):
            learner, reference = self._embed(training.engine.model, parts, device)

        # The same choice on every rank, from the scores of all.
        n_loaded = len(batch) * dist.world_size()
        n_chosen = n_loaded // times
        chosen, learnability = select(
            learner, reference, n_chosen, self.options.chunks, training.seed, training.step
        )

        n_embedded = 0 if self.reference is None else n_loaded
        scalars = {
            "jest.learnability": learnability.mean(),
            "jest.learnability_chosen": learnability[chosen].mean(),
            "jest.scored_rows": torch.tensor(n_loaded),
            "jest.reference_rows": torch.tensor(n_embedded),
        }
        return exchange(batch, chosen, device), scalars

    def _embed(
        self, model: nn.Module, parts: list[Batch], device: torch.device
    ) -> tuple[Embedded, Embedded]:
        """Embed by the learner, wrapped, which every rank calls alike, and by the reference.

        One part at a time is on the device. The reference sees every row in its place of its part
        and nothing is remembered between steps: the bits of a row may depend on its place and on
        the shape of its batch, and a resumed run must find the same ones.
        """
        # Evaluation mode: dropout would make the scores, and so the choice, random.
        learner_rows, reference_rows = [], []
        model.eval()
        for part in parts:
            part = part.to(device)
            learner = model(part.image, part.text)
            learner_rows.append((learner.image, learner.text))
            reference_rows.append(self._reference_rows(part))
        model.train()

        image, text = (torch.cat(rows) for rows in zip(*learner_rows))
        reference_image, reference_text = (torch.cat(rows) for rows in zip(*reference_rows))
        # Stored embeddings bring no numbers of their own: the options were refused without.
        assert self.scale is not None and self.bias is not None
        return (
            Embedded(image, text, learner.scale, learner.bias),
            Embedded(reference_image, reference_text, self.scale, self.bias),
        )

    def _reference_rows(self, part: Batch) -> tuple[Tensor, Tensor]:
        if self.reference is None:
            assert part.teacher_image is not None and part.teacher_text is not None
            return part.teacher_image, part.teacher_text
        features = self.reference(part.image, part.text)
        return features.image.float(), features.text.float()


def select(
    learner: Embedded, reference: Embedded, n_chosen: int, chunks: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Draw from the rows of all ranks, numbered rank by rank. Collective.

    Returns the numbers of the chosen rows, ascending [n_chosen], and S_ii of all rows [N] float64,
    both on the CPU, the same on every rank.
    """
    # S_ii at first; S_ik + S_ki of the chosen k join them chunk by chunk.
    scores = learner.own_loss() - reference.own_loss()
    learnability = logits = _of_all_ranks(scores)
    taken = torch.zeros_like(logits, dtype=torch.bool)
    noise = _noise(seed, step, chunks, len(logits)).to(logits.device, non_blocking=True)

    for chunk in range(chunks):
        # The largest of logits + Gumbel noise are a draw without replacement (Kool et al. 2019).
        left = (logits + noise[chunk]).masked_fill(taken, -torch.inf)
        drawn = left.topk(n_chosen // chunks).indices
        taken.index_fill_(0, drawn, True)

        # The next chunk is scored against all that is chosen, this one included.
        if chunk + 1 < chunks:
            scores = scores + (learner.loss_with(drawn) - reference.loss_with(drawn))
            logits = _of_all_ranks(scores)

    # Asked once, after the last chunk: which rows travel is for the host to know.
    return taken.cpu().nonzero().flatten(), learnability.cpu()


def _noise(seed: int, step: int, chunks: int, n_rows: int) -> Tensor:
    """Gumbel noise of each chunk, [chunks, N] float64, the same on every rank and device."""
    rows = []
    for chunk in range(chunks):
        generator = torch.Generator().manual_seed(derive(seed, "jest", step, chunk))
        uniform = torch.rand(n_rows, dtype=torch.float64, generator=generator)
        rows.append(-uniform.log().neg().log())
    return torch.stack(rows)


def exchange(batch: Batch, chosen: Tensor, device: torch.device) -> Batch:
    """This rank's equal share of the `chosen` rows, in the order of their numbers. Collective.

    Only chosen rows travel.
    """
    group = dist.world()
    n_rows, share = len(batch), len(chosen) // group.size

    # Row k of the step lies on rank owner[k], and rank reader[k] trains on it.
    owner, reader = chosen // n_rows, torch.arange(len(chosen)) // share
    owned, read = owner == group.index, reader == group.index
    send = reader[owned].bincount(minlength=group.size).tolist()
    receive = owner[read].bincount(minlength=group.size).tolist()

    places = chosen[owned] - n_rows * group.index
    moved = {
        name: dist.exchange_rows(getattr(batch, name)[places].to(device), send, receive, group)
        for name in sorted(batch.carries() - {"key"})  # sorted: every rank in the same order
    }

    # Keys are text: all ranks' chosen ones are gathered, in the order of their numbers.
    chosen_keys = [batch.key[place] for place in places.tolist()]
    keys = []
    for part in dist.gather_objects(chosen_keys):
        keys.extend(part)
    return replace(batch, key=keys[share * group.index : share * (group.index + 1)], **moved)


def _of_all_ranks(scores: Tensor) -> Tensor:
    """[N] float64, rank by rank."""
    return dist.all_gather(scores, dist.world()).double()


def _rows_of_all_ranks(rows: Tensor, numbers: Tensor) -> Tensor:
    """Rows by their numbers among the rows of all ranks. Collective."""
    group, n_rows = dist.world(), len(rows)
    here = numbers // n_rows == group.index
    places = torch.where(here, numbers - group.index * n_rows, 0)

    # Each rank fills in the rows it has; the others' are zeros, so that the sum is each row.
    return dist.all_reduce(torch.where(here.unsqueeze(1), rows[places], 0), group)
