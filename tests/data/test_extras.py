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
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards

PLAIN = {"scale": [1, 1], "ratio": [40 / 36, 40 / 36]}  # the whole picture


def write_pictured(folder: Path, n: int = 8) -> Path:
    """Sample i has two negatives; the even ones a picture of the first, of another colour."""
    with ShardWriter(folder, 5) as writer:
        for i in range(n):
            extra = {} if i % 2 else {"negative_image": (encoded(picture(100 + i)), "png")}
            writer.add(
                f"k{i}",
                encoded(picture(i)),
                "png",
                [f"text {i}"],
                {"negatives": [f"not {i}", "nor this"]},
                **extra,
            )
    return folder


def test_images_of_negatives_come_with_them_and_mask_the_first_where_they_lack(tmp_path):
    data = data_of(write_pictured(tmp_path), augment=PLAIN)
    loader = loader_of(data, 8)
    assert (
        "negative_image" in loader.carries
        and "first negative of 4 samples is masked" in loader.problems()[0]
    )

    batch = next(loader)
    assert (
        batch.negative_image.shape == batch.image.shape
        and batch.negative_image.dtype == torch.uint8
    )

    for row, key in enumerate(batch.key):
        i = int(key[1:])
        assert batch.negatives_valid[row].tolist() == [i % 2 == 0, True]

        expected = (
            decode.train_transform(encoded(picture(100 + i)), IMAGE, data.augment, random.Random(0))
            if i % 2 == 0
            else 0
        )
        assert (batch.negative_image[row].int() - expected).abs().max() == 0
        assert (batch.image[row] != batch.negative_image[row]).any()
    without = data_of(write_shards_without_pictures(tmp_path / "without"))
    assert next(
        loader_of(without, 8)
    ).negatives_valid.all()  # no images of negatives at all: nothing to mask


def write_shards_without_pictures(folder: Path) -> Path:
    with ShardWriter(folder) as writer:
        for i in range(8):
            writer.add(None, encoded(picture(i)), "png", ["x"], {"negatives": ["a", "b"]})
    return folder


def test_images_of_negatives_have_crops_of_their_own(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for i in range(4):
            image = encoded(picture(i))
            writer.add(
                None, image, "png", ["x"], {"negatives": ["y"]}, negative_image=(image, "png")
            )
    batch = next(loader_of(data_of(tmp_path, augment={"scale": [0.2, 0.5]}), 4))
    assert all((a != b).any() for a, b in zip(batch.image, batch.negative_image))


def test_members_of_negatives_lie_beside_the_image_and_come_back(tmp_path):
    write_pictured(tmp_path)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert tar.getnames()[:5] == ["k0.png", "k0.negative.png", "k0.txt", "k0.json", "k1.png"]
    source = open_shards(Options(str(tmp_path)), Captions())
    assert [source[i].negative_image for i in range(8)] == [
        b"" if i % 2 else encoded(picture(100 + i)) for i in range(8)
    ]

    foreign = [
        ("a.txt", b"x"),
        ("a.negative.PNG", encoded(picture(1))),
        ("a.negative.txt", b"no"),
        ("a.png", encoded(picture(2))),
    ]
    source = open_shards(
        Options(str(write_tar(tmp_path / "foreign" / "0.tar", foreign))), Captions()
    )
    assert (source[0].negative_image, source[0].captions) == (encoded(picture(1)), ("x",))
    with ShardWriter(tmp_path / "w") as writer, pytest.raises(ValueError, match="image type 'psd'"):
        writer.add(None, encoded(picture(1)), "png", ["x"], negative_image=(b"x", "psd"))


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
                negative_image=(image, "png"),
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

    newer = whole.replace(b"index 5", b"index 61", 1)
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
