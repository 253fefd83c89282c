"""Dropout of the text tower: two views of a text in training, none elsewhere."""

import pytest
import torch

from tests.models.tiny import TEXT, inputs, tiny
from vlp.export import folder

DROPPED = TEXT | {"dropout": 0.3}


def test_two_passes_are_two_views_in_training_alone():
    model, plain = tiny(text_tower=DROPPED), tiny()
    pixels, ids = inputs(model)
    assert torch.equal(model.encode_text(ids), plain.encode_text(ids)), "evaluation drops nothing"

    model.train()
    torch.manual_seed(3)
    first, second = model.encode_text(ids), model.encode_text(ids)
    torch.manual_seed(3)
    assert torch.equal(model.encode_text(ids), first) and not torch.equal(first, second)
    assert torch.equal(model.encode_image(pixels), plain.train().encode_image(pixels))


def test_blocks_that_are_computed_again_drop_the_same():
    gradients = []
    for checkpointing in (False, True):
        model = tiny(text_tower=DROPPED).train()
        model.text.set_grad_checkpointing(checkpointing)
        torch.manual_seed(5)
        model.encode_text(inputs(model)[1])[:, 0].sum().backward()
        gradients.append(model.text.text_projection.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


def test_a_locked_tower_drops_nothing():
    model = tiny(text_tower=DROPPED | {"locked": True}).train()
    _, ids = inputs(model)
    assert torch.equal(model.encode_text(ids), model.encode_text(ids))


def test_an_export_knows_nothing_of_it(tmp_path):
    folder.export(tiny(text_tower=DROPPED), tmp_path / "dropped")
    folder.export(tiny(), tmp_path / "plain")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        dropped, plain = ((tmp_path / of / name).read_bytes() for of in ("dropped", "plain"))
        assert dropped == plain


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"text_tower": TEXT | {"dropout": 1}},
            r"dropout is 1(\.0)?; expected a share in \[0, 1\)",
        ),
        (
            {"image_tower": {"name": "open_clip", "architecture": "ViT-B-32", "dropout": 0.1}},
            "image_tower.dropout is of the text tower that an image tower brings",
        ),
    ],
)
def test_what_has_no_text_to_drop_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        tiny(**keys)
