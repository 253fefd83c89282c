"""mc_infonce: its draws against the density that they are of, what it becomes where embeddings are
certain, and a step however it is divided. (Its loop over pairs and draws: test_family.py.)
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import ranks
from tests.test_step import assert_close, gradients_and_weights
from vlp.losses import _von_mises_fisher, build
from vlp.losses._von_mises_fisher import angle, samples

B, D, SCALE = 8, 6, 7.0
NEEDED = ("image", "text", "image_concentration", "text_concentration", "scale")


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def rows() -> Tensor:
        return F.normalize(torch.randn(B, D, generator=generator, dtype=torch.float64), dim=1)

    concentrations = (
        10 ** (3 * torch.rand(2, B, generator=generator, dtype=torch.float64))
    ).unbind()
    values = (rows(), rows(), *concentrations, torch.tensor(SCALE, dtype=torch.float64))
    return {name: value.requires_grad_() for name, value in zip(NEEDED, values)}


def moments(kappa: float, width: int) -> tuple[float, float]:
    """E cos θ and its derivative in κ, which is the variance, by quadrature of the density."""
    w = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    log_density = kappa * w + (width - 3) / 2 * torch.log1p(-w * w)
    density = (log_density - log_density.max()).exp()
    mean = (density * w).sum() / density.sum()
    return mean.item(), ((density * (w - mean) ** 2).sum() / density.sum()).item()


@pytest.mark.parametrize(("kappa", "width"), [*itertools.product((0.1, 20, 300), (5, 6, 64, 768))])
def test_draws_and_their_gradients_have_the_moments_of_the_density(
    kappa: float, width: int
) -> None:
    n = 2000
    uniform = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).view(4, -1)
    concentration = torch.full((4,), float(kappa), dtype=torch.float64, requires_grad=True)
    cosines = angle(uniform, concentration, width).cos()
    [gradient] = torch.autograd.grad(cosines.mean(), concentration)

    mean, variance = moments(kappa, width)
    assert cosines.mean().item() == pytest.approx(mean, abs=2e-4 * max(variance**0.5, 0.01))
    assert gradient.sum().item() == pytest.approx(variance, rel=2e-3)
    spread = cosines.var(correction=0).item()
    assert spread == pytest.approx(variance, rel=5e-3)


def test_draws_are_unit_rows_around_the_mean_and_depend_on_row_and_seed_alone() -> None:
    mean = F.normalize(torch.ones(4000, D, dtype=torch.float64), dim=1)
    concentration, rows = torch.full((4000,), 9.0, dtype=torch.float64), torch.arange(4000)
    first, second = samples(mean, concentration, rows, [1, 2])
    torch.testing.assert_close(first.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    expected, _ = moments(9.0, D)
    within = 4 / math.sqrt(4000)
    assert (first @ mean[0]).mean().item() == pytest.approx(expected, abs=within)
    # Around the mean no direction is preferred.
    aside = first - (first @ mean[0]).unsqueeze(1) * mean
    assert aside.mean(0).norm() < within and not torch.equal(first, second)

    picked = torch.tensor([7, 3999, 12])
    [again] = samples(mean[picked], concentration[picked], picked, [1])
    assert torch.equal(again, first[picked])


def test_densities_of_few_rows_are_held_at_once(monkeypatch) -> None:
    d, n_rows = data(), []

    def drawn_and_gradients() -> list[Tensor]:
        leaves = d["image"], d["image_concentration"]
        [drawn] = samples(*leaves, torch.arange(B), [0])
        return [drawn, *torch.autograd.grad((drawn * torch.arange(D)).sum(), leaves)]

    def counted(uniform: Tensor, concentration: Tensor, width: int) -> Tensor:
        n_rows.append(len(concentration))
        return angle(uniform, concentration, width)

    whole = drawn_and_gradients()
    monkeypatch.setattr(_von_mises_fisher, "angle", counted)
    monkeypatch.setattr(_von_mises_fisher, "ROWS", 3)
    assert all(map(torch.equal, drawn_and_gradients(), whole)) and n_rows == [3, 3, 2]


@pytest.mark.parametrize("kappa", [1e-3, 1e4, 1e7])
def test_extreme_concentrations_are_finite_in_float32(kappa: float) -> None:
    mean = F.normalize(torch.randn(5, 32), dim=1).requires_grad_()
    concentration = torch.full((5,), kappa, requires_grad=True)
    [drawn] = samples(mean, concentration, torch.arange(5), [0])
    gradients = torch.autograd.grad((drawn * torch.randn(5, 32)).sum(), (mean, concentration))
    assert all(value.isfinite().all() for value in (drawn, *gradients))
    if kappa == 1e7:
        torch.testing.assert_close(drawn, mean, atol=0.01, rtol=0)


def test_certain_embeddings_give_infonce_with_averaged_negatives() -> None:
    d = data()
    certain = torch.full((B,), 1e12, dtype=torch.float64)
    d |= {"image_concentration": certain, "text_concentration": certain}
    total, _ = build({"mc_infonce": {"samples": 2}})(**d)

    scores = SCALE * d["image"] @ d["text"].T
    weights = torch.where(torch.eye(B, dtype=torch.bool), 0.0, -math.log(B - 1))
    expected = sum(
        F.cross_entropy(side, torch.arange(B)) for side in (scores + weights, scores.T + weights)
    )
    assert total.item() == pytest.approx(expected.item() / 2, rel=1e-5)


def step(micro_batches: int = 1, engine: str = "ddp") -> tuple:
    return gradients_and_weights(
        micro_batches,
        engine=engine,
        heads={"concentration": {"width": 16, "init": 40.0}},
        objective={"mc_infonce": {"samples": 2}},
    )


def test_a_step_is_the_same_however_it_is_divided() -> None:
    gradients, weights, _ = step()
    of_head = [name for name in gradients if name.startswith("heads.concentration")]
    # Their last layers start at 0, through which the first get no gradient yet.
    assert sum(any(gradients[name]) for name in of_head) == 4 and len(of_head) == 8
    for others, weights_after, _ in (step(3), *ranks.run(2, step, 2)):
        assert_close(others, gradients, 1e-9)
        assert_close(weights_after, weights, 1e-8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="samples: found 0, expected at least 1"):
        build({"mc_infonce": {"samples": 0}})
    d = data()
    with pytest.raises(ValueError, match=r"image_concentration.*\(model\.heads\.concentration\)"):
        build({"mc_infonce": {}})(image=d["image"], text=d["text"], scale=d["scale"])
