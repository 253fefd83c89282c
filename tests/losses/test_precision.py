"""Gradients in float32 at a scale of 100 where a model is already right: a loss of 1e-8 still has
its gradient.

Each case is compared with itself in float64 on the same float32 numbers. The losses range over
seven orders.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses import build
from vlp.pairwise import softplus

B, D, K, Z = 6, 48, 3, 9
SCALE = 100.0
GAPS = (2.0, 5.0, 9.0, 13.0, 16.0, 18.5)  # of scores: losses from .1 to 1e-8
CASES = [
    ("infonce", {}),
    ("decoupled", {}),
    ("siglip", {}),
    ("hn_nce", {}),
    ("ranked", {}),
    ("macl", {}),
    ("multi_view", {"label_smoothing": 0}),
    ("cwcl", {"sharpening": 400}),
    ("counting", {"logits": "scaled"}),
    ("counting", {"logits": "scaled", "counterfactuals": "all"}),
    ("momentum_queue", {"temperature": 0.01}),
    ("mixing", {"mixed_pairs": 0, "mixed_queries": 0}),
    ("slip", {"temperature": 0.01}),
    ("mv_infonce", {}),
    ("poly_view", {}),
    ("poly_view", {"form": "arithmetic"}),
    ("swap", {"epsilon": 0.001}),
    ("kernel_mixture", {}),
    ("mixup", {"temperature": 0.01, "share": 0}),
    ("mann_whitney", {"tau": 0.01}),
    ("symile", {}),
    ("symile", {"negatives": "n_squared"}),
    *(("hard_negatives", {"form": form}) for form in ("negclip", "triplet", "own", "intra")),
    ("hard_negatives", {"form": "text", "text_scale": SCALE}),
    ("hard_negatives", {"form": "own", "focal": 2}),
    ("hard_negatives", {"form": "own", "smoothing": 0.02}),
    ("hard_negatives", {"form": "own", "focal": 2, "smoothing": 0.02}),
    ("distill", {}),
    ("distill", {"form": "ranking"}),
    ("distill", {"form": "interactive"}),
    ("distill", {"form": "cross"}),
    ("distill", {"focus": 1}),
    ("distill", {"form": "concepts"}),
    ("captioning", {}),
    ("captions", {}),
    ("captions", {"form": "decoupled"}),
]
DIFFERENTIATED = (
    "image", "text", "scale", "negatives", "negative_images", "counterfactual", "image_views",
    "text_views", "concept_logits", "caption_logits", "captions",
)  # fmt: skip


def aligned(gap: float) -> dict[str, Tensor]:
    """Pairs whose score is `gap` above that of every other candidate, captions and keys included,
    float32.
    """
    generator = torch.Generator().manual_seed(int(gap * 10))
    around = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]
    cosine = 1 - gap / SCALE  # of everything with everything but the pair

    def rows(first: int, n: int) -> Tensor:
        """Unit rows whose cosine with one another, and with all others of another `first`, is
        `cosine`.
        """
        own = around[first : first + n] * math.sqrt(1 - cosine)
        return own + around[-1] * math.sqrt(cosine)

    pair, noise = rows(0, B), torch.randn(4, B, D, generator=generator, dtype=torch.float64)
    near = F.normalize(pair + 1e-3 * noise, dim=-1)
    hard = rows(B, B * K).view(B, K, D)
    logits = torch.zeros(B, 4, Z, dtype=torch.float64) + 0.1 * torch.randn(
        B, 4, Z, generator=generator, dtype=torch.float64
    )
    ids = torch.randint(1, Z, (B, 4), generator=generator)
    logits.scatter_(2, ids.unsqueeze(2), gap + math.log(Z))
    concepts = 1e-9 * torch.ones(B, Z, dtype=torch.float64)
    concepts[:, 2] = 1.0
    keys = rows(B + B * K, B)
    # last, so that what the others draw stays as it was
    further_noise = torch.randn(B, 2, D, generator=generator, dtype=torch.float64)
    d = {
        "image": near[0],
        "text": near[1],
        "ema_image": near[2],
        "ema_text": near[3],
        "image_views": near[:2].flip(0),
        "text_views": near[2:],
        "negatives": hard,
        "counterfactual": hard[:, :2],
        "negative_images": F.normalize(hard[:, :1] + 1e-3 * noise[0].unsqueeze(1), dim=-1),
        "queue_image": keys,
        "queue_text": keys.flip(0),
        "teacher_image": near[2],
        "teacher_text": near[3],
        "concept_logits": logits[:, 0] * 0 + (gap + math.log(Z)) * F.one_hot(torch.tensor(2), Z),
        "concept_targets": concepts,
        "caption_logits": logits,
        "teacher_scores": torch.arange(K).flip(0).expand(B, K).double(),
        "score": torch.ones(B).double(),
        "captions": F.normalize(pair.unsqueeze(1) + 1e-3 * further_noise, dim=-1),
    }
    d = {name: value.float() for name, value in d.items()}
    d |= {
        "scale": torch.tensor(SCALE),
        "teacher_scale": torch.tensor(2 * SCALE),
        "bias": torch.tensor(-SCALE * cosine - gap / 2),
    }
    d |= {
        "negatives_valid": torch.ones(B, K, dtype=torch.bool),
        "negative_images_valid": torch.ones(B, 1, dtype=torch.bool),
        "counterfactual_valid": torch.ones(B, dtype=torch.bool),
        "captions_valid": torch.ones(B, 2, dtype=torch.bool),
    }
    return d | {"caption_ids": ids, "sample_id": torch.arange(B)}


def ordered(d: dict[str, Tensor], gap: float) -> dict[str, Tensor]:
    """For ListMLE, captions of a sample that lie `gap` apart in the teacher's order: at scores of
    100 − k·gap.
    """
    x = d["image"].double()
    side = F.normalize(
        torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0][:K].unsqueeze(0).expand(B, K, D),
        dim=-1,
    )
    side = F.normalize(side - (side @ x.unsqueeze(2)) * x.unsqueeze(1), dim=-1)
    cosine = (1 - gap / SCALE * torch.arange(K)).view(1, K, 1)
    return d | {"negatives": (cosine * x.unsqueeze(1) + (1 - cosine**2).sqrt() * side).float()}


def value_and_gradients(objective, d: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: d[name].clone().requires_grad_() for name in DIFFERENTIATED}
    total, _ = objective(**d | leaves, step=0)
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return total.detach(), dict(zip(leaves, gradients))


@pytest.mark.parametrize("name, options", CASES)
def test_a_small_loss_has_its_gradient(name, options):
    torch.manual_seed(0)

    n, losses = 0, []
    for gap in GAPS:
        d = aligned(gap)
        if options.get("form") == "ranking":
            d = ordered(d, gap)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in d.items()}
        loss, found = value_and_gradients(build({name: options}), d)
        expected_loss, expected = value_and_gradients(build({name: options}), wide)
        losses.append(expected_loss.item())
        assert abs(loss - expected_loss) <= 1e-4 * expected_loss.abs(), (
            f"gap {gap}: loss {loss} is not {expected_loss}"
        )
        for leaf, gradient in expected.items():
            if not gradient.any():
                assert not found[leaf].any()
                continue
            error = (found[leaf] - gradient).norm() / gradient.norm()
            assert error <= 1e-4, (
                f"gap {gap}, loss {expected_loss:.1e}: the gradient of {leaf} is {error:.1e} off"
            )
            n += 1

    assert n >= len(GAPS)
    if name not in ("decoupled", "macl", "siglip") and not options.get("smoothing"):
        assert losses[0] > 1e-3 and losses[-1] < 3e-7


def test_the_plain_form_has_no_such_gradient():
    """The comparison would prove nothing if a softmax in float32 passed it."""
    q = torch.tensor([2.0, -18.0], requires_grad=True)
    plain = -torch.log_softmax(torch.stack([-q, torch.zeros(2)]), 0)[0].sum()
    exact = softplus(q).sum()
    (a,), (b,) = torch.autograd.grad(plain, q), torch.autograd.grad(exact, q)

    assert abs(a[1] / b[1] - 1) > 0.5 and abs(a[0] / b[0] - 1) < 1e-5
