"""Fresh projections beside published weights: which tensors are fresh, for every kind of tower, on
both ways in.
"""

from __future__ import annotations

import json

import pytest
import torch

from tests.models.test_image_size import RESNET, architecture, saved
from tests.models.tiny import TEXT, inputs, language_model, siglip, tiny
from vlp import checkpoint, config, schema
from vlp.pretrained.fitting import Fit
from vlp.resume import start_from

ALONE = {"text_tower": None, "embed_dim": None}


def towers(kind, folder):
    """A model section, and the tensors that are its projections."""
    if kind == "vit":
        return {}, {"visual.proj", "text.text_projection"}
    if kind == "timm":
        tower = {"name": "timm", "model": "test_resnet", "image_size": 64, "proj": "mlp"}
        return {"image_tower": tower}, {
            *(f"visual.head.mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight")),
            "text.text_projection",
        }
    if kind == "resnet":
        weights = {"visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias"}
        section = {"image_tower": architecture(folder, RESNET, 64)} | ALONE
        return section, weights | {"text.text_projection"}
    if kind == "huggingface":
        tower = {
            "name": "huggingface",
            "model": str(language_model(folder)),
            "context_length": 12,
            "pretrained": False,
        }
        return {"text_tower": tower}, {"visual.proj", "text.proj.weight"}
    linear = {"text.text_projection.weight", "text.text_projection.bias"}
    return {"image_tower": siglip(folder)} | ALONE, linear | {"visual.head.proj.weight"}


def changed(source, model):
    """The tensors of a model that are not those of the source."""
    published = source.state_dict()
    return {
        name
        for name, value in model.state_dict().items()
        if name not in published or not torch.equal(value, published[name])
    }


@pytest.mark.parametrize("kind", ["vit", "timm", "resnet", "huggingface", "siglip"])
def test_projections_are_fresh_and_all_else_is_as_published(kind, tmp_path):
    keys, projections = towers(kind, tmp_path)
    source = tiny(seed=3, **keys)
    weights = saved(source, tmp_path / "w.safetensors")
    new = keys | {"embed_dim": 24, "new_projection": True}
    for way in ("pretrained", "init_from"):
        if way == "pretrained":
            model = tiny(seed=1, **new, pretrained=weights)
        else:
            model = tiny(seed=1, **new)
            start_from(model, weights, Fit(new_projection=True))
        assert changed(source, model) == projections
        assert model(*inputs(model)).image.shape == (3, 24)


def test_a_new_projection_of_the_published_size_is_fresh_too(tmp_path):
    source = tiny(seed=3)
    weights = saved(source, tmp_path / "w.safetensors")
    model = tiny(seed=1, pretrained=weights, new_projection=True)
    assert not torch.equal(model.visual.proj, source.visual.proj)
    assert torch.equal(model.visual.conv1.weight, source.visual.conv1.weight)
    assert torch.equal(model.visual.proj, tiny(seed=1).visual.proj)


def test_another_embedding_size_without_it_says_what_to_write(tmp_path):
    weights = saved(tiny(seed=3), tmp_path / "w.safetensors")
    message = "only the projections differ: set model.new_projection: true"
    with pytest.raises(ValueError, match=message):
        tiny(embed_dim=24, pretrained=weights)
    described = tmp_path / "open_clip_config.json"
    described.write_text(json.dumps(tiny(seed=3).description()))
    saved(tiny(seed=3), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match=message):
        start_from(tiny(embed_dim=24), str(tmp_path))
    with pytest.raises(ValueError) as caught:
        tiny(embed_dim=24, text_tower=TEXT | {"layers": 3}, pretrained=weights)
    assert "new_projection" not in str(caught.value)


def test_a_new_projection_beside_no_weights_is_refused():
    tower = {"name": "open_clip", "architecture": "ViT-B-32"}
    described = {
        "out": "run",
        "data": {"sources": [{"name": "shards", "path": "data"}]},
        "model": {"image_tower": tower, "new_projection": True},
        "train": {"duration": 1, "batch": 8},
        "objective": {"infonce": {}},
    }
    with pytest.raises(schema.ConfigError, match=r"neither model\.pretrained nor"):
        config.parse(described)
