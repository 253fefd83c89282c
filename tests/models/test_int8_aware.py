"""Image towers that are trained with values of 8 bits: what a layer computes, its gradients, that
nothing else changes, and what is refused.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import ranks
from tests.models import multimodals
from tests.models.tiny import TEXT, VIT, inputs, tiny
from tests.test_step import assert_close, gradients_and_weights
from vlp.models import int8_aware
from vlp.models.build import from_description

TIMM = {"name": "timm", "image_size": 64}
TOWERS = {
    "vit": VIT,
    "vit, coca": VIT | {"attentional_pool": "cascade", "pool_queries": 4, "pool_heads": 2},
    "timm, attention": TIMM | {"model": "test_vit"},
    "timm, convolutions": TIMM | {"model": "test_resnet"},
}


def grid(values):
    """The nearest of 255 values for each row, one at a time."""
    rows = []
    for row in values.flatten(1):
        step = max(abs(number) for number in row.tolist()) / 127
        rows.append([round(number / step) * step if step else 0.0 for number in row.tolist()])
    return torch.tensor(rows, dtype=values.dtype).view(values.shape)


def test_a_layer_computes_with_255_values_and_its_gradient_passes():
    torch.manual_seed(0)
    values = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    values[1] = 0  # nothing to round, and no division by it
    flat = values.flatten(2).requires_grad_()
    cases = [(nn.Linear(36, 5), flat), (nn.Conv2d(4, 5, 3, padding=1), values.requires_grad_())]
    n = 0
    for layer, given in cases:
        layer = layer.double().train()
        plain = layer(given)
        int8_aware.quantise(nn.Sequential(layer))
        found = layer(given)
        weight = grid(layer.weight.detach())
        if isinstance(layer, nn.Linear):
            expected = F.linear(grid(given.detach()), weight, layer.bias)
        else:
            expected = F.conv2d(grid(given.detach()), weight, layer.bias, padding=1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(found, plain, rtol=1e-3), "8 bits must show"

        # Straight through: of the rounded weights, as if nothing had been rounded.
        gradient = torch.autograd.grad(found.sum(), given)[0]
        rest = given.detach().clone().requires_grad_()
        if isinstance(layer, nn.Linear):
            through = F.linear(rest, weight, layer.bias)
        else:
            through = F.conv2d(rest, weight, layer.bias, padding=1)
        wanted = torch.autograd.grad(through.sum(), rest)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
        n += 1
    assert n == 2


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_is_near_the_plain_one_in_training_and_the_same_in_evaluation(kind):
    tower = TOWERS[kind]
    width = {"embed_dim": tower["width"]} if "coca" in kind else {}
    plain = tiny(image_tower=tower, **width)
    aware = tiny(image_tower=tower | {"int8_aware": True}, **width)
    assert aware.state_dict().keys() == plain.state_dict().keys()
    aware.load_state_dict(plain.state_dict())
    pixels, ids = inputs(plain)

    with torch.no_grad():
        rows, exact = (model.train().encode_image(pixels) for model in (aware, plain))
        cosines = (rows * exact).sum(1)
        assert cosines.min() > 0.98 and not torch.allclose(rows, exact, atol=1e-5)
        assert torch.equal(aware.encode_text(ids), plain.encode_text(ids)), "texts stay"
        again = from_description(aware.description()).eval()
        again.load_state_dict(aware.state_dict())
        assert torch.equal(again.encode_image(pixels), aware.eval().encode_image(pixels))

    quantised = [m for m in aware.visual.modules() if type(m).__module__ == int8_aware.__name__]
    assert len(quantised) >= 4
    n_attention = sum(isinstance(m, int8_aware.Int8Attention) for m in quantised)
    assert n_attention == (VIT["layers"] if kind.startswith("vit") else 0)


def trained(micro_batches=1, engine="ddp"):
    return gradients_and_weights(
        micro_batches, steps=1, engine=engine, towers={"image": {"int8_aware": True}}
    )


def test_micro_batches_change_nothing():
    expected, weights, _ = trained()
    plain, *_ = gradients_and_weights(steps=1)
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert any(expected[name]) and expected[name] != plain[name]
    in_parts = trained(3)
    assert assert_close(in_parts[0], expected, 1e-9) > 30
    assert_close(in_parts[1], weights, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_ranks_change_nothing(engine):
    expected, weights, _ = trained()
    for gradients, after, _ in ranks.run(2, trained, 2, engine):
        assert_close(gradients, expected, 1e-8)
        assert_close(after, weights, 1e-8)


@pytest.mark.parametrize(
    "settings, message",
    [
        pytest.param("mllm", "this language model reads texts with", marks=pytest.mark.slow),
        ({"image_tower": VIT | {"int8_aware": True, "locked": True}}, "leave out int8_aware, or"),
        ({"image_tower": VIT | {"int8_aware": True, "lora": {"r": 2}}}, "leave out int8_aware, or"),
        ({"text_tower": {"int8_aware": True}}, "only image towers are trained for 8 bits"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, tmp_path):
    if settings == "mllm":
        folder = multimodals.multimodal_model(tmp_path, "qwen2_vl")
        settings = multimodals.tower(folder, int8_aware=True)
    elif "text_tower" in settings:
        settings = {"text_tower": TEXT | settings["text_tower"]}
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(**settings)
