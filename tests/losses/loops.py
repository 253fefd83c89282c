"""What one rank computes of options that the family's tests do not cover, and its comparison with
loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tests import ranks
from tests.losses import family_data
from tests.losses.family_data import LEAVES, PLANS, B, gradients_of, own_rows
from vlp.losses import build

# Labels beyond what float32 can tell apart; two of three, two of two, and a pair of its own.
LABELS = 2**40 + torch.tensor([0, 1, 0, 2, 1, 0, 3, 4])
CLUSTERS = torch.tensor([5, 5, 6, 6, 7, 7, 7, 8])
QUEUE_LABELS = 2**40 + torch.tensor([0, 0, 1, 9, 2, 0, 4, 1, 1, 3, 3])

Options = tuple[str, dict]  # of a term
Loop = Callable[[dict[str, Tensor]], Tensor]
# Several ranks meet one case of each kind: processes and rings are what they add.
WAYS = {1: [("tiled", "global")], 2: PLANS, 4: [("tiled", "ring")]}


def data() -> dict[str, Tensor]:
    """The family's inputs, and labels."""
    return family_data.data() | {
        "label": LABELS,
        "cluster": CLUSTERS,
        "queue_label": QUEUE_LABELS,
        "sample_id": torch.arange(B),
    }


def on_rank(plans: list[tuple[str, str]], cases: list[Options]) -> list[list]:
    """[plan][case]: value share and this rank's gradients."""
    results = []
    for impl, topology in plans:
        results.append([])
        for name, options in cases:
            d = data()
            objective = build({name: options}, impl=impl, topology=topology)
            objective.backend = replace(objective.backend, tile_size=5)
            results[-1].append(gradients_of(objective(**own_rows(d))[0], d))
    return results


def assert_equal(n_ranks: int, cases: list[tuple[Options, Loop]]) -> None:
    """Values and all gradients, in float64, over the ways to compute of so many ranks."""
    plans = WAYS[n_ranks]
    expected = []
    for _, loop in cases:
        d = data()
        expected.append(gradients_of(loop(d), d))
    by_rank = ranks.run(n_ranks, on_rank, plans, [options for options, _ in cases])

    n_cases = n_live = 0
    for p, plan in enumerate(plans):
        for c, (options, _) in enumerate(cases):
            for i, leaf in enumerate(("value", *LEAVES)):
                shares = [
                    torch.tensor(of_rank[p][c][i], dtype=torch.float64) for of_rank in by_rank
                ]
                mean = torch.stack(shares).mean(0)
                wanted = torch.tensor(expected[c][i], dtype=torch.float64)
                error = (mean - wanted).norm()
                assert error <= 1e-10 * wanted.norm() + 1e-12, f"{options}, {plan}, {leaf}"
                n_live += i > 0 and bool(wanted.norm() > 1e-6)
            n_cases += 1

    assert n_cases == len(plans) * len(cases) > 0
    assert n_live >= 2 * n_cases, "the comparison must not be empty"
