"""Pictures of another size: positions are those of open_clip and of timm, on both ways in, and
sizes that do not work are refused with those that do.
"""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file

from tests.models.tiny import VIT, inputs, tiny
from vlp.models.build import from_description
from vlp.pretrained import image_size
from vlp.resume import start_from

TIMM = {"name": "timm", "model": "test_vit"}  # made for 160 pixels


def saved(model, path):
    save_file({k: v.contiguous() for k, v in model.open_clip_state_dict().items()}, path)
    return str(path)


def architecture(folder, vision, size):
    """A small model of open_clip, as an architecture of one's own."""
    vision = vision | {"image_size": 64}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    path = folder / "own.json"
    path.write_text(json.dumps({"embed_dim": 48, "vision_cfg": vision, "text_cfg": text}))
    return {"name": "open_clip", "architecture": str(path), "image_size": size}


def both_ways(tower, weights, **keys):
    """The model that `pretrained` gives, which is the one that `init_from` gives."""
    model = tiny(seed=1, image_tower=tower, pretrained=weights, **keys)
    started = tiny(seed=2, image_tower=tower, **keys)
    start_from(started, weights)
    pairs = list(zip(model.state_dict().values(), started.state_dict().values()))
    assert len(pairs) > 20 and all(torch.equal(a, b) for a, b in pairs)
    return model


@pytest.mark.parametrize("size", [48, 16, [32, 64], [64, 24]])
def test_a_vision_transformer_has_the_positions_of_open_clip(size, tmp_path):
    source = tiny(seed=3)
    model = both_ways(VIT | {"image_size": size}, saved(source, tmp_path / "w.safetensors"))
    weights = source.open_clip_state_dict()
    config = {key: v for key, v in model.open_clip_config.items() if key != "custom_text"}
    resize_pos_embed(weights, open_clip.CustomTextCLIP(**config))

    positions = model.visual.positional_embedding
    assert torch.equal(positions, weights["visual.positional_embedding"])
    assert torch.equal(positions[0], source.visual.positional_embedding[0])
    assert model.image_spec.size == image_size.pair(size)
    assert model(*inputs(model)).image.shape == (3, 48)


def test_a_rectangle_comes_back_by_its_description(tmp_path):
    """From 32 x 64 to 64 x 32: as many places, in another grid."""
    source = tiny(seed=3, image_tower=VIT | {"image_size": [32, 64]})
    upright = tiny(seed=1, image_tower=VIT | {"image_size": [64, 32]})
    saved(source, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(source.description()))
    start_from(upright, str(tmp_path))
    table = source.visual.positional_embedding.detach()
    expected = image_size.interpolated(table, (4, 8), (8, 4))
    assert torch.equal(upright.visual.positional_embedding, expected)
    described = tiny(image_tower=VIT | {"image_size": [64, 32]}, pretrained=str(tmp_path))
    assert torch.equal(described.visual.positional_embedding, expected)

    alone = saved(source, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match="positions of 32 places, which are no square"):
        tiny(image_tower=VIT | {"image_size": 48}, pretrained=alone)


@pytest.mark.parametrize("size", [96, [96, 128]])
def test_a_timm_tower_has_the_positions_of_timm(size, tmp_path):
    source = tiny(seed=3, image_tower=TIMM)
    weights = saved(source, tmp_path / "w.safetensors")
    model = both_ways(TIMM | {"image_size": size}, weights)
    source.visual.trunk.set_input_size(image_size.pair(size))
    assert torch.equal(model.visual.trunk.pos_embed, source.visual.trunk.pos_embed)
    assert model(*inputs(model)).image.shape == (3, 48)

    # Its own weights come back at their size.
    again = from_description(model.description(), Path(saved(model, tmp_path / "b.safetensors")))
    assert torch.equal(again.visual.trunk.pos_embed, model.visual.trunk.pos_embed)


def test_a_convolutional_tower_reads_any_size(tmp_path):
    tower = {"name": "timm", "model": "test_resnet"}
    source = tiny(seed=3, image_tower=tower)
    weights = saved(source, tmp_path / "w.safetensors")
    model = both_ways(tower | {"image_size": [64, 96]}, weights)
    assert model(*inputs(model)).image.shape == (3, 48)


RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8}


def test_a_resnets_attention_pool_is_interpolated(tmp_path):
    keys = {"text_tower": None, "embed_dim": None}
    source = tiny(seed=3, image_tower=architecture(tmp_path, RESNET, 64), **keys)
    weights = saved(source, tmp_path / "w.safetensors")
    model = both_ways(architecture(tmp_path, RESNET, 96), weights, **keys)
    table = source.visual.attnpool.positional_embedding.detach()
    expected = image_size.interpolated(table, (2, 2), (3, 3))
    assert torch.equal(model.visual.attnpool.positional_embedding, expected)
    assert model.eval()(*inputs(model)).image.shape == (3, 48)


REFUSED = {
    "an open_clip tower": (
        {"vision": {"layers": 1, "width": 64, "patch_size": 32}, "image_size": 100},
        "image_size 100 is not divisible by the patches of the image tower, 32 pixels; "
        "sizes that work are 96 or 128",
    ),
    "a rectangle": (
        {"vision": {"layers": 1, "width": 64, "patch_size": 32}, "image_size": [64, 100]},
        "image_size 64 x 100 is not divisible .* sizes that work are 64 x 96 or 96 x 128",
    ),
    "a timm tower": (
        TIMM | {"image_size": 100},
        "not divisible by the patches of test_vit, 16 pixels; sizes that work are 96 or 112",
    ),
    "a square pool": (
        {"vision": {"layers": [1, 1, 1, 1], "width": 8}, "image_size": [224, 256]},
        "224 x 256, and the attention pool .* is square; sizes that work are 224 and 256",
    ),
    "windows that do not fit": (
        {"name": "timm", "model": "maxvit_rmlp_pico_rw_256", "image_size": 200},
        "cannot read pictures of 200 pixels .*; a size that works is 256, for which timm made it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_size_that_a_tower_refuses_names_sizes_that_work(case, tmp_path):
    tower, message = REFUSED[case]
    text = {}
    if "vision" in tower:
        tower = architecture(tmp_path, tower["vision"], tower["image_size"])
        text = {"text_tower": None, "embed_dim": None}
    with pytest.raises(ValueError, match=message):
        tiny(image_tower=tower, **text)
