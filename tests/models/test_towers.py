"""Every tower file keeps the folder's contract, and what it describes is built, runs and trains
every weight.
"""

import dataclasses
import json

import open_clip
import pytest
import torch

from tests.models import languages, multimodals
from tests.models.tiny import TEXT, VIT, inputs, language_model, settings, siglip, tiny
from vlp import plugin
from vlp.models import assemble

NAMES = ["huggingface", "llm", "mllm", "open_clip", "stored", "timm", "transformer", "vit"]


def _vision_section(**section):
    """open_clip's keys of an image tower; those of a multimodal model's are ours."""
    section.pop("vlp_image", None)
    return open_clip.CLIPVisionCfg(**section)


def _text_section(**section):
    """open_clip's keys of a text tower; those of a language model's are ours."""
    section.pop("vlp_text", None)
    return open_clip.CLIPTextCfg(**section)


SECTIONS = {
    "vision_cfg": _vision_section,
    "text_cfg": _text_section,
    "shared_cfg": dict,
    "preprocess_cfg": dict,
}


def example(name, folder):
    """The smallest use of each file."""
    return {
        "huggingface": lambda: {
            "model": str(language_model(folder)),
            "context_length": 12,
            "pretrained": False,
        },
        "llm": lambda: {"model": str(languages.language_model(folder)), "context_length": 12},
        "mllm": lambda: multimodals.options(multimodals.multimodal_model(folder, "qwen2_vl")),
        "open_clip": lambda: {
            "architecture": "ViT-S-32-alt",
            "image_size": 64,
            "context_length": 16,
        },
        "stored": lambda: {"embeddings": str(languages.text_store(folder))},
        "timm": lambda: {"model": "test_resnet", "image_size": 64},
        "transformer": lambda: {k: v for k, v in TEXT.items() if k != "name"},
        "vit": lambda: {k: v for k, v in VIT.items() if k != "name"},
    }[name]()


def test_the_folder_holds_the_towers_known_here():
    assert plugin.names("vlp.towers") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_contract(name, tmp_path):
    module = plugin.load("vlp.towers", name)
    assert dataclasses.is_dataclass(module.Options) and module.Options.__dataclass_params__.frozen
    options = module.Options(**example(name, tmp_path))
    found = {section for section in SECTIONS if hasattr(module, section)}
    assert found & {"vision_cfg", "text_cfg"}
    for section in found:
        value = getattr(module, section)(options)
        assert json.loads(json.dumps(value)) == value, (
            f"{section} must be plain JSON: it is exported"
        )
        SECTIONS[section](**value)
        value.clear()  # a caller's change must not reach the next caller
        assert getattr(module, section)(options) or section == "preprocess_cfg"


@pytest.mark.parametrize("name", NAMES)
def test_every_tower_runs_and_trains_all_its_weights(name, tmp_path):
    tower = {"name": name, **example(name, tmp_path)}
    role = "image_tower" if hasattr(plugin.load("vlp.towers", name), "vision_cfg") else "text_tower"
    whole = {"text_tower": None, "embed_dim": None} if name in ("open_clip", "mllm") else {}
    model = tiny(**whole, **{role: tower}).train()
    pixels, ids = inputs(model)
    features = model(pixels, ids)
    assert features.image.shape == features.text.shape == (3, model.embed_dim)
    for rows in (features.image, features.text):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    (features.scale * (features.image * features.text).sum()).backward()
    assert [
        k for k, p in model.named_parameters() if p.grad is None
    ] == []  # DDP would wait for them for ever


def test_siglip_parts_train_all_their_weights(tmp_path):
    model = tiny(image_tower=siglip(tmp_path), text_tower=None, embed_dim=None, bias=-10.0).train()
    assert model.image_spec.resize == "squash" and model.image_spec.mean == (0.5, 0.5, 0.5)
    features = model(*inputs(model))
    (features.scale * (features.image * features.text).sum() + features.bias).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


BAD = {
    "an image tower on the text side": ({"text_tower": VIT}, "'vit' cannot be the text tower"),
    "a text tower on the image side": (
        {"image_tower": TEXT},
        "'transformer' cannot be the image tower",
    ),
    "no text tower": ({"text_tower": None}, "brings no text tower; add text_tower: one of"),
    "no embedding size": ({"embed_dim": None}, "set model.embed_dim"),
    "a misspelt architecture": (
        {"image_tower": {"name": "open_clip", "architecture": "ViT-B32"}},
        "did you mean 'ViT-B-32'",
    ),
    "an architecture with a decoder, and another one": (
        {"image_tower": {"name": "open_clip", "architecture": "coca_ViT-B-32"}, "decoder": {}},
        "the architecture brings one; leave out model.decoder",
    ),
    "a misspelt timm model": (
        {"image_tower": {"name": "timm", "model": "resnet5"}},
        "close to it: resnet50",
    ),
    "an unknown tag of a timm model": (
        {"image_tower": {"name": "timm", "model": "resnet50.none"}},
        "has no tag 'none'; found resnet50.",
    ),
    "a nameless timm model": (
        {"image_tower": {"name": "timm", "model": "zzzz"}},
        "timm.list_models() has them",
    ),
    "towers that disagree": (
        {"text_tower": TEXT | {"quick_gelu": True}},
        "quick_gelu is False for image_tower 'vit' and True",
    ),
    "a missing language model": (
        {"text_tower": {"name": "huggingface", "model": "/no/such"}},
        "no Hugging Face model configuration",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    keys, message = BAD[case]
    with pytest.raises(ValueError) as caught:
        assemble.assemble(settings(**keys))
    assert message in str(caught.value)


def test_features_that_are_no_embedding_of_the_size_asked_for():
    with pytest.raises(ValueError, match=r"gives 96 features.*embed_dim is 48"):
        tiny(image_tower={"name": "timm", "model": "test_resnet", "image_size": 64, "proj": "none"})


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ({**VIT, "head_width": 48}, "head_width 48 does not divide width 64"),
        ({**VIT, "image_size": 30}, "patch_size 8 does not divide image_size 30"),
        ({**VIT, "patch_dropout": 1.0}, "patch_dropout is 1.0"),
        ({**VIT, "widht": 64}, "did you mean 'width'"),
    ],
)
def test_bad_options_are_found_with_the_configuration(tower, message):
    with pytest.raises(ValueError) as caught:
        settings(image_tower=tower)
    assert message in str(caught.value)
