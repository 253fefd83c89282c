"""What a batch carries besides pairs: images of negatives, further views, a teacher's embeddings."""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.data.material import (
    IMAGE,
    TEXT,
    data_of,
    encoded,
    loader_of,
    picture,
    write_shards,
    write_tar,
)
from tests.data.test_loader import take
from vlp.config import Augment, Captions, TextAugment
from vlp.data import decode
from vlp.data.format import ShardWriter, index
from vlp.data.loader import DataError
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards
from vlp.data.wording import STOP_WORDS, SYNONYMS, vary
from vlp.schema import ConfigError
from vlp.types import Batch, ImageSpec

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


VIEWS = {
    "n": 3,
    "augment": {"scale": [0.3, 0.8], "color": 0.4, "grayscale": 0.3, "blur": 0.5, "flip": 0.5},
}


def test_views_are_further_crops_and_wordings_of_the_same_samples(tmp_path):
    caption = "a big photo of the small dog near a street in the forest"
    with ShardWriter(tmp_path) as writer:
        for i in range(12):
            writer.add(None, encoded(picture(i, (80, 70))), "png", [f"{caption} {i}"])
    plain = next(loader_of(data_of(tmp_path), 12))
    ranks = [loader_of(data_of(tmp_path, views=VIEWS), 12, rank=r, world=2) for r in range(2)]
    assert (
        ranks[0].carries == {"image_views", "text_views"}
        and not {"image_views", "text_views"} & plain.carries()
    )
    parts = [next(rank) for rank in ranks]
    whole = next(loader_of(data_of(tmp_path, views=VIEWS), 12))
    for name in ("image", "text", "image_views", "text_views"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(whole.image, plain.image) and torch.equal(
        whole.text, plain.text
    )  # the first view is the one without
    assert (
        whole.image_views.shape == (12, 3, 3, *IMAGE.size)
        and whole.image_views.dtype == torch.uint8
    )
    assert whole.text_views.shape == (12, 3, TEXT.context_length)
    n_texts = 0
    for row in range(12):
        assert (
            len({view.numpy().tobytes() for view in (*whole.image_views[row], whole.image[row])})
            == 4
        )
        n_texts += len({view.numpy().tobytes() for view in whole.text_views[row]})
    assert n_texts > 30
    half = whole.split(2)[1].to("cpu")
    assert torch.equal(half.image_views, whole.image_views[6:]) and torch.equal(
        half.text_views, whole.text_views[6:]
    )
    assert isinstance(half, Batch) and len(half) == 6


def test_gray_and_blur_come_with_their_probability():
    """Blur at 224 px, where σ starts at .1: a twelfth of the draws are too weak to be seen."""
    image = torch.randint(
        0, 256, (3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    whole = {"scale": (1, 1), "ratio": (1, 1)}
    for change, share, seen, n in (
        ("grayscale", 0.3, 0.3, 300),
        ("blur", 0.6, 0.55, 40),
        ("blur", 1.0, 0.92, 25),
    ):
        augment = Augment(**whole, **{change: share})
        views = [
            decode.random_crop(image, ImageSpec((224, 224)), augment, random.Random(i))
            for i in range(n)
        ]
        changed = [view for view in views if not torch.equal(view, image)]
        assert abs(len(changed) - n * seen) < 4.5 * np.sqrt(n * seen * (1 - seen))
        assert change == "blur" or all(torch.equal(view[0], view[2]) for view in changed)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_gaussian(sigma):
    image = torch.randint(
        0, 256, (3, 14, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    radius = int(np.ceil(3 * sigma))
    wide = np.pad(
        image.double().numpy(), ((0, 0), (radius, radius), (radius, radius)), mode="reflect"
    )
    expected, total = np.zeros(image.shape), 0.0
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            weight = np.exp(-(dy**2 + dx**2) / (2 * sigma**2))
            total += weight
            expected += weight * wide[:, radius + dy :, radius + dx :][:, :14, :17]
    assert np.abs(decode.blurred(image, sigma).double().numpy() - expected / total).max() < 0.51


NOTHING = {"stop_words": 0.0, "synonyms": 0.0, "swaps": 0.0, "deletions": 0.0}
CAPTION = "A Big dog, on the street near a wooden house"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, CAPTION),
        ({"stop_words": 1.0}, "Big dog, street near wooden house"),
        ({"synonyms": 1.0}, "A Large hound, on the road beside a wooden home"),
        ({"swaps": 1.0}, "Big dog, on the street near a wooden house A"),
        ({"deletions": 1.0}, CAPTION),  # never empty
        ({"stop_words": 1.0, "synonyms": 1.0}, "Large hound, road beside wooden home"),
    ],
)
def test_each_change_of_wording_does_what_it_says(change, expected):
    assert vary(CAPTION, TextAugment(**{**NOTHING, **change}), random.Random(0)) == expected


def test_changes_of_wording_have_their_probability_and_keep_to_the_words():
    words = CAPTION.split()
    counts = Counter()
    for i in range(2000):
        left = vary(CAPTION, TextAugment(**{**NOTHING, "deletions": 0.2}), random.Random(i)).split()
        assert all(word in words for word in left)
        counts["left"] += len(left)
        counts["swapped"] += (
            vary(CAPTION, TextAugment(**{**NOTHING, "swaps": 0.1}), random.Random(i)).split()
            != words
        )
    assert abs(counts["left"] / 2000 - 0.8 * len(words)) < 0.15
    assert abs(counts["swapped"] / 2000 - (1 - 0.9 ** (len(words) - 1))) < 0.05
    assert vary("", TextAugment(), random.Random(0)) == ""


def test_synonyms_are_mutual_and_after_the_same_article():
    assert len(SYNONYMS) > 90
    for word, others in SYNONYMS.items():
        assert others and word not in others and word not in STOP_WORDS
        for other in others:
            assert word in SYNONYMS[other] and (word[0] in "aeiou") == (other[0] in "aeiou")


def test_wrong_views_are_refused(tmp_path):
    for wrong in (
        {"n": 0},
        {"augment": {"blur": 2}},
        {"text": {"swaps": -0.1}},
        {"text": {"swap": 0.1}},
    ):
        with pytest.raises(ConfigError):
            data_of(tmp_path, views=wrong)


def write_embeddings(
    folder: Path, shards: Path, *, model: str = "teacher", scale: float = 50.0, width: int = 6
) -> Path:
    """As `vlp data embed` writes them: row i of a shard says which shard and sample it belongs to."""
    folder.mkdir()
    for s, path in enumerate(sorted(shards.glob("*.tar"))):
        with tarfile.open(path) as tar:
            keys = list(dict.fromkeys(name.split(".")[0] for name in tar.getnames()))
        rows = np.stack([np.full(width, s * 1000 + i, np.float16) for i in range(len(keys))])
        about = {
            "model": model,
            "scale": str(scale),
            "keys": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
        }
        save_file({"image": rows, "text": -rows}, folder / f"{path.stem}.safetensors", about)
    return folder


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("embedded")
    with ShardWriter(folder / "shards", 7) as writer:
        for i in range(18):
            writer.add(
                f"k{i:02d}",
                encoded(picture(i)),
                "png",
                [] if i in (0, 9) else [f"one {i}", f"two {i}"],
            )
    return folder / "shards", write_embeddings(folder / "teacher", folder / "shards")


def test_a_teachers_embeddings_come_with_their_samples(embedded):
    shards, teacher = embedded
    source = {"name": "shards", "path": str(shards), "embeddings": str(teacher)}
    first = {"missing": "drop", "choose": "first"}
    for workers in (0, 1):
        loader = loader_of(data_of(source, captions=first, workers=workers), 8)
        assert loader.teacher_scale == 50.0 and loader.carries == {"teacher_image", "teacher_text"}
        n = 0
        for batch in take(loader, 4):
            assert batch.teacher_image.dtype == batch.teacher_text.dtype == torch.float32
            for key, image, words in zip(batch.key, batch.teacher_image, batch.teacher_text):
                shard, place = divmod(int(key[1:]), 7)
                assert torch.equal(image, torch.full((6,), shard * 1000.0 + place)) and torch.equal(
                    words, -image
                )
                n += 1
        assert n == 32
    assert loader_of(data_of(shards, captions=first), 8).teacher_scale is None
    loader = loader_of(
        data_of(source, captions={"missing": "drop"}), 8
    )  # other captions than the embedded ones
    assert (
        loader.carries == {"teacher_image"} and "teacher_text is left out" in loader.problems()[-1]
    )


def test_a_picture_that_did_not_open_for_the_teacher_is_replaced_even_without_pixels(tmp_path):
    shards = write_shards(tmp_path / "shards", 24, 24)
    source = {
        "name": "shards",
        "path": str(shards),
        "embeddings": str(write_embeddings(tmp_path / "teacher", shards)),
    }
    for pixels in (False, True):  # row 0 is zero
        loader = loader_of(data_of(source), 24, pixels=pixels)
        batch = next(loader)
        assert batch.teacher_image.any(1).all() and 0 not in batch.sample_id
        [(i, _, reason)] = loader.bad
        assert i == 0 and "its picture did not open" in reason


def test_embeddings_that_do_not_fit_are_refused_by_name(embedded, tmp_path):
    shards, teacher = embedded
    captions = {"missing": "drop"}

    def opened(embeddings: Path, *others: dict):
        source = {"name": "shards", "path": str(shards), "embeddings": str(embeddings)}
        return loader_of(data_of(source, *others, captions=captions), 4)

    with pytest.raises(
        ValueError, match=r"none/00000.safetensors holds no embeddings.*vlp data embed.*00000.tar"
    ):
        opened(tmp_path / "none")
    with ShardWriter(tmp_path / "other", 7) as writer:
        for i in range(18):
            writer.add(f"other{i}", encoded(picture(i)), "png", ["x"])
    with pytest.raises(
        ValueError,
        match=r"00000.safetensors holds .* for other samples than the 7 of 00000.tar.*vlp data embed",
    ):
        opened(write_embeddings(tmp_path / "others", tmp_path / "other"))
    mixed = write_embeddings(tmp_path / "mixed", shards, scale=20.0)
    (mixed / "00001.safetensors").write_bytes((teacher / "00001.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"are of several models.*scale=20.*scale=50"):
        opened(mixed)
    with pytest.raises(ValueError, match=r"embeddings are of different models.*None"):
        opened(teacher, {"name": "shards", "path": str(tmp_path / "other")})
    (mixed / "00000.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="holds no embeddings"):
        opened(mixed)
    source = {"name": "shards", "path": f"{shards}::{shards}", "embeddings": str(teacher)}
    with pytest.raises(ValueError, match="several shards have one name"):
        loader_of(data_of(source, captions=captions), 4)


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
    (tmp_path / "_index.bin").write_bytes(whole.replace(b"vlp shard index 4", b"vlp shard index 3"))
    shards = index(sorted(tmp_path.glob("*.tar")))
    assert capsys.readouterr().err.count("is of an older version, without digests") == 1
    assert (tmp_path / "_index.bin").read_bytes() == whole
    assert shards[0].keys == hashlib.sha256(b"k0\nk1\nk2\nk3\nk4").hexdigest() and json.loads(
        json.dumps(shards[1].keys)
    )
