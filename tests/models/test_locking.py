"""Locks by layer groups: what is locked does not change by a bit, the rest learns, for every kind
of tower.
"""

from __future__ import annotations

import pytest
import torch

from tests.models.test_image_size import RESNET, architecture
from tests.models.tiny import TEXT, VIT, inputs, language_model, settings, tiny
from vlp.models.layer_groups import describe, layer_groups

ALONE = {"text_tower": None, "embed_dim": None}


def towers(folder):
    """Every kind of tower: the model's section, its side, and how many groups it has."""
    language = {
        "name": "huggingface",
        "model": str(language_model(folder)),
        "context_length": 12,
        "pretrained": False,
        "pooler": "cls_pooler",
    }
    return {
        "open_clip image": ("image_tower", VIT, {}, 4),
        "open_clip text": ("text_tower", TEXT, {}, 4),
        "open_clip resnet": ("image_tower", architecture(folder, RESNET, 64), ALONE, 6),
        "timm vit": ("image_tower", {"name": "timm", "model": "test_vit"}, {}, 7),
        "timm resnet": ("image_tower", {"name": "timm", "model": "test_resnet"}, {}, 5),
        "huggingface": ("text_tower", language, {}, 4),
    }


def step(model):
    """One step of a plain optimiser over everything that learns, decay included."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.1, weight_decay=0.1)
    features = model.train()(*inputs(model))
    (features.scale * (features.image * features.text.roll(1, 0)).sum()).backward()
    optimizer.step()


def test_locked_groups_stay_and_the_others_learn_for_every_tower(tmp_path):
    n_tried = 0
    for side, tower, keys, n_groups in towers(tmp_path).values():
        for unlocked in (1, 2):
            locked = {side: tower | {"locked": {"unlocked_groups": unlocked}}}
            model = tiny(**keys | locked)
            encoder = model.visual if side == "image_tower" else model.text
            groups = layer_groups(encoder)
            assert len(groups) == len(describe(encoder)) == n_groups
            named = [id(p) for group in groups for p in group.parameters]
            assert len(named) == len(set(named))

            before = [[p.clone() for p in group.parameters] for group in groups]
            statistics = {name: value.clone() for name, value in encoder.named_buffers()}
            step(model)
            for number, (group, old) in enumerate(zip(groups, before)):
                same = [torch.equal(a, b) for a, b in zip(group.parameters, old)]
                n_locked = n_groups - unlocked
                assert all(same) if number < n_locked else not all(same), (side, group.name)
            moved = {
                name
                for name, value in encoder.named_buffers()
                if not torch.equal(value, statistics[name])
            }
            assert all("layer4" in name or "layer3" in name for name in moved), moved
            n_tried += 1
    assert n_tried == 12


def test_open_clip_locks_the_same_parameters(tmp_path):
    for unlocked in (1, 2, 3):
        keys = {"locked": {"unlocked_groups": unlocked}}
        ours = tiny(image_tower=VIT | keys, text_tower=TEXT | keys)
        theirs = tiny()
        theirs.visual.lock(unlocked_groups=unlocked)
        theirs.text.lock(unlocked_layers=unlocked)
        learning = [
            {name for name, p in model.named_parameters() if p.requires_grad}
            for model in (ours, theirs)
        ]
        assert learning[0] == learning[1]


def test_more_groups_than_there_are_name_the_groups():
    with pytest.raises(ValueError) as caught:
        tiny(image_tower=VIT | {"locked": {"unlocked_groups": 4}})
    message = str(caught.value)
    assert "image_tower.locked.unlocked_groups is 4, and the tower has 4 groups: " in message
    assert "embeddings, transformer.resblocks.0, " in message and "write 3 or fewer" in message
    for tower, expected in (
        ({"locked": {"unlocked_groups": -1}}, "unlocked_groups is -1"),
        ({"locked": {"unlocked_groups": 1}, "precomputed": True}, "locked as a whole"),
    ):
        with pytest.raises(ValueError, match=expected):
            settings(image_tower=VIT | tower)


def test_a_new_projection_of_a_locked_tower_learns():
    model = tiny(image_tower=VIT | {"locked": True}, new_projection=True)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in learning if name.startswith("visual")} == {"visual.proj"}
