"""What a rank hands to `torch.distributed`, counted in real runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from tests.benchmarks.comm_model import Call
from vlp import dist
from vlp.losses import build
from vlp.pairwise.topology import contiguous, strided

# open_clip's default with gradients; and ours in two hops, by ranks a node
OPEN_CLIP, HIERARCHICAL = "open_clip", "hierarchical"


def count(topologies: list[Any], rows: int, dim: int, dtype: str, objective: str) -> list[Any]:
    """On a rank: what one loss calls, forward and backward, for each topology."""
    return [count_one(topology, rows, dim, dtype, objective) for topology in topologies]


def count_one(topology: Any, rows: int, dim: int, dtype: str, objective: str) -> Counter[Call]:
    torch.manual_seed(dist.rank())
    x, t = (unit_rows(rows, dim, dtype) for _ in range(2))
    scale = torch.tensor(14.0, requires_grad=True)
    loss = loss_of(topology, objective)
    loss(x, t, scale).backward()  # groups are made and shapes are checked once

    with counted() as counts:
        loss(x, t, scale).backward()
    return counts


def unit_rows(rows: int, dim: int, dtype: str) -> Tensor:
    normalized = torch.nn.functional.normalize(torch.randn(rows, dim), dim=1)
    return normalized.to(getattr(torch, dtype)).requires_grad_()


def loss_of(topology: Any, objective: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(images, texts, scale) -> this rank's loss."""
    if topology == OPEN_CLIP:
        from open_clip.loss import ClipLoss

        return ClipLoss(
            local_loss=True, gather_with_grad=True, rank=dist.rank(), world_size=dist.world_size()
        )
    if isinstance(topology, dict) and HIERARCHICAL in topology:
        return hierarchical_loss(topology[HIERARCHICAL])

    made = build({objective: {}}, topology=topology)
    bias = {"bias": torch.tensor(-10.0)} if objective == "siglip" else {}
    return lambda x, t, scale: made(image=x, text=t, scale=scale, **bias)[0]


def hierarchical_loss(per_node: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """InfoNCE over all ranks in two hops, from the collectives of `vlp.dist`: inside a node of
    `per_node` ranks, and between the ranks of one place in every node.
    """
    n_nodes = dist.world_size() // per_node
    inside = dist.split(contiguous(dist.world_size(), per_node))
    between = dist.split(strided(dist.world_size(), n_nodes))

    def merged(partial: Tensor, group: dist.Group) -> Tensor:
        """[g, …] partial log-sum-exps by owner -> […] of this rank's own."""
        parts = dist.all_to_all(partial.flatten(), group).view(partial.shape)
        return torch.logsumexp(parts, dim=0)

    def loss(x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        b = len(x)
        # Between nodes first: a node's candidates cross the network once.
        gathered = dist.all_gather(dist.all_gather(t, between), inside)  # by place, then by node
        z = scale * (x.double() @ gathered.double().T)

        # The node's own part of a column first, then the others': n/r numbers cross.
        by_place = z.logsumexp(0).view(per_node, n_nodes, b)
        columns = merged(merged(by_place, inside), between)

        first = (inside.index * n_nodes + between.index) * b
        positive = z[:, first : first + b].diagonal()
        return (z.logsumexp(1) + columns - 2 * positive).mean() / 2

    return loss


def value_and_gradients(topology: Any, rows: int, dim: int) -> list[list[float]]:
    """On a rank: the loss and its gradients in images and texts, of float64 rows."""
    torch.manual_seed(dist.rank())
    x, t = (unit_rows(rows, dim, "float64") for _ in range(2))
    value = loss_of(topology, "infonce")(x, t, torch.tensor(14.0))
    value.backward()
    assert x.grad is not None and t.grad is not None  # both are leaves
    return [[value.item()], x.grad.flatten().tolist(), t.grad.flatten().tolist()]


def count_step(micro_batches: int) -> tuple[int, Counter[Call]]:
    """On a rank: parameters of a small model, and what its second training step calls."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from tests.test_step import make_batch, make_training, own_rows
    from vlp.step import train_step

    training = make_training(micro_batches, double=False)
    # DDP's own all-reduce is out of Python's sight; this one does the same in it.
    training.engine.model.register_comm_hook(None, allreduce_hook)
    train_step(training, make_batch(own_rows()))
    with counted() as counts:
        train_step(training, make_batch(own_rows()))

    trained = [p for p in training.engine.model.parameters() if p.requires_grad]
    return sum(parameter.numel() for parameter in trained), counts


# Listening


@contextmanager
def counted() -> Iterator[Counter[Call]]:
    """Count at the functions of torch.distributed that programs call, while it lasts."""
    counts: Counter[Call] = Counter()
    originals = {name: getattr(torch_dist, name) for name in HEARD}

    def listening(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts.update(HEARD[name](*args, **kwargs))
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in HEARD:
            setattr(torch_dist, name, listening(name))
        yield counts
    finally:
        for name, original in originals.items():
            setattr(torch_dist, name, original)


def _collective(kind: str, tensors: Any, group: Any) -> list[Call]:
    several = isinstance(tensors, (list, tuple))
    size = sum(tensor.nbytes for tensor in tensors) if several else tensors.nbytes
    return [Call(kind, size, torch_dist.get_world_size(group))]


def _gathers(output: Any, *_: Any, group: Any = None, **__: Any) -> list[Call]:
    return _collective("all_gather", output, group)


def _scatters(_output: Any, entered: Any, *_: Any, group: Any = None, **__: Any) -> list[Call]:
    return _collective("reduce_scatter", entered, group)


def _exchanges(_output: Any, entered: Any, *_: Any, group: Any = None, **__: Any) -> list[Call]:
    return _collective("all_to_all", entered, group)


def _reduces(tensor: Any, *_: Any, group: Any = None, **__: Any) -> list[Call]:
    return _collective("all_reduce", tensor, group)


def _spreads(
    _output: Any, entered: Any = None, *_: Any, group: Any = None, **__: Any
) -> list[Call]:
    # torch.distributed.nn builds a reduce-scatter of these under gloo; one of them has the input.
    return _collective("reduce_scatter", entered, group) if entered else []


def _sends(operations: list[Any]) -> list[Call]:
    return [Call("message", o.tensor.nbytes, 2) for o in operations if o.op is torch_dist.isend]


HEARD: dict[str, Callable[..., list[Call]]] = {
    "all_gather": _gathers,
    "all_gather_into_tensor": _gathers,
    "reduce_scatter": _scatters,
    "reduce_scatter_tensor": _scatters,
    "all_to_all": _exchanges,
    "all_to_all_single": _exchanges,
    "all_reduce": _reduces,
    "batch_isend_irecv": _sends,
    "scatter": _spreads,
}
