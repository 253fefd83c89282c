"""Pictures are shown upright: every orientation in every format, in crops, with damaged Exif."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.data.material import encoded, picture
from tests.data.test_picture import PHOTO, assert_all_see, every_reader, pixels, turned
from vlp.config import Augment
from vlp.data import decode
from vlp.data.picture import array, header
from vlp.types import Decoding, ImageSpec

AS_STORED = Decoding(exif=False)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pictures_are_turned_as_their_exif_says(name):
    n_turned = 0
    for orientation in range(1, 9):
        data = turned(orientation, name)
        upright = pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert_all_see(data, upright)
        seen = header(data)
        assert (seen.height, seen.width) == upright.shape[:2]
        assert seen.turned == (orientation != 1)
        n_turned += seen.turned
        if name == "TIFF":  # its orientation is no Exif, but what the format says
            continue
        stored = pixels(Image.open(io.BytesIO(data)))
        assert stored.shape == (40, 50, 3)
        assert_all_see(data, stored, AS_STORED)
        assert header(data, AS_STORED)[:2] == (50, 40)
    assert n_turned == 7


def test_an_orientation_in_xmp_counts_as_pillow_counts_it():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(PHOTO, "JPEG", xmp=xmp)
    upright = pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert upright.shape == (50, 40, 3)
    assert_all_see(data, upright)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_crops_show_the_same_part_of_a_turned_picture(orientation, scaled):
    """The crop of a picture stored turned is that of the same picture stored upright."""
    image = picture(4, (640, 480))
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    by_exif = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's numbers of the transpositions
    stored = image if orientation == 1 else image.transpose(Image.Transpose(by_exif[undo]))
    data = turned(orientation, image=stored)
    assert np.abs(array(data).astype(int) - np.asarray(image)).mean() < 4
    spec, augment = ImageSpec((56, 56)), Augment(scale=(0.5, 1.0), scaled_decoding=scaled)
    n_crops = 0
    for seed in range(5):
        expected = decode.random_crop(
            torch.from_numpy(np.array(image)).permute(2, 0, 1), spec, augment, random.Random(seed)
        )
        found = decode.train_transform(data, spec, augment, random.Random(seed))
        difference = (found.int() - expected.int()).abs().float().mean()
        assert difference < (found.int() - expected.flip(-1).int()).abs().float().mean() / 4
        assert difference < (found.int() - expected.roll(3, -1).int()).abs().float().mean()
        n_crops += 1
    assert n_crops == 5


@pytest.mark.parametrize("name", ["JPEG", "MPO", "PNG", "WEBP"])
def test_damaged_exif_never_costs_the_picture(name):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    options = {"WEBP": {"lossless": True}, "MPO": {"save_all": True, "append_images": [PHOTO]}}.get(
        name, {}
    )
    data = encoded(PHOTO, name, exif=exif, **options)
    start, size = data.index(b"MM\0*"), len(exif.tobytes()) - len(b"Exif\0\0")
    chance = random.Random(0)
    n_upright = 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(chance.randrange(1, 6)):
            damaged[start + chance.randrange(size)] = chance.randrange(256)
        if name == "PNG":
            at = data.index(b"eXIf")
            length = int.from_bytes(data[at - 4 : at], "big")
            damaged[at + 4 + length : at + 8 + length] = struct.pack(
                ">I", zlib.crc32(damaged[at : at + 4 + length])
            )
        seen = every_reader(bytes(damaged))
        assert all(np.array_equal(found, seen[0]) for found in seen)
        assert seen[0].shape in ((50, 40, 3), (40, 50, 3))
        n_upright += seen[0].shape == (50, 40, 3)
    assert 20 < n_upright < 200  # some lost their orientation, and not all
