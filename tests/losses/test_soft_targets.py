"""Soft targets of `infonce` and the divergences of `distill`: loops written from their equations in
float64 with all gradients, on 1, 2 and 4 ranks, gathered and on a ring; and their special cases.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.losses import loops
from tests.losses.family_data import B, K, data
from vlp.losses import build

τ, α, β, γ, λ = 0.3, 0.4, 0.6, 3.0, 0.2


# Loops, straight from the equations


def teachers_scores(d, of: str) -> tuple[Tensor, Tensor]:
    """a_ij of image i against candidate j, and of text i against candidate j."""
    u, v = d["teacher_image"].detach(), d["teacher_text"].detach()
    return {
        "own": (u @ u.T, v @ v.T),
        "image": (u @ u.T, u @ u.T),
        "text": (v @ v.T, v @ v.T),
        "cross": (u @ v.T, v @ u.T),
    }[of]


def softmax_targets(a: Tensor, i: int) -> list[Tensor]:
    total = sum(torch.exp(a[i, k] / τ) for k in range(B))
    return [(1 - α) * (i == j) + α * torch.exp(a[i, j] / τ) / total for j in range(B)]


def distance_targets(a: Tensor, i: int) -> list[Tensor]:
    weights = [2 * β / (1 + torch.exp(γ * (1 - a[i, j]))) for j in range(B)]
    weights[i] = torch.ones(())
    return [weight / sum(weights) for weight in weights]


def soft_loop(of: str, targets):
    def loop(d):
        mean = 0
        z = d["scale"] * d["image"] @ d["text"].T
        for scores, a in zip((z, z.T), teachers_scores(d, of)):
            for i in range(B):
                q = targets(a, i)
                log_sum = torch.log(sum(torch.exp(scores[i, k]) for k in range(B)))
                mean = mean - sum(q[j] * (scores[i, j] - log_sum) for j in range(B)) / (2 * B)
        return mean

    return loop


def kernel_loop(of: str):
    def loop(d):
        mean = 0
        z = d["scale"] * d["image"] @ d["text"].T
        for scores, a in zip((z, z.T), teachers_scores(d, of)):
            # The dense solve that the products with a small matrix stand for.
            weights = torch.linalg.solve(a + λ * torch.eye(B, dtype=a.dtype), a)
            for i in range(B):
                others = sum(
                    weights[j, i] * torch.exp(scores[i, j])
                    for j in range(B)
                    if j != i and weights[j, i] >= 1e-6
                )
                own = torch.exp(scores[i, i])
                mean = mean - torch.log(own / (own + (B - 1) * others)) / (2 * B)
        return mean

    return loop


def divergence_loop(temperature: float | None, both: bool):
    def loop(d):
        mean, n = 0, 0
        scale = d["scale"] if temperature is None else torch.tensor(1 / temperature)
        for i in range(B):
            live = [k for k in range(K) if d["negatives_valid"][i, k]]
            if not live:
                continue
            c = torch.stack([d["score"][i], *(d["teacher_scores"][i, k].detach() for k in live)])
            texts = [d["text"][i], *(d["negatives"][i, k] for k in live)]
            s = torch.stack([d["image"][i] @ t for t in texts])
            p, q = torch.exp(scale.detach() * c), torch.exp(scale * s)
            p, q = p / p.sum(), q / q.sum()
            forward, backward = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
            mean, n = mean + ((forward + backward) / 2 if both else forward), n + 1
        return mean / n

    return loop


SOFTMAX = {"by": "softmax", "alpha": α, "temperature": τ}
DISTANCE = {"by": "distance", "beta": β, "gamma": γ}
KERNEL = {"by": "kernel", "ridge": λ}
SIDES = ("own", "image", "text", "cross")
RANKING = {"form": "ranking"}
CASES = [
    *(
        ("infonce", {"targets": SOFTMAX | {"of": of}}, soft_loop(of, softmax_targets))
        for of in SIDES
    ),
    *(
        ("infonce", {"targets": DISTANCE | {"of": of}}, soft_loop(of, distance_targets))
        for of in SIDES
    ),
    *(("infonce", {"targets": KERNEL | {"of": of}}, kernel_loop(of)) for of in SIDES[:3]),
    ("distill", RANKING | {"divergence": "forward"}, divergence_loop(None, False)),
    (
        "distill",
        RANKING | {"divergence": "symmetric", "temperature": 0.2},
        divergence_loop(0.2, True),
    ),
]


# One of each kind, for the plans with several ranks.
ON_RANKS = [CASES[place] for place in (0, 3, 4, 8, 11, 12)]


@pytest.mark.parametrize("n_ranks, cases", [(1, CASES), (2, ON_RANKS), (4, ON_RANKS)])
def test_soft_targets_equal_loops(n_ranks, cases):
    loops.assert_equal(n_ranks, [((name, options), loop) for name, options, loop in cases])
    assert len(CASES) == 13


def value_and_gradients(name: str, options: dict, **changes) -> list[Tensor]:
    d = data() | changes
    total, _ = build({name: options})(**d)
    return [total.detach(), *torch.autograd.grad(total, [d["image"], d["text"], d["scale"]])]


def test_what_soft_targets_equal():
    """α = 0 and β = 0 are the pair alone; α = 1 across modalities is distillation."""
    scale = torch.tensor(1 / τ, dtype=torch.float64)
    cases = [
        *(
            ("infonce", {"targets": SOFTMAX | {"alpha": 0.0, "of": of}}, "infonce", {})
            for of in SIDES
        ),
        ("infonce", {"targets": DISTANCE | {"beta": 0.0}}, "infonce", {}),
        ("infonce", {"targets": SOFTMAX | {"alpha": 1.0, "of": "cross"}}, "distill", {}),
    ]
    for name, options, other, plain in cases:
        found = value_and_gradients(name, options)
        expected = value_and_gradients(other, plain, teacher_scale=scale)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert len(cases) == 6


def test_a_kernel_of_strangers_leaves_the_pair():
    """Conditions that have nothing in common weigh no negative."""
    strangers = torch.eye(B, dtype=torch.float64)
    found = value_and_gradients(
        "infonce", {"targets": KERNEL}, teacher_image=strangers, teacher_text=strangers
    )
    assert all(not tensor.any() for tensor in found)


@pytest.mark.parametrize("divergence", ["forward", "symmetric"])
def test_equal_distributions_do_not_diverge(divergence):
    d = data()
    changes = {
        "score": (d["image"] * d["text"]).sum(1).detach(),
        "teacher_scores": (d["image"].unsqueeze(1) * d["negatives"]).sum(2).detach(),
    }
    found = value_and_gradients("distill", RANKING | {"divergence": divergence}, **changes)
    assert found[0].abs() < 1e-14 and all(tensor.norm() < 1e-12 for tensor in found[1:])


def test_captions_that_take_no_part_have_no_influence():
    d, options = data(), RANKING | {"divergence": "symmetric"}
    before = value_and_gradients("distill", options)
    with torch.no_grad():
        d["negatives"][~d["negatives_valid"]] = torch.nan
    scores = torch.where(d["negatives_valid"], d["teacher_scores"].detach(), torch.nan)
    after = value_and_gradients("distill", options, negatives=d["negatives"], teacher_scores=scores)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("infonce", {"targets": {"alpha": 1.5}}, "expected 0 <= α <= 1"),
        ("infonce", {"targets": {"temperature": 0}}, "expected temperature, gamma and ridge > 0"),
        ("infonce", {"targets": {"by": "kernel", "of": "cross"}}, "rows of one modality"),
        ("infonce", {"targets": {"by": "kernels"}}, "did you mean 'kernel'"),
        ("infonce", {"targets": {}, "positives": "label"}, "over all candidates"),
        ("infonce", {"targets": {}, "label_smoothing": 0.1}, "over all candidates"),
        ("distill", {"divergence": "forward"}, "belongs to form: ranking"),
        ("distill", RANKING | {"temperature": 0.1}, "belongs to a divergence"),
        ("distill", RANKING | {"divergence": "forward", "temperature": 0}, "a number > 0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build({name: options})


def test_what_a_target_needs_is_named():
    d = data()
    for targets, missing in (({}, "teacher_image"), ({"of": "text"}, "teacher_text")):
        with pytest.raises(ValueError, match=f"needs '{missing}'"):
            build({"infonce": {"targets": targets}})(**d | {missing: None})
    with pytest.raises(ValueError, match="needs 'score'"):
        build({"distill": RANKING | {"divergence": "forward"}})(**d | {"score": None})
