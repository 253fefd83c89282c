"""The dual encoder: what it computes, how its scale is bounded, what it allows engines to do with
it.
"""

import copy
import json
import math

import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file

from tests.models.tiny import TEXT, VIT, inputs, language_model, settings, siglip, tiny
from vlp import config
from vlp.export import folder as export
from vlp.models.build import build, from_description
from vlp.models.exact import Pixels, Scaling
from vlp.models.load import load
from vlp.models.recomputing import recompute_activations
from vlp.schema import ConfigError
from vlp.types import ON_WHITE, Decoding, ImageSpec

BLOCKED = {"name": "timm", "model": "test_resnet", "image_size": 64}


def test_uint8_pixels_are_normalised_as_open_clip_does():
    model = tiny()
    pixels, _ = inputs(model, rows=2)
    transform = image_transform(32, is_train=False)
    floats = torch.stack(
        [transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels]
    )
    torch.testing.assert_close(model.pixels(pixels), floats, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        model(image=pixels).image, model(image=floats).image, rtol=0, atol=1e-6
    )


def every_pixel_value():
    return torch.arange(256, dtype=torch.uint8).repeat(9).view(-1, 3, 4, 6)


def test_narrowed_pixels_are_the_normalised_ones_rounded_once():
    pixels = Pixels(ImageSpec((4, 6)))
    narrowed = pixels.narrowed(every_pixel_value(), torch.bfloat16)
    assert torch.equal(narrowed, pixels(every_pixel_value()).bfloat16())
    assert narrowed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pixels_are_narrowed_on_a_gpu():
    pixels = Pixels(ImageSpec((4, 6))).cuda()
    images = every_pixel_value().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        narrowed = pixels(images)
    assert narrowed.dtype == torch.bfloat16
    # A fused multiply-add may round a tie the other way.
    torch.testing.assert_close(narrowed.float(), pixels(images), rtol=2**-8, atol=1e-3)


def test_either_side_alone():
    model = tiny()
    pixels, ids = inputs(model)
    both, image, text = model(pixels, ids), model(image=pixels), model(text=ids)
    assert image.text is None and text.image is None and both.bias is None
    assert torch.equal(both.image, image.image) and torch.equal(both.text, text.text)
    assert both.scale.shape == () and both.scale.item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("image", [(2, 3, 16, 16), (2, 1, 32, 32), (3, 32, 32)])
def test_pixels_of_another_shape_are_refused(image):
    with pytest.raises(ValueError, match=r"expected \[b, 3, 32, 32\]"):
        tiny()(image=torch.zeros(image))


def test_ids_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"expected \[rows, 16\]"):
        tiny()(text=torch.zeros(2, 77, dtype=torch.long))


def test_seed_decides_the_weights():
    first, again, other = (
        tiny(seed=3).state_dict(),
        tiny(seed=3).state_dict(),
        tiny(seed=4).state_dict(),
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])


# ---- scale and bias


