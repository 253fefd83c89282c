"""`vlp.load`: the documented door gives the rows that evaluation sees, and refuses what it cannot
embed.
"""

import subprocess
import sys

import pytest
import torch
from PIL import Image

import vlp
from tests.eval import material
from vlp.eval import models
from vlp.eval.inference import Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return material.tiny_open_clip(tmp_path_factory.mktemp("inference") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return vlp.load(str(folder))


def painted(size, color):
    image = Image.new("RGB", size, color)
    image.paste((0, 0, 0), (0, 0, size[0] // 2, size[1] // 3))
    return image


def test_three_lines_give_the_rows_of_evaluation(model, folder):
    pictures = [painted((40, 30), (200, 10 * i, 60)) for i in range(5)]
    texts = ["a red square", "two dogs", ""]
    encoder = models.load(str(folder))

    # Five of two: the last batch is not full.
    images, rows = model.images(pictures, batch=2), model.texts(texts, batch=2)

    assert isinstance(model, Model)
    assert images.shape == (5, model.width) and rows.shape == (3, model.width)
    assert torch.allclose(images, encoder.encode_images(pictures), atol=1e-6)
    assert torch.allclose(rows, encoder.encode_texts(texts), atol=1e-6)
    assert torch.allclose(images.norm(dim=1), torch.ones(5))
    assert model.scale == encoder.scale


def test_a_path_and_an_image_of_one_picture_are_one_row(model, tmp_path):
    lying = painted((40, 30), (200, 10, 60))

    # What phones write: pixels as the sensor lay, and a note how to turn them.
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    lying.save(tmp_path / "turned.png", exif=exif)

    # Pixels whose colour shows only where they are opaque.
    glass = lying.convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize(lying.size))
    glass.save(tmp_path / "glass.png")

    for name in ("turned.png", "glass.png"):
        path = tmp_path / name
        by_path, by_text, by_image = model.images([path, str(path), Image.open(path)])
        assert torch.allclose(by_path, by_image, atol=1e-6), name
        assert torch.equal(by_path, by_text)
        plain = model.images([Image.open(path).convert("RGB")])[0]
        if name == "glass.png":
            assert not torch.allclose(by_path, plain, atol=1e-3)  # transparency lies on white


def test_no_picture_is_no_row(model):
    assert model.images([]).shape == model.texts([]).shape == (0, model.width)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.texts("a cat"), r"texts: found one \('a cat'\), expected a list"),
        (lambda model: model.images("a.jpg"), r"images: found one \('a.jpg'\), expected a list"),
        (lambda model: model.images(["no.jpg"]), r"image no.jpg does not open \(.*No such file"),
        (lambda model: vlp.load("x", precision="int8"), "precision is 'int8'; expected float32"),
        (lambda model: vlp.load("runs/nowhere"), "runs/nowhere"),
        (lambda model: vlp.load(".", device="banana"), "device is 'banana', which cannot be used"),
        (lambda model: vlp.load(".", device="cuda:99"), "device is 'cuda:99', which cannot be"),
        (lambda model: vlp.load(".", device="meta"), "device is 'meta', which cannot be used"),
        (lambda model: vlp.load(".", device=None), "device is 'None', which cannot be used"),
    ],
)
def test_what_cannot_be_embedded_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_damaged_picture_is_named(model, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.jpg does not open"):
        model.images([tmp_path / "broken.jpg"])


def test_the_door_imports_nothing_before_it_is_opened():
    program = "import sys, vlp; vlp.load; print({'torch', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
