"""Shared by the exactness tests: pairs, the float64 single-process truth, and what one rank
computes of a case.

The truth is written from the equations with torch's own cross-entropy and log-sigmoid on the whole
matrix; it shares no line with `vlp.pairwise`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp import dist
from vlp.losses import build
from vlp.step import Training, train_step
from vlp.types import Batch, Features

D = 8
BIAS = -1.5


@dataclass(frozen=True)
class Case:
    loss: str  # infonce, siglip
    impl: str
    n_ranks: int
    topology: str | tuple = "global"  # a tuple of items of a mapping
    micro_batches: int = 1
    scale: float = 14.0
    aligned: bool = False
    rows: int = 12  # b, of each rank; the tile of 7 divides neither it nor the candidates
    dtype: str = "float64"
    step: int = 0
    tile_size: int = 7

    @property
    def B(self) -> int:
        return self.n_ranks * self.rows


def pairs_of(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows [B, D] of both towers: random, or aligned with cosines .2, .45, .9 in turn."""
    generator = torch.Generator().manual_seed(seed + case.B)
    x, noise = (
        F.normalize(torch.randn(case.B, D, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    if not case.aligned:
        return x, noise
    cosine = torch.tensor([0.2, 0.45, 0.9], dtype=torch.float64).repeat(case.B // 3 + 1)[
        : case.B, None
    ]
    side = F.normalize(noise - (noise * x).sum(1, keepdim=True) * x, dim=1)
    return x, cosine * x + (1 - cosine**2).sqrt() * side


def rounded(case: Case, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The float64 values of what the case's dtype can hold."""
    dtype = getattr(torch, case.dtype)
    return x.to(dtype).double(), t.to(dtype).double()


def loss_of(name: str, x: Tensor, t: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The single-process loss of one set of candidates, from the papers' equations."""
    z = scale * x @ t.T
    if name == "infonce":
        labels = torch.arange(len(x))
        return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
    signs = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -F.logsigmoid(signs * (z + bias)).sum() / len(x)


def truth(case: Case, groups: list[list[int]] | None = None) -> list[Tensor]:
    """Loss and gradients (image, text, scale, bias): the mean over `groups` of ranks, or of all
    ranks together.
    """
    x, t = (e.requires_grad_() for e in rounded(case, *pairs_of(case)))
    scale, bias = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (case.scale, BIAS)
    )
    groups = groups or [list(range(case.n_ranks))]
    rows = [
        torch.cat([torch.arange(r * case.rows, (r + 1) * case.rows) for r in group])
        for group in groups
    ]
    loss = sum(loss_of(case.loss, x[i], t[i], scale, bias) for i in rows) / len(rows)
    gradients = torch.autograd.grad(loss, [x, t, scale, bias], materialize_grads=True)
    return [loss.detach(), *gradients]


def objective_of(case: Case):
    topology = dict(case.topology) if isinstance(case.topology, tuple) else case.topology
    objective = build({case.loss: {}}, topology=topology, impl=case.impl)
    objective.backend = replace(objective.backend, tile_size=case.tile_size)
    return objective


def own_rows(case: Case, *tensors: Tensor) -> list[Tensor]:
    mine = slice(dist.rank() * case.rows, (dist.rank() + 1) * case.rows)
    return [t[mine] for t in tensors]


def embeddings_of_rank(case: Case, device: str = "cpu") -> list:
    """This rank's loss and gradients with respect to its own rows, scale and bias, as lists."""
    dtype = getattr(torch, case.dtype)
    narrow = torch.float64 if case.dtype == "float64" else torch.float32
    x, t = (e.to(device, dtype).requires_grad_() for e in own_rows(case, *pairs_of(case)))
    scale, bias = (
        torch.tensor(v, dtype=narrow, device=device, requires_grad=True) for v in (case.scale, BIAS)
    )
    total, _ = objective_of(case)(image=x, text=t, scale=scale, bias=bias, step=case.step)
    gradients = torch.autograd.grad(total, [x, t, scale, bias], materialize_grads=True)
    return [total.item(), *(g.double().tolist() for g in gradients)]


def combine(results: list[list]) -> list[Tensor]:
    """Mean over ranks of loss, scale and bias gradients; rows of all ranks, divided by W (see
    `vlp.dist`).
    """
    parts = [[torch.tensor(v, dtype=torch.float64) for v in rank] for rank in results]
    n = len(parts)
    loss, scale, bias = (sum(p[i] for p in parts) / n for i in (0, 3, 4))
    return [loss, *(torch.cat([p[i] for p in parts]) / n for i in (1, 2)), scale, bias]


class LinearTowers(nn.Module):
    """Two linear towers that start as the identity, so that their embeddings are the given unit
    rows.
    """

    def __init__(self, scale: float, dropout: float = 0.0, replay: bool = True) -> None:
        super().__init__()
        self.image, self.text = (nn.Parameter(torch.eye(D, dtype=torch.float64)) for _ in range(2))
        self.scale, self.bias = (
            nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (scale, BIAS)
        )
        self.dropout = nn.Dropout(dropout)
        self.replay, self.calls = replay, 0

    def forward(self, pixels: Tensor, ids: Tensor) -> Features:
        if not self.replay:  # what a step does that forgets to restore the random state
            self.calls += 1
            torch.manual_seed(self.calls)
        image = F.normalize(self.dropout(pixels) @ self.image, dim=1)
        text = F.normalize(self.dropout(ids) @ self.text, dim=1)
        return Features(image, text, self.scale, self.bias)

    def gradients(self) -> list[Tensor]:
        return [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters()]


class PlainEngine:
    """The least that `train_step` asks of an engine: a model, and backward. Gradients stay this
    rank's own.
    """

    device = torch.device("cpu")
    rehearses = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr: float) -> Tensor:
        return torch.zeros(())


def step_of_rank(case: Case, dropout: float = 0.0, replay: bool = True) -> list:
    """This rank's loss and parameter gradients of one `train_step` on linear towers, as lists."""
    x, t = own_rows(case, *pairs_of(case))
    model = LinearTowers(case.scale, dropout, replay)
    training = Training(
        PlainEngine(model), objective_of(case), lambda step: 0.0, micro_batches=case.micro_batches
    )
    training.step = case.step
    ids = torch.arange(len(x))
    scalars = train_step(training, Batch(x, t, ids, [str(i) for i in ids.tolist()]))
    return [scalars["loss"].item(), *(g.tolist() for g in model.gradients())]


N_CAPTIONS = 2
MIXED = {
    "infonce": {},
    "hard_negatives": {"form": "own", "weight": 0.7},
    "counting": {"weight": 1.3},
}


def mixed_batch(case: Case) -> tuple[Tensor, ...]:
    """Images, texts, hard captions with validity, counterfactuals with validity: [B, …] of the
    whole step.

    Of every 12 rows in turn 0, 6, 6 and 7 are counting samples, and the valid captions are as
    uneven.
    """
    x, t = pairs_of(case)
    generator = torch.Generator().manual_seed(7)
    others = F.normalize(
        torch.randn(case.B, N_CAPTIONS + 1, D, generator=generator, dtype=torch.float64), dim=2
    )
    row = torch.arange(case.B)
    counting = row % 12 < torch.tensor([0, 6, 6, 7])[row // 12 % 4]
    valid = torch.stack([row % 5 < 2, counting & (row % 2 > 0)], 1)
    return x, t, others[:, 1:], valid, others[:, 0], counting


def mixed_step_of_rank(case: Case) -> list:
    """As `step_of_rank`, with a batch term and two sample terms over uneven numbers of valid
    samples.
    """
    x, t, captions, valid, wrong, counting = own_rows(case, *mixed_batch(case))
    model = LinearTowers(case.scale)
    objective = build(MIXED, impl=case.impl, topology=case.topology)
    training = Training(
        PlainEngine(model), objective, lambda step: 0.0, micro_batches=case.micro_batches
    )
    ids = torch.arange(len(x))
    batch = Batch(
        x,
        t,
        ids,
        [str(i) for i in ids.tolist()],
        negatives=captions,
        negatives_valid=valid,
        counterfactual=wrong.unsqueeze(1),
        counterfactual_valid=counting,
    )
    scalars = train_step(training, batch)
    return [scalars["loss"].item(), *(g.tolist() for g in model.gradients())]


def mixed_truth(case: Case) -> list[Tensor]:
    x, t, captions, valid, wrong, counting = mixed_batch(case)
    model = LinearTowers(case.scale)
    out = model(x, t)
    loss = loss_of("infonce", out.image, out.text, out.scale, out.bias)
    captions, wrong = (F.normalize(e @ model.text, dim=-1) for e in (captions, wrong))

    own, n = torch.zeros(()), 0
    for i in range(case.B):
        if valid[i].any():
            z = [out.scale * (out.image[i] @ c) for c in (out.text[i], *captions[i][valid[i]])]
            own, n = own + torch.logsumexp(torch.stack(z), 0) - z[0], n + 1

    loss = loss + 0.7 * own / n
    gaps = [
        (out.image[i] @ wrong[i]) - (out.image[i] @ out.text[i])
        for i in range(case.B)
        if counting[i]
    ]
    if gaps:
        loss = loss + 1.3 * torch.log1p(torch.exp(torch.stack(gaps))).mean()
    loss.backward()
    return [loss.detach(), *model.gradients()]


def step_truth(case: Case) -> list[Tensor]:
    x, t = pairs_of(case)
    model = LinearTowers(case.scale)
    out = model(x, t)
    loss = loss_of(case.loss, out.image, out.text, out.scale, out.bias)
    loss.backward()
    return [loss.detach(), *model.gradients()]


def mean_over_ranks(results: list[list]) -> list[Tensor]:
    return [
        sum(torch.tensor(r[i], dtype=torch.float64) for r in results) / len(results)
        for i in range(len(results[0]))
    ]


def assert_equal(case: Case, found: list[Tensor], expected: list[Tensor]) -> None:
    """float64: relative 1e-10. float32 gradients: 1e-5·‖ref‖ + 1e-6·scale/√B. Half precision: 1e-2
    and 1e-3.
    """
    relative, absolute = {"float64": (1e-10, 1e-13), "float32": (1e-5, 1e-6)}.get(
        case.dtype, (1e-2, 1e-3)
    )
    for name, f, e in zip(("loss", "image", "text", "scale", "bias"), found, expected):
        error, norm = (f - e).norm().item(), e.norm().item()
        limit = relative * norm + absolute * case.scale / case.B**0.5
        assert error <= limit, (
            f"{name}: error {error:.3e}, norm {norm:.3e}, limit {limit:.3e} in {asdict(case)}"
        )


def every(function: str, cases: list[Case], *args) -> list:
    """On a rank: one of the functions above for each case."""
    return [globals()[function](case, *args) for case in cases]
