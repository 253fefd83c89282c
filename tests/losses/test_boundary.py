"""What reaches an objective from outside, and what does not: autocast, second derivatives, retained
graphs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import ranks
from tests.losses.family_data import LEAVES, data
from tests.losses.test_inputs import TERMS
from vlp import dist
from vlp.losses import build
from vlp.pairwise import Backend, Pairs


def narrow() -> dict[str, Tensor]:
    """The family's data in float32, which autocast turns into bfloat16 wherever it can."""
    found = {k: v.detach().float() if v.is_floating_point() else v for k, v in data().items()}
    for leaf in LEAVES:
        found[leaf].requires_grad_()
    return found | {"sample_id": torch.arange(8)}


def value_and_gradients(objective, given: dict[str, Tensor], **options) -> list[Tensor]:
    total, _ = objective(**given, step=0)
    return [
        total.detach(),
        *torch.autograd.grad(
            total, [given[leaf] for leaf in LEAVES], materialize_grads=True, **options
        ),
    ]


@pytest.mark.parametrize("impl", ["dense", "tiled"])
def test_autocast_changes_no_bit_of_any_term(impl):
    n, largest = 0, 0.0
    for name, options in TERMS:
        outside = value_and_gradients(build({name: options}, impl=impl), narrow())
        with torch.autocast("cpu", torch.bfloat16):
            inside = value_and_gradients(build({name: options}, impl=impl), narrow())
        total, _ = build({name: options}, impl=impl)(**(given := narrow()), step=0)
        with torch.autocast("cpu", torch.bfloat16):  # only the backward pass
            leaves = [given[leaf] for leaf in LEAVES]
            late = [total.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]
        for found in (inside, late):
            assert all(torch.equal(a, b) for a, b in zip(found, outside, strict=True)), (
                f"{name} {options}"
            )
        largest = max(largest, *(g.abs().max().item() for g in outside[1:]))
        n += 1
    assert n == len(TERMS) == 118 and largest > 0.1


def test_second_derivatives_are_refused():
    n = 0
    for name, options in TERMS:
        given = narrow()
        total, _ = build({name: options})(**given, step=0)
        used = [given[leaf] for leaf in LEAVES]
        with pytest.raises(NotImplementedError, match="create_graph=True: gradients of objectives"):
            torch.autograd.grad(total, used, create_graph=True, allow_unused=True)
        n += 1
    assert n == len(TERMS)


@pytest.mark.parametrize("impl", ["tiled"])
def test_second_derivatives_of_reductions_are_refused(impl):
    given = narrow()
    pairs = Pairs.at(Backend(impl=impl))
    rows, _ = pairs.margin_logsumexp(given["image"], given["text"], given["scale"])
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.grad(rows.sum(), [given["image"]], create_graph=True)


def exchanges() -> list[str]:
    """A gradient with create_graph=True through every collective, and the ring."""
    group, messages = dist.world(), []
    value = torch.ones(4, 3, requires_grad=True)

    def ring(value: Tensor) -> Tensor:
        pairs = Pairs.at(build({"infonce": {}}, topology="ring").backend)
        return pairs.margin_logsumexp(value, value, 1.0)[0]

    for exchange in (
        dist.all_gather,
        dist.reduce_scatter,
        dist.all_reduce,
        dist.all_to_all,
        lambda value, _: ring(value),
    ):
        try:
            torch.autograd.grad(exchange(value, group).sum(), [value], create_graph=True)
        except NotImplementedError as error:
            messages.append(str(error))
    return messages


def test_second_derivatives_between_ranks_are_refused():
    for messages in ranks.run(2, exchanges):
        assert len(messages) == 5 and all("create_graph=True" in message for message in messages)


def test_a_graph_lives_as_long_as_its_caller_retains_it():
    given = narrow()
    leaves = [given["image"], given["text"], given["scale"]]
    total, _ = build({"infonce": {}, "alignment": {}})(**given)
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * total, leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(total, leaves)


def test_objectives_work_under_hooks_on_saved_tensors():
    """Offloading to the CPU, and recomputation of what the objective is part of."""
    from torch.autograd.graph import save_on_cpu
    from torch.utils.checkpoint import checkpoint

    given, objective = narrow(), build({"infonce": {}, "hard_negatives": {"form": "own"}})
    leaves = [given["image"], given["negatives"]]
    expected = torch.autograd.grad(objective(**given)[0], leaves)
    with save_on_cpu():
        offloaded = torch.autograd.grad(objective(**given)[0], leaves)
    recomputed = checkpoint(lambda: objective(**given)[0], use_reentrant=False)
    for found in (offloaded, torch.autograd.grad(recomputed, leaves)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