def descend(forward, start, gradient_of_scale, steps=20, lr=0.1):
    """Plain descent on the logarithm of the scale, under a loss whose gradient in the scale has one
    sign.
    """
    log_scale = torch.tensor([start], requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(gradient_of_scale * forward(log_scale), log_scale)
        log_scale = (log_scale - lr * gradient.sign()).detach().requires_grad_()
    return log_scale.item()


def ours(log_scale):
    scaling = Scaling(0.0, None, config.Scale(init=1.0, max=100.0))
    del scaling.logit_scale
    scaling.logit_scale = log_scale
    return scaling()[0]


def test_the_scale_never_passes_its_maximum_and_comes_back():
    above = math.log(100) + 1
    assert ours(torch.tensor([above])).item() == pytest.approx(100, rel=1e-6)
    # The loss wants it lower: it moves.
    assert descend(ours, above, gradient_of_scale=1.0) < math.log(100)
    assert descend(ours, above, gradient_of_scale=-1.0) == pytest.approx(above)  # higher: it stays
    # Below, both ways are free.
    assert descend(ours, 0.0, gradient_of_scale=-1.0) == pytest.approx(2.0, abs=1e-5)
    assert descend(ours, 0.0, gradient_of_scale=1.0) == pytest.approx(-2.0, abs=1e-5)


def test_a_plain_clamp_fails_where_ours_does_not():
    def plain(log_scale):
        return log_scale.clamp(max=math.log(100)).exp()

    above = math.log(100) + 1
    assert descend(plain, above, gradient_of_scale=1.0) == pytest.approx(above)


def test_at_exactly_the_maximum_only_descent_is_free():
    at = math.log(100)
    assert descend(ours, at, gradient_of_scale=1.0, steps=1) < at
    assert descend(ours, at, gradient_of_scale=-1.0, steps=1) == pytest.approx(at)


@pytest.mark.parametrize("learned", [True, False])
def test_scale_and_bias_ignore_casts(learned):
    model = tiny(scale={"init": 100.0, "max": 100.0, "learned": learned}, bias=-10.0)
    assert model.logit_scale.requires_grad is learned and model.logit_bias.requires_grad
    before = model.logit_scale.item()
    pixels, ids = inputs(model)
    exact = model(pixels, ids)
    model.to(torch.bfloat16)
    assert model.visual.conv1.weight.dtype == torch.bfloat16
    assert model.logit_scale.dtype == model.logit_bias.dtype == torch.float32
    assert model.logit_scale.item() == before  # bf16 would have made 100 into 98.9
    rounded = model(pixels, ids)
    assert rounded.image.dtype == rounded.scale.dtype == torch.float32
    torch.testing.assert_close(rounded.image, exact.image, rtol=0, atol=0.03)
    torch.testing.assert_close(rounded.image.norm(dim=1), torch.ones(3))


def test_autocast_keeps_rows_and_scale_in_float32():
    model = tiny(bias=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        features = model(*inputs(model))
    assert {t.dtype for t in features if t is not None} == {torch.float32}
    torch.testing.assert_close(features.text.norm(dim=1), torch.ones(3))


def test_float64_reaches_everything():
    model = tiny(bias=0.0).double()
    pixels, ids = inputs(model)
    assert {t.dtype for t in model(model.pixels(pixels), ids) if t is not None} == {torch.float64}


# ---- what engines and recipes ask of the model


@pytest.mark.parametrize(
    ("keys", "count"),
    [({}, 4), ({"image_tower": {**VIT, "layers": 1}}, 3), ({"image_tower": BLOCKED}, 6)],
)
def test_blocks(keys, count):
    model = tiny(**keys)
    blocks = model.blocks()
    assert len(blocks) == count == len({id(b) for b in blocks})
    inside = {id(p) for b in blocks for p in b.parameters()}
    assert len(inside) > 0.6 * len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["vit", "siglip", "timm", "huggingface"])
def test_activation_checkpointing_recomputes_and_changes_nothing(kind, tmp_path):
    keys = {"vit": {}, "timm": {"image_tower": BLOCKED}}
    if kind == "siglip":
        keys["siglip"] = {"image_tower": siglip(tmp_path), "text_tower": None, "embed_dim": None}
    if kind == "huggingface":
        text = {
            "name": "huggingface",
            "model": str(language_model(tmp_path)),
            "context_length": 12,
            "pretrained": False,
        }
        keys["huggingface"] = {"text_tower": text}
    model = tiny(**keys[kind]).train()  # transformers recomputes in training only
    pixels, ids = inputs(model)
    calls = []
    for block in (model.blocks()[0], model.blocks()[-1]):
        # Recomputed, whoever wraps the block.
        next(block.children()).register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        model.zero_grad()
        features = model(pixels, ids)
        (features.scale * (features.image * features.text.flip(0)).sum()).backward()
        return len(calls), {k: p.grad.clone() for k, p in model.named_parameters()}

    once, plain = gradients()
    recompute_activations(model)
    twice, recomputed = gradients()
    assert (once, twice) == (2, 4)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-5, atol=1e-7)


def test_a_resnet_that_cannot_recompute_says_so():
    model = build(
        settings(
            image_tower={"name": "open_clip", "architecture": "RN50"},
            text_tower=TEXT,
            embed_dim=None,
        )
    )
    with pytest.raises(ValueError, match="activation_checkpointing: false"):
        recompute_activations(model)


def test_a_locked_tower_keeps_weights_and_statistics():
    model = tiny(image_tower=BLOCKED | {"locked": True}).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    features = model(*inputs(model))
    (features.image * features.text).sum().backward()
    learning = [k for k, p in model.named_parameters() if p.requires_grad]
    assert [k for k in learning if k.startswith("visual")] == ["visual.head.proj.weight"]
    assert all(
        p.grad is not None
        for k, p in model.named_parameters()
        if k in learning and not k.startswith("scaling")
    )
    # Running means included.
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    unlocked = tiny(image_tower=BLOCKED).train()
    start = unlocked.visual.trunk.bn1.running_mean.clone()
    unlocked(*inputs(unlocked))
    # Without the lock they do move.
    assert not torch.equal(start, unlocked.visual.trunk.bn1.running_mean)


def test_both_towers_can_be_locked():
    model = tiny(image_tower=VIT | {"locked": True}, text_tower=TEXT | {"locked": True})
    assert [k for k, p in model.named_parameters() if p.requires_grad] == ["scaling.logit_scale"]


def test_patches_are_dropped_in_training_only():
    model = tiny(image_tower=VIT | {"patch_dropout": 0.5})
    pixels, _ = inputs(model)
    full = model(image=pixels).image
    assert torch.equal(full, tiny()(image=pixels).image)
    model.train()
    assert not torch.allclose(full, model(image=pixels).image)


