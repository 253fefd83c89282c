"""Images of negatives, the budget of bad samples, and an index of an older version."""

from __future__ import annotations

import hashlib
import json
import random
import re
import tarfile
from pathlib import Path

import pytest
import torch

from tests.data.material import IMAGE, data_of, encoded, loader_of, picture, write_tar
from tests.data.test_loader import take
from vlp.config import Captions
from vlp.data import decode
from vlp.data.format import ShardWriter, index
from vlp.data.loader import DataError
from vlp.data.members import Picture
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards

PLAIN = {"scale": [1, 1], "ratio": [40 / 36, 40 / 36]}  # the whole picture


def write_pictured(folder: Path, n: int = 8) -> Path:
    """Sample i has two negatives; the even ones pictures, of other colours, of the first or, every
    fourth, of both.
    """
    with ShardWriter(folder, 5) as writer:
        for i in range(n):
            n_pictures = (2, 0, 1, 0)[i % 4]
            images = {k: Picture(negative(i, k), "png") for k in range(n_pictures)}
            writer.add(
                f"k{i}",
                encoded(picture(i)),
                "png",
                [f"text {i}"],
                {"negatives": [f"not {i}", "nor this"]},
                negative_images=images,
            )
    return folder


def negative(i: int, k: int) -> bytes:
    return encoded(picture(100 + 10 * k + i))


@pytest.mark.parametrize("most, width", [(1, 1), (2, 2), (5, 2)])
def test_images_come_beside_their_negatives_and_are_masked_where_they_lack(tmp_path, most, width):
    data = data_of(write_pictured(tmp_path), augment=PLAIN, negative_images=most)
    loader = loader_of(data, 8)
    assert {"negative_images", "negative_images_valid"} <= loader.carries

    batch = next(loader)
    assert batch.negative_images.shape == (8, width, *batch.image.shape[1:])
    assert batch.negative_images.dtype == torch.uint8
    assert batch.negatives_valid.all()

    n_shown = 0
    for row, key in enumerate(batch.key):
        i = int(key[1:])
        for k in range(width):
            shown = k < (2, 0, 1, 0)[i % 4]
            assert batch.negative_images_valid[row, k] == shown
            expected = 0
            if shown:
                expected = decode.train_transform(
                    negative(i, k), IMAGE, data.augment, random.Random(0)
                )
                n_shown += 1
            assert (batch.negative_images[row, k].int() - expected).abs().max() == 0
    assert n_shown == {1: 4, 2: 6}[width]


def test_images_of_negatives_are_decoded_only_where_they_are_read(tmp_path):
    data = data_of(write_pictured(tmp_path))
    captions = frozenset({"image", "text", "negatives", "negatives_valid"})
    batch = next(loader_of(data, 8, reads=captions))
    assert batch.negative_images is None and batch.negatives is not None
    assert next(loader_of(data, 8, reads=captions | {"negative_images"})).negative_images.any()


def test_images_of_negatives_have_crops_of_their_own(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for i in range(4):
            image = encoded(picture(i))
            images = {0: Picture(image, "png")}
            writer.add(None, image, "png", ["x"], {"negatives": ["y"]}, negative_images=images)
    batch = next(loader_of(data_of(tmp_path, augment={"scale": [0.2, 0.5]}), 4))
    assert all((a != b).any() for a, b in zip(batch.image, batch.negative_images[:, 0]))


def test_members_of_negatives_lie_beside_the_image_and_come_back(tmp_path):
    write_pictured(tmp_path)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        negatives = ["k0.negative.png", "k0.negative.1.png"]
        assert tar.getnames()[:6] == ["k0.png", *negatives, "k0.txt", "k0.json", "k1.png"]
    source = open_shards(Options(str(tmp_path)), Captions())
    assert [source[i].negative_images for i in range(4)] == [
        {0: negative(0, 0), 1: negative(0, 1)},
        {},
        {0: negative(2, 0)},
        {},
    ]

    foreign = [
        ("a.txt", b"x"),
        ("a.negative.PNG", encoded(picture(1))),
        ("a.negative.txt", b"no"),
        ("a.Negative.02.png", encoded(picture(3))),
        ("a.png", encoded(picture(2))),
    ]
    source = open_shards(
        Options(str(write_tar(tmp_path / "foreign" / "0.tar", foreign))), Captions()
    )
    assert source[0].negative_images == {0: encoded(picture(1)), 2: encoded(picture(3))}
    assert source[0].captions == ("x",)
    with ShardWriter(tmp_path / "w") as writer, pytest.raises(ValueError, match="image type 'psd'"):
        unknown = {0: Picture(b"x", "psd")}
        writer.add(None, encoded(picture(1)), "png", ["x"], negative_images=unknown)


def test_a_negative_image_that_does_not_open_replaces_the_sample(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for i in range(6):
            image = encoded(picture(i)) if i else b"broken"
            writer.add(
                f"k{i}",
                encoded(picture(i)),
                "png",
                ["x"],
                {"negatives": ["y"]},
                negative_images={0: Picture(image, "png")},
            )
    image = encoded(picture(1))
    empty = [
        ("0.png", image),
        ("0.negative.png", b""),
        ("0.txt", b"x"),
        ("1.png", image),
        ("1.txt", b"x"),
    ]
    loader = loader_of(data_of(tmp_path), 5)
    keys = [key for batch in take(loader, 6) for key in batch.key]
    assert "k0" not in keys and {key for _, key, _ in loader.bad} == {"k0"}

    [shard] = index([write_tar(tmp_path / "e" / "0.tar", empty)])
    assert shard.count == 1 and "a negative image of 0 bytes" in shard.problems[0]


def test_the_error_budget_is_configured(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for i in range(200):
            writer.add(None, encoded(picture(i, (8, 8))) if i % 4 else b"bad", "png", ["x"])
    assert len(take(loader_of(data_of(tmp_path, bad_share=0.6), 20), 10)) == 10
    with pytest.raises(DataError, match="samples could not be used"):
        take(loader_of(data_of(tmp_path, bad_share=0.01), 20), 10)


def test_an_old_index_is_made_anew(tmp_path, capsys):
    write_pictured(tmp_path)
    whole = (tmp_path / "_index.bin").read_bytes()
    older = re.sub(rb"(?<=vlp shard index )\d+", b"2", whole, count=1)
    assert older != whole

    (tmp_path / "_index.bin").write_bytes(older)
    shards = index(sorted(tmp_path.glob("*.tar")))
    assert capsys.readouterr().err.count("is of an older version, without digests") == 1
    assert (tmp_path / "_index.bin").read_bytes() == whole

    newer = whole.replace(b"index 6", b"index 61", 1)
    assert newer != whole
    (tmp_path / "_index.bin").write_bytes(newer)
    assert len(index(sorted(tmp_path.glob("*.tar")))) == len(shards)
    assert capsys.readouterr().err.count("is of a newer version") == 1

    # Of this version, but with a label that this one does not know.
    (tmp_path / "_index.bin").write_bytes(whole.replace(b"\n", b" trust\n", 1))
    assert len(index(sorted(tmp_path.glob("*.tar")))) == len(shards)
    assert capsys.readouterr().err.count("is of a version that knows other labels") == 1

    assert shards[0].keys == hashlib.sha256(b"k0\nk1\nk2\nk3\nk4").hexdigest() and json.loads(
        json.dumps(shards[1].keys)
    )
