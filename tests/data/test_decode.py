"""Pixels: training crops against Pillow's, evaluation against open_clip's, the distribution of
crops against torchvision's.
"""

from __future__ import annotations

import io
import random
import resource
import tarfile
import time

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from tests.data.material import REAL, encoded, needs_data, picture
from vlp.config import Augment
from vlp.data import decode
from vlp.data import picture as picture_module
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
        expected = pixels(
            image.crop((left, top, left + w, top + h)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
        )
        ours = decode.train_transform(data, ImageSpec((size, size)), augment, random.Random(i))
        assert ours.dtype == torch.uint8 and ours.shape == (3, size, size)
        errors.append((ours.int() - expected.int()).abs().float().mean().item())
        moved = pixels(
            image.crop((left + 3, top, left + w, top + h)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
        )
        assert (
            ours.int() - moved.int()
        ).abs().float().mean() > 1  # the measure sees a crop that is three pixels off
    assert max(errors) < 0.5 and np.mean(errors) < 0.1


@pytest.mark.parametrize("size", [(480, 640), (300, 200), (30, 400)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
def test_crops_have_torchvisions_distribution(size, scale):
    augment, n = Augment(scale=scale), 4000
    torch.manual_seed(0)
    chance = random.Random(0)
    blank = torch.empty(3, *size)
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, list(scale), list(augment.ratio)) for _ in range(n)]
    )
    ours = np.array([decode.crop_box(*size, augment, chance) for _ in range(n)])
    for column in range(4):
        both = np.sort(np.concatenate([theirs[:, column], ours[:, column]]))
        distance = np.abs(
            np.searchsorted(np.sort(theirs[:, column]), both, "right")
            - np.searchsorted(np.sort(ours[:, column]), both, "right")
        )
        # Kolmogorov–Smirnov: 1.95·√(2/n) = 0.044 at p = 0.001.
        assert distance.max() / n < 0.045, column
    wrong = np.array(
        [decode.crop_box(*size, Augment(scale=(scale[0] * 0.7, 1.0)), chance) for _ in range(n)]
    )
    if size == (480, 640):
        assert abs(wrong[:, 2].mean() - theirs[:, 2].mean()) > 3 * abs(
            ours[:, 2].mean() - theirs[:, 2].mean()
        )


@needs_data
@pytest.mark.parametrize(("size", "shrink"), [(200, 2), (100, 4), (40, 8), (400, 1)])
def test_scaled_decoding_shows_the_same_crop_of_fewer_pixels(photos, size, shrink, monkeypatch):
    used, real = [], picture_module.decode_jpeg

    def spied(data, **options):
        used.append(options["min_factor"])
        return real(data, **options)

    monkeypatch.setattr(picture_module, "decode_jpeg", spied)
    spec, errors = ImageSpec((size, size)), []
    for i, data in enumerate(photos):
        full, scaled = (
            decode.train_transform(data, spec, Augment(scaled_decoding=on), random.Random(i)).int()
            for on in (False, True)
        )
        errors.append((full - scaled).abs().float().mean().item())
        # What a crop two pixels off would come to.
        assert errors[-1] < (full - full.roll(2, -1)).abs().float().mean()
    assert max(used) == shrink and used.count(shrink) > len(photos) / 2
    assert np.mean(errors) < (5 if shrink > 1 else 1e-9)


def test_pictures_that_cannot_be_scaled_while_decoding_are_what_they_were():
    for data in (
        encoded(picture(1, (200, 160))),
        encoded(picture(1, (200, 160)).convert("CMYK"), "JPEG"),
    ):
        crops = [
            decode.train_transform(
                data, ImageSpec((32, 32)), Augment(scaled_decoding=on), random.Random(0)
            )
            for on in (False, True)
        ]
        assert torch.equal(*crops)


@needs_data
@pytest.mark.parametrize("size", [(224, 224), (64, 64), (96, 160), (160, 96)])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_pixels_equal_open_clips(photos, size, resize, interpolation):
    theirs = image_transform(
        size, False, (0.0,) * 3, (1.0,) * 3, resize_mode=resize, interpolation=interpolation
    )
    spec = ImageSpec(size, interpolation=interpolation, resize=resize)
    images = [pillow(data) for data in photos[:4]] + [
        picture(3, (37, 91)),
        picture(4, (300, 31)),
        picture(5, size[::-1]),
    ]
    for image in images:
        expected = (theirs(image) * 255).round().to(torch.uint8)
        assert torch.equal(decode.eval_transform(image, spec), expected)
    assert torch.equal(
        decode.eval_transform(photos[0], spec), decode.eval_transform(pillow(photos[0]), spec)
    )


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize(
    "size",
    [
        (700, 20),
        (20, 700),
        (999, 7),
        (7, 999),
        (13, 5001),
        (3000, 2),
        (2, 3000),
        (997, 31),
        (1, 400),
    ],
)
@pytest.mark.parametrize("target", [(64, 64), (48, 64), (64, 48)])
def test_thin_pictures_are_cut_before_they_are_enlarged_and_look_the_same(size, target):
    """Within a level of open_clip's transform, which enlarges first: what is rounded in between is
    not quite the same.
    """
    for interpolation in ("bicubic", "bilinear"):
        theirs = image_transform(
            target,
            False,
            (0.0,) * 3,
            (1.0,) * 3,
            resize_mode="shortest",
            interpolation=interpolation,
        )
        expected = (theirs(noise(*size)) * 255).round().to(torch.uint8)
        found = decode.eval_transform(noise(*size), ImageSpec(target, interpolation=interpolation))
        assert found.shape == expected.shape
        assert (found.int() - expected.int()).abs().max() <= 1
        assert (found != expected).float().mean() < 0.02


@pytest.mark.parametrize("size", [(30_000, 2), (2, 30_000), (65_535, 1)])
def test_extreme_shapes_cost_no_gigabytes(size):
    data, spec = encoded(Image.new("RGB", size, (9, 8, 7))), ImageSpec((224, 224))
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    seen = [
        decode.eval_transform(data, spec),
        decode.train_transform(data, spec, Augment(), random.Random(0)),
    ]
    seen.append(pixels(decode.middle(pillow(data)).resize((224, 224))))
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400_000  # kB
    for image in seen:
        assert torch.equal(
            image, torch.tensor([9, 8, 7], dtype=torch.uint8).view(3, 1, 1).expand(3, 224, 224)
        )


@pytest.mark.parametrize("size", [(700, 20), (20, 701), (999, 7), (8, 1500), (600, 31), (37, 91)])
def test_the_middle_is_what_transforms_that_cut_the_centre_look_at(size):
    theirs = image_transform(
        (64, 64), False, (0.0,) * 3, (1.0,) * 3, resize_mode="shortest", interpolation="bicubic"
    )
    image = picture(3, size)
    part = decode.middle(image)
    if max(size) <= 16 * min(size):
        assert part is image
        return
    assert min(part.size) == min(size) and 16 * min(size) <= max(part.size) <= 16 * min(size) + 1
    whole, cut = theirs(image), theirs(part)
    along = -1 if size[0] > size[1] else -2
    aside = min((whole - cut.roll(shift, along)).abs().mean() for shift in (-2, 2))
    assert (whole - cut).abs().mean() < max(0.02, aside / 2)


def test_a_crop_is_a_function_of_its_seed():
    data, augment = (
        encoded(picture(2, (90, 80)), "JPEG"),
        Augment(scale=(0.2, 1), flip=0.5, color=0.4),
    )
    one, same, other = (
        decode.train_transform(data, ImageSpec((32, 32)), augment, random.Random(s))
        for s in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_flips_and_colors_follow_their_settings():
    data, whole = encoded(picture(2, (32, 32))), {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    plain = decode.train_transform(data, ImageSpec((32, 32)), Augment(**whole), random.Random(0))
    assert torch.equal(plain, pixels(picture(2, (32, 32))))
    flipped = [
        decode.train_transform(
            data, ImageSpec((32, 32)), Augment(**whole, flip=0.25), random.Random(s)
        )
        for s in range(400)
    ]
    n_flipped = sum(torch.equal(image, plain.flip(-1)) for image in flipped)
    assert (
        70 < n_flipped < 130
        and n_flipped + sum(torch.equal(image, plain) for image in flipped) == 400
    )
    colored = decode.train_transform(
        data, ImageSpec((32, 32)), Augment(**whole, color=0.5), random.Random(0)
    )
    assert not torch.equal(colored, plain)
