"""distill's concepts: weights of all, or numbers and weights of some, as one distribution or each
alone, against plain loops over ranks; rows without a concept; numbers that are no concept.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests import ranks
from tests.losses.family_data import B
from vlp import dist
from vlp.losses import build
from vlp.losses._distill_concepts import binary_cross_entropy, dense

M, N = 7, 3
# Of each row its concepts with their weights; uneven over ranks, on the first of four none.
NAMED = [{}, {}, {2: 1.0}, {0: 0.5, 6: 1.0}, {}, {1: 1.0, 3: 1.0, 4: 3.0}, {5: 0.25}, {2: 1.0}]
WAYS = list(itertools.product(("ce", "bce"), ("weights", "numbers")))


def targets(form: str) -> Tensor:
    if form == "weights":
        rows = [[named.get(c, 0.0) for c in range(M)] for named in NAMED]
        return torch.tensor(rows, dtype=torch.float64)
    pairs = [[*map(list, named.items()), *[[0, 0]] * (N - len(named))] for named in NAMED]
    return torch.tensor(pairs, dtype=torch.float64)


def logits() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(B, M, generator=generator, dtype=torch.float64)


def loop(z: Tensor, loss: str) -> Tensor:
    """The mean over rows with a concept, term by term."""
    losses = []
    for i, named in enumerate(NAMED):
        if not named:
            continue
        total = z.new_zeros(())
        for c in range(M):
            if loss == "ce":
                share = named.get(c, 0.0) / sum(named.values())
                total = total - share * torch.log(torch.exp(z[i, c]) / torch.exp(z[i]).sum())
                continue
            y, p = min(1.0, named.get(c, 0.0)), 1 / (1 + torch.exp(-z[i, c]))
            total = total - y * torch.log(p) - (1 - y) * torch.log(1 - p)
        losses.append(total)
    return sum(losses) / len(losses)


def on_rank() -> list[list]:
    mine = slice(dist.rank() * B // dist.world_size(), (dist.rank() + 1) * B // dist.world_size())
    unit = torch.eye(B, dtype=torch.float64)[mine]
    results = []
    for loss, form in WAYS:
        z = logits().requires_grad_()
        objective = build({"distill": {"form": "concepts", "loss": loss}})
        total, _ = objective(
            image=unit, text=unit, scale=1.0, concept_logits=z[mine],
            concept_targets=targets(form)[mine],
        )  # fmt: skip
        results.append([total.item(), torch.autograd.grad(total, z)[0].tolist()])
    return results


@pytest.mark.parametrize("n_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_values_and_gradients_are_the_loop_s(n_ranks: int) -> None:
    found = ranks.run(n_ranks, on_rank)
    for w, (loss, _) in enumerate(WAYS):
        z = logits().requires_grad_()
        expected = loop(z, loss)
        of_loop = torch.autograd.grad(expected, z)[0]
        assert sum(rank[w][0] for rank in found) / n_ranks == pytest.approx(
            expected.item(), rel=1e-12
        )
        gradients = torch.tensor([rank[w][1] for rank in found], dtype=torch.float64)
        torch.testing.assert_close(gradients.mean(0), of_loop, rtol=1e-11, atol=1e-14)
        assert (of_loop.abs().sum(1) > 1e-3).tolist() == [bool(named) for named in NAMED]


def value(z: Tensor, given: Tensor, loss: str) -> Tensor:
    unit = torch.eye(len(z), dtype=z.dtype)
    objective = build({"distill": {"form": "concepts", "loss": loss}})
    total, _ = objective(image=unit, text=unit, scale=1.0, concept_logits=z, concept_targets=given)
    return total


@pytest.mark.parametrize(("loss", "form"), WAYS)
def test_a_row_without_a_concept_has_no_influence(loss: str, form: str) -> None:
    unnamed = torch.tensor([not named for named in NAMED])
    expected = value(logits(), targets(form), loss)
    for filling in (torch.nan, torch.inf, -torch.inf, 1e300):
        z = logits()
        z[unnamed] = filling
        z.requires_grad_()
        total = value(z, targets(form), loss)
        assert torch.equal(total, expected)
        assert not torch.autograd.grad(total, z)[0][unnamed].any()

    # And a batch without any: 0, with a gradient of zeros.
    z = logits().requires_grad_()
    total = value(z, torch.zeros_like(targets(form)), loss)
    assert total.item() == 0 and not torch.autograd.grad(total, z)[0].any()


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("number", [M, -1, 10**6])
def test_a_number_that_is_no_concept_does_not_pass_in_silence(loss: str, number: int) -> None:
    given = targets("numbers")
    given[2, 0, 0] = number
    assert value(logits(), given, loss).isnan()
    # Where it weighs nothing, it is a place that a sample does not need.
    given[2, 1] = torch.tensor([number, 0])
    given[2, 0] = torch.tensor([2, 1])
    assert torch.equal(value(logits(), given, loss), value(logits(), targets("numbers"), loss))


def test_numbers_become_weights_on_their_device() -> None:
    assert torch.equal(dense(targets("numbers"), logits()), targets("weights"))
    assert dense(targets("numbers").float(), logits().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0])
def test_a_confident_head_keeps_its_small_losses(gap: float) -> None:
    """In float32 softplus(z) − y·z is 0 from z = 17 on."""
    z = torch.tensor([[gap, -gap, gap]]).requires_grad_()
    y = torch.tensor([[1.0, 0.0, 1.0]])
    total = binary_cross_entropy(z, y).sum()
    assert total.item() == pytest.approx(3 * math.log1p(math.exp(-gap)), rel=1e-6)
    [gradient] = torch.autograd.grad(total, z)
    expected = 1 / (1 + math.exp(gap))
    torch.testing.assert_close(
        gradient, expected * torch.tensor([[-1.0, 1.0, -1.0]]), rtol=1e-6, atol=0
    )


def test_shapes_and_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a tensor \[b, M\] or \[b, N, 2\]"):
        value(logits(), targets("numbers")[..., :1], "bce")
    with pytest.raises(ValueError, match=r"M is 7 in concept_logits|M is 6 in concept_targets"):
        value(logits(), targets("weights")[:, :6], "bce")
    # 301 would be 300, or 302.
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"concept_targets: found numbers .* as {dtype}"):
            value(logits(), targets("numbers").to(dtype), "bce")
        value(logits(), targets("weights").to(dtype), "bce")
    with pytest.raises(ValueError, match="loss: belongs to form: concepts"):
        build({"distill": {"loss": "bce"}})
