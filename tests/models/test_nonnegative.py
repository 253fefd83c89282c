"""Embeddings without negative numbers: trained, evaluated and exported alike."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.tiny import VIT, inputs, settings, tiny
from vlp.export import folder
from vlp.models.heads import nonnegative, unit_or_zero
from vlp.models.load import load

HEADS = {"nonnegative": True}


def test_the_value_is_relu_s_and_the_gradient_gelu_s():
    features = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    values, upstream = nonnegative(features), torch.randn(7, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(values, features, upstream)
    (smooth,) = torch.autograd.grad(F.gelu(features), features, upstream)

    assert torch.equal(values, features.relu()) and torch.equal(gradient, smooth)
    assert gradient[features < 0].any(), "what is 0 can come back"
    with torch.no_grad():
        assert torch.equal(nonnegative(features), features.relu())


def test_large_features_pass_as_they_are():
    features = 20 + torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    values = nonnegative(features)
    (gradient,) = torch.autograd.grad(values.sum(), features)
    assert torch.equal(values, features) and torch.allclose(gradient, torch.ones_like(gradient))


def test_a_row_without_a_positive_number_comes_back_by_no_larger_gradient_than_others():
    features = torch.cat([torch.randn(3, 5), -torch.rand(1, 5)]).requires_grad_()
    rows = unit_or_zero(nonnegative(features))
    (gradient,) = torch.autograd.grad(rows, features, torch.ones_like(rows))
    assert not rows[3].any() and gradient[3].any() and gradient.abs().max() < 10


def test_both_sides_are_nonnegative_in_training_and_in_evaluation():
    model, plain = tiny(heads=HEADS), tiny()
    pixels, ids = inputs(model)
    features = model(pixels, ids)
    for rows, encode, of_plain in (
        (features.image, model.encode_image(pixels), plain.encode_image(pixels)),
        (features.text, model.encode_text(ids), plain.encode_text(ids)),
    ):
        assert torch.equal(rows, encode) and (rows >= 0).all() and (rows == 0).any()
        torch.testing.assert_close(rows, F.normalize(of_plain.relu(), dim=1))
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


@pytest.mark.parametrize("image_size", [None, 16])
def test_an_export_gives_the_embeddings_of_training(tmp_path, image_size):
    model = tiny(heads=HEADS)
    notes = folder.export(model, tmp_path / "export", image_size=image_size)
    loaded = load(tmp_path / "export").eval()
    pixels, ids = inputs(loaded)
    assert (loaded.encode_image(pixels) >= 0).all()
    assert torch.equal(loaded.encode_text(ids), model.encode_text(ids))

    assert any("open_clip: gives rows with negative numbers" in note for note in notes)
    assert any("no model of theirs has max(0, ·) as its last step" in note for note in notes)
    assert not list((tmp_path / "export").rglob("model.safetensors")), "transformers cannot say it"


def test_a_cut_export_gives_the_first_numbers_of_training(tmp_path):
    model = tiny(heads=HEADS)
    folder.export(model, tmp_path / "export", width=12)
    pixels, ids = inputs(model)
    of_cut, of_whole = load(tmp_path / "export").eval()(pixels, ids), model(pixels, ids)
    for side in ("image", "text"):
        prefix = F.normalize(getattr(of_whole, side)[:, :12], dim=1)
        torch.testing.assert_close(getattr(of_cut, side), prefix)
        assert (prefix >= 0).all() and (prefix == 0).any()


def test_an_export_of_a_plain_model_says_nothing_of_it(tmp_path):
    notes = folder.export(tiny(), tmp_path / "export")
    assert not any("negative" in note for note in notes)
    assert (
        '"heads"'
        not in (tmp_path / "export" / "open_clip_config.json").read_text().split('"vlp"')[1]
    )


def test_stored_embeddings_of_an_image_tower_do_not_pass_it():
    tower = VIT | {"locked": True, "precomputed": True}
    with pytest.raises(ValueError, match=r"heads\.nonnegative is the model's last step"):
        settings(image_tower=tower, heads=HEADS)
