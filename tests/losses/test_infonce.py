"""InfoNCE and the sigmoid loss against loops from the papers' equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from vlp.losses import build


def leaves(B=7, D=5, seed=0):
    torch.manual_seed(seed)
    x, t = (
        F.normalize(torch.randn(B, D, dtype=torch.float64), dim=1).requires_grad_()
        for _ in range(2)
    )
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (6.0, -2.0))
    return {"image": x, "text": t, "scale": scale, "bias": bias}


def infonce_loop(image, text, scale, smoothing, image_weight):
    B, total = len(image), 0
    for i in range(B):
        z = [scale * (image[i] @ text[j]) for j in range(B)]
        zt = [scale * (image[j] @ text[i]) for j in range(B)]
        for weight, row in ((image_weight, z), (1 - image_weight, zt)):
            log_norm = torch.log(sum(v.exp() for v in row))
            for j in range(B):
                target = (1 - smoothing) * (i == j) + smoothing / B
                total = total + weight * target * (log_norm - row[j]) / B

    return total


def siglip_loop(image, text, scale, bias):
    B, total = len(image), 0
    for i in range(B):
        for j in range(B):
            y = 1 if i == j else -1
            total = (
                total
                - torch.log(1 / (1 + torch.exp(-y * (scale * (image[i] @ text[j]) + bias)))) / B
            )

    return total


def assert_same(found, expected, given):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)

    live = 0
    for a, b in zip(
        *(
            torch.autograd.grad(v, list(given.values()), allow_unused=True)
            for v in (found, expected)
        )
    ):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            live += bool(b.norm() > 1e-6)

    assert live >= 3


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("smoothing, image_weight", [(0, 0.5), (0.1, 0.5), (0, 0.75), (0.2, 0.0)])
def test_infonce(impl, smoothing, image_weight):
    given = leaves()
    total, _ = build(
        {"infonce": {"label_smoothing": smoothing, "image_weight": image_weight}}, impl=impl
    )(**given)
    expected = infonce_loop(given["image"], given["text"], given["scale"], smoothing, image_weight)

    assert_same(total, expected, given)


@pytest.mark.parametrize("impl", ["dense", "tiled"])
def test_siglip(impl):
    given = leaves()
    total, _ = build({"siglip": {}}, impl=impl)(**given)

    assert_same(total, siglip_loop(**given), given)


def test_uninformative_scores_give_log_n():
    given = {"image": torch.eye(9)[:5], "text": torch.eye(9)[4:], "scale": torch.tensor(0.0)}
    assert build({"infonce": {}})(**given)[0].item() == pytest.approx(math.log(5))
