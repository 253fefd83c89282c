"""Low-rank adapters: merged they are what they were, the base does not move, and a run resumes,
evaluates and exports.
"""

from __future__ import annotations

import json

import pytest
import torch

from tests.models.test_image_size import architecture
from tests.models.test_locking import ALONE, step, towers
from tests.models.tiny import TEXT, VIT, inputs, settings, tiny
from vlp import checkpoint
from vlp.models import lora
from vlp.models.build import from_description
from vlp.models.load import load
from vlp.optim.groups import decays

LORA = {"lora": {"r": 4, "alpha": 8.0}}


def trained(**keys):
    """A model with adapters that are not zeros, and what it embeds."""
    model = tiny(**keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval()


def embedded(model, batch):
    with torch.no_grad():
        features = model.eval()(*batch)
    return features.image, features.text


def test_merged_towers_embed_as_adapted_ones_do_for_every_tower(tmp_path):
    n_tried = 0
    for kind, (side, tower, keys, _) in towers(tmp_path).items():
        if "resnet" in kind:
            continue
        keys = keys | {side: tower | LORA}
        model, plain = trained(**keys), tiny(**keys | {side: tower})
        batch = inputs(model)
        n_adapted = sum("lora_B" in name for name in model.state_dict())
        assert n_adapted == len([n for n in model.state_dict() if "lora_A" in n]) >= 8

        changed = embedded(model, batch)
        state = {
            name: value
            for name, value in model.open_clip_state_dict().items()
            if not name.startswith("logit")
        }
        plain.load_state_dict(state | {"scaling.logit_scale": model.logit_scale}, strict=True)
        for a, b in zip(changed, embedded(plain, batch)):
            assert (a - b).abs().max() <= 1e-6
        # The adapters do something, or all of this would be empty.
        base = embedded(tiny(**keys), batch)
        assert max((a - b).abs().max() for a, b in zip(changed, base)) > 1e-3
        n_tried += 1
    assert n_tried == 4


def test_at_the_start_an_adapted_model_is_the_plain_one():
    plain, adapted = tiny(), tiny(image_tower=VIT | LORA, text_tower=TEXT | LORA)
    batch = inputs(plain)
    for a, b in zip(embedded(plain, batch), embedded(adapted, batch)):
        assert (a - b).abs().max() <= 1e-6


def test_only_adapters_learn_and_the_base_keeps_every_bit(tmp_path):
    for side, tower, keys, _ in towers(tmp_path).values():
        if "resnet" in str(tower) or "own.json" in str(tower):
            continue
        model = trained(**keys | {side: tower | {"lora": {"r": 2, "dropout": 0.1}}})
        prefix = "visual." if side == "image_tower" else "text."
        before = {name: value.clone() for name, value in model.state_dict().items()}
        step(model)
        moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
        of_tower = {name for name in moved if name.startswith(prefix)}
        projection = {"visual.head.proj.weight", "text.proj.weight"}
        adapters_alone = {name for name in before if "lora_" in name}
        assert of_tower - projection == adapters_alone and len(adapters_alone) > 8

    model = tiny(image_tower=VIT | LORA, text_tower=TEXT | LORA)
    decayed = {n for n, p in model.named_parameters() if p.requires_grad and decays(n, p)}
    assert len(decayed) == 2 * 2 * 4 * 2 and all("lora_" in name for name in decayed)


def test_a_classifier_that_is_the_projection_learns_whole_beside_adapters(tmp_path):
    """Where open_clip adds no projection to a timm trunk, its own classifier is it."""
    tower = architecture(tmp_path, {"timm_model_name": "test_vit", "timm_proj": ""}, 64)
    model = trained(image_tower=tower | LORA, **ALONE)
    classifier = {"visual.trunk.head.weight", "visual.trunk.head.bias"}
    adapted = {name for name in model.state_dict() if "lora_" in name}
    assert len(adapted) > 8 and not any("trunk.head" in name for name in adapted)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model)
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert {name for name in moved if name.startswith("visual.")} == adapted | classifier

    batch = inputs(model)
    plain = tiny(seed=4, image_tower=tower, **ALONE)
    state = {n: v for n, v in model.open_clip_state_dict().items() if "logit" not in n}
    plain.load_state_dict(state | {"scaling.logit_scale": model.logit_scale}, strict=True)
    for a, b in zip(embedded(model, batch), embedded(plain, batch)):
        assert (a - b).abs().max() <= 1e-6


def test_a_checkpoint_is_read_merged_and_by_itself(tmp_path):
    model = trained(image_tower=VIT | LORA)
    batch = inputs(model)
    written = checkpoint.Contents(
        model.state_dict(), {}, config="out: run", description=model.description()
    )
    saved = checkpoint.save(tmp_path / "run", 3, written, keep=1)
    expected = embedded(model, batch)
    for plain in (checkpoint.load_model(saved), tiny(seed=5, pretrained=str(tmp_path / "run"))):
        assert not [name for name in plain.state_dict() if "lora" in name or "base" in name]
        for a, b in zip(embedded(plain, batch), expected):
            assert (a - b).abs().max() <= 1e-6

    from vlp.export.folder import export

    export(model, tmp_path / "out")
    for a, b in zip(embedded(load(tmp_path / "out"), batch), expected):
        assert (a - b).abs().max() <= 1e-6
    description = json.loads((tmp_path / "out/open_clip_config.json").read_text())
    assert "lora" not in description["vlp"] and from_description(description)


def test_targets_are_ends_of_names():
    model = tiny(image_tower=VIT | {"lora": {"targets": [r"mlp\.c_\w+", "out_proj"]}})
    adapted = {name.partition(".lora_A")[0] for name in model.state_dict() if "lora_A" in name}
    blocks = [f"visual.transformer.resblocks.{i}" for i in (0, 1)]
    ends = ("mlp.c_fc", "mlp.c_proj", "attn.out_proj")
    assert adapted == {f"{block}.{end}" for block in blocks for end in ends}


REFUSED = {
    "no such layer": (
        VIT | {"lora": {"targets": ["q_proj"]}},
        r"image_tower.lora.targets: 'q_proj' matches no linear layer .*"
        r"transformer.resblocks.N.attn.in_proj, .*resblocks.N.mlp.c_fc",
    ),
    "no linear layer at all": (
        {"name": "timm", "model": "test_resnet"} | LORA,
        "image_tower.lora: the tower calls no linear layer",
    ),
    "no expression": (VIT | {"lora": {"targets": ["("]}}, "'\\(' is no regular expression"),
    "a locked tower": (VIT | LORA | {"locked": True}, "neither locked nor precomputed"),
    "no rank": (VIT | {"lora": {"r": 0}}, "r is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused(case):
    tower, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        tiny(image_tower=tower)


def test_without_peft_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    assert settings(image_tower=VIT | LORA)
    with pytest.raises(ValueError, match=r"pip install 'vlp\[lora\]'"):
        tiny(image_tower=VIT | LORA)
