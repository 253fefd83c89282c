"""The interpolated form of the Mann-Whitney loss against all comparisons; test_family.py has those
against a loop.
"""

import pytest
import torch
import torch.nn.functional as F

from tests import ranks
from vlp import dist
from vlp.losses import build, mann_whitney

B, D = 48, 12


def rows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = F.normalize(torch.randn(B, D, generator=generator, dtype=dtype), dim=1)
    t = F.normalize(x + 0.5 * torch.randn(B, D, generator=generator, dtype=dtype), dim=1)
    return {"image": x.requires_grad_(), "text": t.requires_grad_()}


def value_and_gradients(tau, exact, d):
    mine = slice(dist.rank() * B // dist.world_size(), (dist.rank() + 1) * B // dist.world_size())
    total, _ = build({"mann_whitney": {"tau": tau, "exact": exact}})(
        **{k: v[mine] for k, v in d.items()}, scale=1.0
    )
    return [total.item(), *(g.tolist() for g in torch.autograd.grad(total, list(d.values())))]


@pytest.mark.parametrize("tau", [0.01, 0.05, 0.3])
def test_the_error_is_within_its_bound(tau):
    d = rows()
    (exact, *wanted), (found, *gradients) = (value_and_gradients(tau, n, d) for n in (B, 0))

    assert 0 < abs(found - exact) < 1e-7, "another computation, and close"
    for a, b in zip(map(torch.tensor, gradients), map(torch.tensor, wanted)):
        assert (a - b).norm() < 1e-5 * b.norm() and b.norm() > 1e-2


def test_fewer_nodes_miss_the_bound(monkeypatch):
    """Negative control: the comparison above can fail."""
    exact = value_and_gradients(0.05, B, rows())[0]
    monkeypatch.setattr(mann_whitney, "NODES_A_TAU", 1)

    assert abs(value_and_gradients(0.05, 0, rows())[0] - exact) > 1e-7


def interpolated():
    return value_and_gradients(0.05, 0, rows())


def test_interpolation_is_the_same_on_several_ranks():
    alone, found = interpolated(), ranks.run(2, interpolated)
    for i, wanted in enumerate(alone):
        wanted = torch.tensor(wanted, dtype=torch.float64)
        mean = sum(torch.tensor(r[i], dtype=torch.float64) for r in found) / 2
        assert (mean - wanted).norm() <= 1e-10 * wanted.norm()


def test_cosines_just_above_one():
    """Rounding does that: identical rows in float32, at a temperature at which it matters."""
    d = rows(torch.float32)
    with torch.no_grad():
        d["image"][:], d["text"][:] = d["image"][0] * 1.000001, d["image"][0] * 1.000001
    for exact in (B, 0):
        value, *gradients = value_and_gradients(0.01, exact, d)
        assert value == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-3)  # σ(0) everywhere
        assert all(torch.tensor(g).isfinite().all() for g in gradients)
