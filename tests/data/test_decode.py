"""Pixels: training crops against Pillow's, evaluation against open_clip's, the distribution of crops against torchvision's."""

from __future__ import annotations

import io
import random
import tarfile
import zlib

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from tests.data.material import REAL, encoded, needs_data, picture
from vlp.config import Augment
from vlp.data import decode
from vlp.types import ImageSpec

SPEC = ImageSpec((224, 224))


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    with tarfile.open(REAL / "coco_open.tar") as tar:
        return [tar.extractfile(member).read() for member in tar.getmembers()[:24]]


def pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@needs_data
def test_decoded_photos_equal_pillows_bit_for_bit(photos):
    for data in photos:
        assert torch.equal(decode.decode(data), pixels(pillow(data)))


@needs_data
@pytest.mark.parametrize("size", [224, 64])
def test_training_crops_are_within_a_level_of_pillows(photos, size):
    augment = Augment(scale=(0.3, 1.0))
    errors = []
    for i, data in enumerate(photos):
        image = pillow(data)
        top, left, h, w = decode.crop_box(image.height, image.width, augment, random.Random(i))
        expected = pixels(image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC))
        ours = decode.train(data, ImageSpec((size, size)), augment, random.Random(i))
        assert ours.dtype == torch.uint8 and ours.shape == (3, size, size)
        errors.append((ours.int() - expected.int()).abs().float().mean().item())
        moved = pixels(image.crop((left + 3, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC))
        assert (ours.int() - moved.int()).abs().float().mean() > 1  # the measure sees a crop that is three pixels off
    assert max(errors) < 0.5 and np.mean(errors) < 0.1


@pytest.mark.parametrize("size", [(480, 640), (300, 200), (30, 400)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
def test_crops_have_torchvisions_distribution(size, scale):
    augment, n = Augment(scale=scale), 4000
    torch.manual_seed(0)
    chance = random.Random(0)
    blank = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), list(augment.ratio)) for _ in range(n)])
    ours = np.array([decode.crop_box(*size, augment, chance) for _ in range(n)])
    for column in range(4):
        both = np.sort(np.concatenate([theirs[:, column], ours[:, column]]))
        distance = np.abs(
            np.searchsorted(np.sort(theirs[:, column]), both, "right") - np.searchsorted(np.sort(ours[:, column]), both, "right")
        )
        assert distance.max() / n < 0.045, column  # Kolmogorov–Smirnov: 1.95·√(2/n) = 0.044 at p = 0.001
    wrong = np.array([decode.crop_box(*size, Augment(scale=(scale[0] * 0.7, 1.0)), chance) for _ in range(n)])
    if size == (480, 640):
        assert abs(wrong[:, 2].mean() - theirs[:, 2].mean()) > 3 * abs(ours[:, 2].mean() - theirs[:, 2].mean())


@needs_data
@pytest.mark.parametrize(("size", "shrink"), [(200, 2), (100, 4), (40, 8), (400, 1)])
def test_scaled_decoding_shows_the_same_crop_of_fewer_pixels(photos, size, shrink, monkeypatch):
    used, real = [], decode.decode_jpeg

    def spied(data, **options):
        used.append(options["min_factor"])
        return real(data, **options)

    monkeypatch.setattr(decode, "decode_jpeg", spied)
    spec, errors = ImageSpec((size, size)), []
    for i, data in enumerate(photos):
        full, scaled = (decode.train(data, spec, Augment(scaled_decoding=on), random.Random(i)).int() for on in (False, True))
        errors.append((full - scaled).abs().float().mean().item())
        assert errors[-1] < (full - full.roll(2, -1)).abs().float().mean()  # what a crop two pixels off would come to
    assert max(used) == shrink and used.count(shrink) > len(photos) / 2
    assert np.mean(errors) < (5 if shrink > 1 else 1e-9)


def test_pictures_that_cannot_be_scaled_while_decoding_are_what_they_were():
    for data in (encoded(picture(1, (200, 160))), encoded(picture(1, (200, 160)).convert("CMYK"), "JPEG")):
        crops = [decode.train(data, ImageSpec((32, 32)), Augment(scaled_decoding=on), random.Random(0)) for on in (False, True)]
        assert torch.equal(*crops)


