"""Training of adapters on the rows of stored embeddings, and what they say of held-out pairs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlp.data.permutation import permute
from vlp.data_tools._run.progress import say
from vlp.data_tools.mine.store import Store
from vlp.eval import certainty as curves
from vlp.eval import metrics
from vlp.joining import local_device
from vlp.models.certainty import SIDES, Adapters, Form
from vlp.seeds import derive

FEWEST = 4  # pairs, of which two are held out


@dataclass(frozen=True)
class Training:
    """How adapters are trained; ValueError for numbers that cannot be."""

    epochs: int
    batch: int
    lr: float
    hidden: int
    layers: int
    dropout: float
    held_out: float
    seed: int
    device: str  # by the option's name

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected at least 1")
        if not self.lr > 0:
            raise ValueError(f"--lr is {self.lr}; expected a number > 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}; expected 0 <= P < 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out is {self.held_out}; expected a share between 0 and 1")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Training:
        """By the options of the same names."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def fit(store: Store, training: Training) -> tuple[Adapters, dict[str, Any]]:
    """Adapters on the CPU, in evaluation mode, and what was measured, as JSON. ValueError for
    embeddings that cannot be trained on.
    """
    numbers = _pairs(store)
    order = permute(len(numbers), derive(training.seed, "held out"), np.arange(len(numbers)))
    n_held_out = min(max(2, round(training.held_out * len(numbers))), len(numbers) - 2)
    held_out, trained = np.sort(numbers[order[:n_held_out]]), numbers[order[n_held_out:]]

    teacher = store.opened.teacher
    form = Form(
        store.width, training.hidden, training.layers, training.dropout,
        model=teacher.model, weights=teacher.weights,
    )  # fmt: skip
    torch.manual_seed(derive(training.seed, "certainty"))
    # Found here: on a cluster another machine trains than that of the call.
    device = local_device(training.device, shared=True)
    adapters = Adapters(form).to(device)
    losses = _train(adapters, store, trained, training, device)

    adapters = adapters.cpu().eval()
    measured = {"model": teacher.model, "trained": len(trained), "held_out": len(held_out)}
    return adapters, measured | {"loss": losses} | measure(adapters, store, held_out)


def _pairs(store: Store) -> np.ndarray:
    """The numbers of the samples with both embeddings; rows of zeros are of what did not open."""
    numbers = []
    for shard in range(len(store.paths)):
        has_both = np.ones(store.shards[shard].count, bool)
        for side in SIDES:
            rows = np.asarray(store.rows(shard, side), np.float32)
            has_both &= rows.any(1) & np.isfinite(rows).all(1)
        numbers.append(store.first(shard) + np.flatnonzero(has_both))
    pairs = np.concatenate(numbers)
    if len(pairs) < FEWEST:
        raise ValueError(
            f"{store.embeddings} holds {len(pairs)} pairs with both embeddings; expected at least "
            f"{FEWEST}, two of them to measure on"
        )
    return pairs


def _train(
    adapters: Adapters, store: Store, numbers: np.ndarray, training: Training, device: str
) -> list[float]:
    """Adam over whole epochs; returns the mean loss of each."""
    optimizer = torch.optim.Adam(adapters.parameters(), training.lr)
    n_steps = -(-len(numbers) // training.batch)
    # In every step: the release moves it once a run.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs * n_steps)
    losses: list[float] = []
    for epoch in range(training.epochs):
        seed = derive(training.seed, "order", epoch)
        order = numbers[permute(len(numbers), seed, np.arange(len(numbers)))]

        total = 0.0
        for part in np.array_split(order, n_steps):
            image, text = (_rows(store, part, side).to(device) for side in SIDES)
            loss = adapters.loss(image, text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(part)
        losses.append(total / len(numbers))
        say(f"epoch {epoch + 1}/{training.epochs}: loss {losses[-1]:.4f}")
        if not np.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} in epoch {epoch + 1}; lower --lr")
    return losses


def _rows(store: Store, numbers: np.ndarray, side: str) -> Tensor:
    """Unit rows of some samples, float32: halves are off by a thousandth."""
    rows = torch.from_numpy(store.gathered(numbers, side))
    return torch.nn.functional.normalize(rows, dim=1)


def measure(adapters: Adapters, store: Store, numbers: np.ndarray) -> dict[str, Any]:
    """R@1 over the share kept and by bin, both ways, among these pairs."""
    rows = {side: _rows(store, numbers, side) for side in SIDES}
    ranks = metrics.retrieval_ranks(rows["image"], rows["text"], torch.arange(len(numbers)))

    measured: dict[str, Any] = {"shares": curves.SHARES}
    # An image seeks its text, and a text its image.
    for way, side, rank in zip(("text_retrieval", "image_retrieval"), SIDES, ranks):
        certainty = adapters.certainty(side, rows[side])
        bins = curves.by_bin(rank == 1, certainty)
        measured[way] = {
            "recall@1_of_share": curves.kept(rank == 1, certainty),
            "recall@1_by_bin": bins,
            "spearman": curves.spearman(bins),
        }
    return measured
