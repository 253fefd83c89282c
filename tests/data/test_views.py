"""Further views of a sample: crops, gray, blur and other wordings."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from tests.data.material import IMAGE, TEXT, data_of, encoded, loader_of, picture
from vlp.config import Augment, TextAugment
from vlp.data import decode
from vlp.data.format import ShardWriter
from vlp.data.wording import STOP_WORDS, SYNONYMS, vary
from vlp.schema import ConfigError
from vlp.types import Batch, ImageSpec

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
    # The first view is the one without.
    assert torch.equal(whole.image, plain.image) and torch.equal(whole.text, plain.text)
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