@needs_data
@pytest.mark.parametrize("size", [(224, 224), (64, 64), (96, 160), (160, 96)])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_pixels_equal_open_clips(photos, size, resize, interpolation):
    theirs = image_transform(size, False, (0.0,) * 3, (1.0,) * 3, resize_mode=resize, interpolation=interpolation)
    spec = ImageSpec(size, interpolation=interpolation, resize=resize)
    images = [pillow(data) for data in photos[:4]] + [picture(3, (37, 91)), picture(4, (300, 31)), picture(5, size[::-1])]
    for image in images:
        expected = (theirs(image) * 255).round().to(torch.uint8)
        assert torch.equal(decode.evaluate(image, spec), expected)
    assert torch.equal(decode.evaluate(photos[0], spec), decode.evaluate(pillow(photos[0]), spec))


def test_a_crop_is_a_function_of_its_seed():
    data, augment = encoded(picture(2, (90, 80)), "JPEG"), Augment(scale=(0.2, 1), flip=0.5, color=0.4)
    one, same, other = (decode.train(data, ImageSpec((32, 32)), augment, random.Random(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_flips_and_colors_follow_their_settings():
    data, whole = encoded(picture(2, (32, 32))), {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    plain = decode.train(data, ImageSpec((32, 32)), Augment(**whole), random.Random(0))
    assert torch.equal(plain, pixels(picture(2, (32, 32))))
    flipped = [decode.train(data, ImageSpec((32, 32)), Augment(**whole, flip=0.25), random.Random(s)) for s in range(400)]
    n_flipped = sum(torch.equal(image, plain.flip(-1)) for image in flipped)
    assert 70 < n_flipped < 130 and n_flipped + sum(torch.equal(image, plain) for image in flipped) == 400
    colored = decode.train(data, ImageSpec((32, 32)), Augment(**whole, color=0.5), random.Random(0))
    assert not torch.equal(colored, plain)


@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1", "I;16", "animated", "exif", "mislabelled"])
def test_unusual_pictures_decode_as_pillow_converts_them(kind):
    image = picture(1, (50, 40))
    if kind == "I;16":
        gray = np.asarray(image.convert("L")).astype(np.uint16)
        data, expected = encoded(Image.fromarray(gray * 257)), Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    elif kind == "animated":
        data = encoded(image, "WEBP", save_all=True, append_images=[ImageOps.invert(image)], lossless=True)
        expected = image
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its side; open_clip leaves it so, and evaluation must see what training saw
        data = encoded(image, "JPEG", exif=exif)
        expected = pillow(data)
        assert expected.size == (50, 40)
    elif kind == "mislabelled":  # told by content: nothing here looks at names
        data = encoded(image, "BMP")
        expected = image
    else:
        converted = image.convert(kind)
        if kind in ("RGBA", "LA"):
            converted.putalpha(40)
        data = encoded(converted, "JPEG" if kind in ("CMYK", "L") else "PNG")
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert torch.equal(decode.decode(data), pixels(expected))
    assert torch.equal(decode.evaluate(data, ImageSpec((40, 50), resize="squash")), pixels(expected))


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60,000 × 60,000 pixels."""
    data = bytearray(encoded(picture(1)))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def half(kind: str) -> bytes:
    data = encoded(picture(1, (200, 160)), kind)
    return data[: len(data) // 2]


JPEG = encoded(picture(1, (200, 160)), "JPEG")
BROKEN = {
    "empty": b"", "text": b"<html>404</html>", "zeros": bytes(5000), "pickle": b"\x80\x04\x95\x10", "bomb": bomb(),
    "half jpeg": half("JPEG"), "no end": JPEG[:-2], "header only": JPEG[:300], "half png": half("PNG"), "half webp": half("WEBP"),
    "half gif": half("GIF"), "half bmp": half("BMP"), "tiff": encoded(picture(1), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_refused_never_half_shown(name):
    for action in (decode.decode, lambda data: decode.evaluate(data, SPEC)):
        with pytest.raises(decode.BadImage, match=r"\w+"):
            action(BROKEN[name])
