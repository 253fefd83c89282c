"""Patches are chosen where the pixels lie, and as open_clip chooses them."""

import open_clip
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny import VIT, inputs, tiny


class Devices(TorchDispatchMode):
    """Records on which devices operations leave their results."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.add(result.device.type)
        return result


def test_nothing_is_drawn_beside_the_device():
    """The meta device stands for a GPU: an operation on the CPU would make the host wait there."""
    model = tiny(image_tower=VIT | {"patch_dropout": 0.5}).train().to("meta")
    pixels, _ = inputs(model)

    with Devices() as devices:
        model.visual(pixels.to("meta").float())
    assert devices.seen == {"meta"}


def test_the_patches_are_those_of_open_clip():
    """17 tokens, a class token among them: 0.4 of 16 patches leaves 9."""
    tokens = torch.randn(5, 17, 8, generator=torch.Generator().manual_seed(0))
    ours = tiny(image_tower=VIT | {"patch_dropout": 0.4}).visual.patch_dropout.train()
    theirs = open_clip.transformer.PatchDropout(0.4).train()

    kept = []
    for module in (ours, theirs, ours):
        torch.manual_seed(7)
        kept.append(module(tokens))
    assert kept[0].shape == (5, 10, 8)
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])

    assert not torch.equal(ours(tokens), kept[0])  # without a seed, others
    assert ours.eval()(tokens) is tokens