def test_a_copy_is_independent():
    model = tiny(bias=-1.0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.logit_bias.add_(1)
    assert twin.logit_bias.item() == -1


# ---- weights from elsewhere


def weights_file(folder, suffix, **keys):
    """The weights of another seed, as open_clip's own training would leave them."""
    model = tiny(seed=9, **keys)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(50))
    path = folder / f"weights.{suffix}"
    weights = model.open_clip_state_dict()
    if suffix == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, path)
    return model, path


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_pretrained_from_a_file(suffix, tmp_path):
    source, path = weights_file(tmp_path, suffix)
    model = tiny(seed=1, pretrained=str(path))
    assert model(None, None).scale.item() == pytest.approx(50)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_the_openai_layout_is_read(tmp_path):
    """Weights whose text tower lies at the top level, as OpenAI's and most of open_clip's do."""
    source, _ = weights_file(tmp_path, "pt")
    path = tmp_path / "flat.pt"
    torch.save({k.removeprefix("text."): v for k, v in source.open_clip_state_dict().items()}, path)
    assert torch.equal(tiny(pretrained=str(path)).text.text_projection, source.text.text_projection)


def test_bias_and_weights(tmp_path):
    _, without = weights_file(tmp_path, "pt")
    # The weights have none: ours stays.
    assert tiny(bias=-10.0, pretrained=str(without)).logit_bias.item() == -10
    _, biased = weights_file(tmp_path, "safetensors", bias=-7.0)
    assert tiny(bias=-10.0, pretrained=str(biased)).logit_bias.item() == -7
    with pytest.warns(UserWarning, match="set model.bias to keep it"):
        assert tiny(pretrained=str(biased)).logit_bias is None


def test_positions_are_interpolated_for_another_image_size(tmp_path):
    source, path = weights_file(tmp_path, "pt")
    larger = tiny(image_tower=VIT | {"image_size": 48}, pretrained=str(path))
    assert (
        larger.visual.positional_embedding.shape[0] == 37
        and source.visual.positional_embedding.shape[0] == 17
    )
    torch.testing.assert_close(
        larger.visual.positional_embedding[0], source.visual.positional_embedding[0]
    )


def test_weights_that_do_not_fit(tmp_path):
    _, path = weights_file(tmp_path, "pt", image_tower=VIT | {"layers": 3})
    fitting = r"do not fit this model: \d+ of \d+ tensors fit"
    with pytest.raises(ValueError, match=rf"{fitting}; 12 not known here \(visual.*resblocks.2"):
        tiny(pretrained=str(path))


def test_damaged_weights(tmp_path):
    _, path = weights_file(tmp_path, "safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"weights.safetensors is damaged, or no file of weights"):
        tiny(pretrained=str(path))


def test_weights_that_do_not_exist():
    with pytest.raises(
        ValueError, match=r"pretrained: no model 'laion2b': no such file or folder. What works: "
    ):
        tiny(pretrained="laion2b")
    with pytest.raises(ValueError, match="did you mean 'laion400m_e32'"):
        tiny(
            image_tower={"name": "open_clip", "architecture": "ViT-B-32"},
            text_tower=None,
            pretrained="laion400m_e3",
        )


def test_a_tag_of_the_other_activation_names_the_architecture():
    with pytest.raises(ValueError, match="use architecture ViT-B-32-quickgelu"):
        tiny(
            image_tower={"name": "open_clip", "architecture": "ViT-B-32"},
            text_tower=None,
            pretrained="openai",
        )


def test_how_pictures_are_decoded_travels_with_the_model(tmp_path):
    said = Decoding((10, 60, 200), exif=False)
    model = tiny(decoding={"background": [10, 60, 200], "exif": False})
    assert model.image_spec.decoding == said
    assert (
        from_description(json.loads(json.dumps(model.description()))).image_spec == model.image_spec
    )

    folder = str(tmp_path / "out")
    export.export(model, folder)
    assert load(folder).image_spec == model.image_spec
    started = {
        "image_tower": {"name": "open_clip", "architecture": f"local-dir:{folder}"},
        "text_tower": None,
    }
    for keys in ({**started, "embed_dim": None}, {"pretrained": folder}):
        assert tiny(**keys).image_spec.decoding == said
        assert tiny(**keys, decoding={}).image_spec.decoding == ON_WHITE

    earlier = model.description()
    del earlier["preprocess_cfg"]["decoding"]  # as models of before are described
    assert from_description(earlier).image_spec.decoding == ON_WHITE
    with pytest.raises(
        ConfigError, match=r"background is \(300, 0, 0\); expected red, green and blue"
    ):
        tiny(decoding={"background": [300, 0, 0]})


def test_a_description_rebuilds_the_model_without_weights(tmp_path):
    model = tiny(
        image_tower=siglip(tmp_path),
        text_tower=None,
        embed_dim=None,
        bias=-2.0,
        scale={"init": 5.0, "max": 7.0},
    )
    again = from_description(model.description()).eval()
    assert again.image_spec == model.image_spec and again.text_spec == model.text_spec
    assert again.scale_config == model.scale_config
    again.load_state_dict(model.state_dict())
    pixels, ids = inputs(model)
    assert torch.equal(again(pixels, ids).image, model(pixels, ids).image)
