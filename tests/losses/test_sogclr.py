"""SogCLR and FastCLIP against loops over two steps, with samples that come back, on 1, 2 and 4 ranks."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests import ranks
from vlp import dist
from vlp.losses import build

B, D, N = 8, 5, 14
IDS = [[3, 1, 4, 0, 5, 9, 2, 6], [6, 10, 3, 5, 8, 7, 13, 1]]  # five samples come back, on other ranks
VARIANTS = [
    {"variant": "sogclr", "temperature": 0.25, "gamma": 0.6},
    {"variant": "sogclr", "temperature": 0.01, "gamma": 0.8},
    {"variant": "fastclip", "gamma": 1.0, "gamma_end": 0.2, "gamma_steps": 2},
]
PLANS = [(impl, topology) for impl in ("dense", "tiled") for topology in ("global", "ring")]


def rows(step):
    generator = torch.Generator().manual_seed(step)
    x, t = (F.normalize(torch.randn(B, D, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    scale = torch.tensor(6.0, dtype=torch.float64)
    return {"image": x.requires_grad_(), "text": t.requires_grad_(), "scale": scale.requires_grad_()}


def loop(options, step, u):
    """The loss of one step by the equations; updates the plain dictionaries u of (modality, sample)."""
    d = rows(step)
    tau = 1 / d["scale"] if options["variant"] == "fastclip" else options["temperature"]
    gamma = options["gamma"]
    if "gamma_end" in options:
        gamma = 0.2 + 0.8 * (1 + math.cos(math.pi * min(step / 2, 1))) / 2
    s, total = d["image"] @ d["text"].T, 0
    for modality, score in enumerate((s, s.T)):
        for i in range(B):
            others = [j for j in range(B) if j != i]
            h = [score[i, j] - score[i, i] for j in others]
            g = sum(torch.exp(v / tau) for v in h) / len(h)
            key = (modality, IDS[step][i])
            u[key] = (1 - gamma) * u[key] + gamma * g.item() if key in u else g.item()
            if options["variant"] == "sogclr":
                total = total + sum((torch.exp(v / tau) / u[key]).detach() * v for v in h) / len(h)
            else:
                total = total + tau.detach() * g / u[key] + tau * (math.log(u[key]) + 6.5)
    return total / (2 * B), d


def gradients(value, d):
    return [value.item(), *(g.tolist() for g in torch.autograd.grad(value, list(d.values()), materialize_grads=True))]


def on_rank():
    mine = slice(dist.rank() * B // dist.world_size(), (dist.rank() + 1) * B // dist.world_size())
    results = []
    for impl, topology in PLANS:
        for options in VARIANTS:
            objective = build({"sogclr": {"samples": N, **options}}, impl=impl, topology=topology)
            objective.engine = replace(objective.engine, tile_size=3)
            results.append([])
            for step in (0, 1):
                d = rows(step)
                own = {k: v[mine] if v.dim() else v for k, v in d.items()}
                total, _ = objective(**own, sample_id=torch.tensor(IDS[step])[mine], step=step)
                results[-1].append(gradients(total, d))
            results[-1].append({k: v.tolist() for k, v in objective.state_dict()[options["variant"]].items()})
    return results


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_two_steps_equal_the_loop(n_ranks):
    found, case = ranks.run(n_ranks, on_rank), 0
    for _ in PLANS:
        for options in VARIANTS:
            u: dict = {}
            for step in (0, 1):
                value, d = loop(options, step, u)
                for i, wanted in enumerate(gradients(value, d)):
                    wanted = torch.tensor(wanted, dtype=torch.float64)
                    mean = sum(torch.tensor(r[case][step][i], dtype=torch.float64) for r in found) / n_ranks
                    # the state is float32: e^{log u} carries its rounding into the second step
                    assert (mean - wanted).norm() <= (1e-10, 1e-4)[step] * wanted.norm() + 1e-12, f"{options}, {step}, {i}"
            for m, name in enumerate(("log_u_image", "log_u_text")):
                wanted = [math.log(u[m, k]) if (m, k) in u else -math.inf for k in range(N)]
                for r in found:
                    assert r[case][2][name] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
            case += 1
    assert case == 12


def test_fastclip_gradient_is_that_of_the_robust_objective():
    """At γ = 1: min over τ of τ·(log g + ρ), whose gradient in τ and in the embeddings the loss must have."""
    d = rows(0)
    options = {"samples": N, "variant": "fastclip", "gamma": 1.0}
    total, _ = build({"sogclr": options})(**d, sample_id=torch.tensor(IDS[0]), step=0)
    s, tau, robust = d["image"] @ d["text"].T, 1 / d["scale"], 0
    for score in (s, s.T):
        h = (score - score.diagonal().unsqueeze(1))[~torch.eye(B, dtype=torch.bool)].view(B, B - 1)
        robust = robust + (tau * ((h / tau).exp().mean(1).log() + 6.5)).mean() / 2
    for a, b in zip(*(torch.autograd.grad(v, list(d.values()), retain_graph=True) for v in (total, robust))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert b.norm() > 1e-3


def test_state_moves_only_in_training_steps():
    objective = build({"sogclr": {"samples": N}})
    given = {**rows(0), "sample_id": torch.tensor(IDS[0])}
    objective(**given)
    with torch.no_grad():
        objective(**given, step=0)
    assert all((v == -torch.inf).all() for v in objective.state_dict()["sogclr"].values())
    with pytest.raises(ValueError, match="sample_id: found 0 to 9, but samples is 5; raise it"):
        build({"sogclr": {"samples": 5}})(**given)
    with pytest.raises(ValueError, match="missing key 'samples'"):
        build({"sogclr": {}})
