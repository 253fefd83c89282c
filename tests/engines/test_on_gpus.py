"""What engines set for GPUs, as far as a CPU can tell."""

import dataclasses

import pytest
import torch

from tests.models.tiny import inputs, tiny
from tests.test_step import assert_close
from vlp import config
from vlp.engines import LaunchError, precision, start
from vlp.engines.replicated import Replicated, channels_last, ddp_settings

GPU = torch.device("cuda")
RESNET = {"name": "timm", "model": "test_resnet", "image_size": 64}
OPTIONS = config.Train(config.Duration(4, "steps"), batch=4, precision="float32", device="cpu")
BF16 = dataclasses.replace(OPTIONS, precision="bf16")


@pytest.fixture
def card(monkeypatch):
    """A GPU that has bf16 or has not, and torch's settings to be put back."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    def with_bf16(has_bf16):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)

    return with_bf16


def test_bf16_on_a_card_without_is_refused_at_the_start(card):
    card(False)
    with pytest.raises(LaunchError, match=r"bf16, which Tesla T4 does not have; set .*float32"):
        precision.check(BF16, GPU)
    with pytest.raises(LaunchError, match="Tesla T4"):
        precision.set_up(BF16, GPU)

    # A GPU that is named by its number is not looked for: this runs where there is none.
    with pytest.raises(LaunchError, match="Tesla T4"):
        start(dataclasses.replace(BF16, device="cuda:0"))


def test_float32_is_float32_and_says_what_it_costs(card, capsys):
    card(True)
    precision.check(BF16, GPU)
    precision.set_up(OPTIONS, GPU)
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32
    assert "train.precision=bf16" in capsys.readouterr().out

    # Where there is no bf16, or it is taken, there is nothing to say.
    precision.set_up(BF16, GPU)
    card(False)
    precision.set_up(OPTIONS, GPU)
    assert not capsys.readouterr().out


def test_only_statistics_travel_before_a_step():
    assert ddp_settings(tiny()).to_kwargs() == {
        "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
    }
    assert "broadcast_buffers" not in ddp_settings(tiny(image_tower=RESNET)).to_kwargs()


def test_a_layout_for_convolutions_stays_out_of_files():
    """Gradients and moments are those of the plain layout; safetensors takes no other."""
    states = []
    for laid_out in (False, True):
        model = tiny(image_tower=RESNET).train()
        kernel = model.visual.trunk.layer1[0].conv1.weight
        if laid_out:
            channels_last(model)
            assert kernel.is_contiguous(memory_format=torch.channels_last)

        engine = Replicated(torch.device("cpu"))
        engine.prepare(model, OPTIONS)
        rows = engine.model(image=inputs(model)[0]).image
        engine.backward((rows @ rows.T).square().sum())
        engine.update(1e-3)

        weights, moments = engine.state()
        engine.load_moments(moments)
        assert engine.optimizer.state[kernel]["exp_avg"].stride() == kernel.stride()
        assert all(value.is_contiguous() for value in (*weights.values(), *moments.values()))
        states.append({k: v.flatten().tolist() for k, v in moments.items()})

    assert assert_close(states[1], states[0], 1e-3, 1e-6) > 20

    # One convolution over patches gains nothing.
    vit = tiny()
    channels_last(vit)
    assert vit.visual.conv1.weight.is_contiguous()
