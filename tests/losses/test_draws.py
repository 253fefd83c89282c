"""What terms draw: the same for a row wherever it is drawn, and of the distribution they name."""

import pytest
import torch
from scipy.special import betaincinv

from vlp.losses._draws import beta, draws


@pytest.mark.parametrize("alpha", [0.15, 0.5, 1, 1.6, 2, 30])
def test_beta_has_the_quantiles_of_its_distribution(alpha):
    uniform, *_ = draws(torch.arange(200), 5, 4)
    uniform[0] = torch.tensor([0, 0.5, 1 - 2**-32, 1e-6])
    expected = torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy()))
    torch.testing.assert_close(beta(uniform, alpha), expected, rtol=0, atol=2e-5)


def test_draws_are_uniform_and_independent():
    which, other, weight = draws(torch.arange(400), 12345, 50)
    for drawn in (which, other, weight):
        assert drawn.shape == (400, 50) and drawn.min() >= 0 and drawn.max() < 1
        assert abs(drawn.mean() - 0.5) < 0.01 and abs(drawn.var() - 1 / 12) < 0.003
        assert drawn.unique().numel() > 19_900, "hardly any number comes twice"
        assert (
            max(
                abs(torch.corrcoef(torch.stack([drawn[a].flatten(), drawn[b].flatten()]))[0, 1])
                for a, b in ((slice(0, 399), slice(1, 400)), (slice(0, 200), slice(200, 400)))
            )
            < 0.05
        )

    assert (
        abs(
            torch.corrcoef(torch.stack([which.flatten(), other.flatten(), weight.flatten()])).tril(
                -1
            )
        ).max()
        < 0.05
    )


def test_a_row_draws_the_same_in_any_block_and_another_step_draws_anew():
    whole = torch.stack(list(draws(torch.arange(12), 7, 5)))
    parts = torch.cat(
        [torch.stack(list(draws(torch.arange(a, a + 4), 7, 5))) for a in (0, 4, 8)], 1
    )

    assert torch.equal(whole, parts)
    assert not (whole == torch.stack(list(draws(torch.arange(12), 8, 5)))).any()
