"""What latent translation equals in special cases, how it takes samples that lack a modality, and
what it refuses.

test_family.py has its values and gradients against loops, tests/test_modalities.py its heads.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.losses.family_data import OTHERS, data
from vlp import config, schema
from vlp.losses import build
from vlp.models.heads import Translators, unit

READ = ("image", "text", "others", "others_valid", "scale", "translated", "cycled")


def given(*absent: str) -> dict[str, Tensor]:
    values = data()
    return {name: values[name] for name in READ if name not in absent}


def unchanged(d: dict[str, Tensor]) -> dict[str, Tensor]:
    """As translators give that change nothing: text to each modality, and back."""
    sources = []
    for other in (d["image"], *d["others"]):
        sources += [d["text"], other]
    return d | {"translated": torch.stack(sources), "cycled": torch.stack(sources)}


def test_translators_that_change_nothing_leave_infonce_of_the_pairs():
    d = unchanged(given())
    leaves = [d[name] for name in ("image", "text", "others", "scale")]
    total, terms = build({"translation": {"cycle": 0}})(**d)
    pairs = [["text", "image"], ["text", "0"], ["text", "1"]]
    expected, _ = build({"modality_pairs": {"pairs": pairs}})(**d)

    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(value, leaves) for value in (total, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert wanted[0].norm() > 1e-3 and terms["translation.cycle"] == 0
    # Nothing is left to learn on the way back, and its gradient is no NaN.
    whole, _ = build({"translation": {"cycle": 3.0}})(**d)
    assert whole.item() == total.item()
    assert all(g.isfinite().all() for g in torch.autograd.grad(whole, leaves))


@pytest.mark.parametrize("options", [{}, {"match": "distance", "distance": "squared"}])
def test_what_was_made_of_modalities_that_are_absent_has_no_influence(options):
    d = given()
    expected, _ = build({"translation": options})(**d)
    leaves = [d["image"], d["text"], d["translated"]]
    wanted = torch.autograd.grad(expected, leaves)

    with torch.no_grad():
        d["others"][~d["others_valid"]] = torch.nan
        for place in range(OTHERS):
            # The way from an absent modality.
            absent = ~d["others_valid"][place]
            d["translated"][3 + 2 * place, absent] = d["cycled"][3 + 2 * place, absent] = torch.nan
    total, _ = build({"translation": options})(**d)
    assert total.item() == expected.item()
    found = torch.autograd.grad(total, leaves)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)

    d["others_valid"] = torch.zeros_like(d["others_valid"])
    total, _ = build({"translation": options})(**d)
    pair = {name: d[name] for name in ("image", "text", "scale")}
    pair |= {name: d[name][:2] for name in ("translated", "cycled")}
    alone, _ = build({"translation": options})(**pair)
    # What is left is text to image and back, and of the others the way back of text.
    way_back = (d["cycled"][2::2] - d["text"]).square().sum(2)
    way_back = way_back if options else way_back.sqrt()
    torch.testing.assert_close(total, alone + way_back.mean(1).sum() / 2, rtol=1e-12, atol=0)


def test_directions_have_names():
    d = given()
    named = d | {
        "translated": d["translated"][2:4],
        "cycled": d["cycled"][2:4],
        "other_names": ("sound", "depth"),
        "translations": (("text", "sound"), ("sound", "text")),
    }
    alone = d | {"others": d["others"][:1], "others_valid": d["others_valid"][:1]}
    alone |= {name: d[name][:4] for name in ("translated", "cycled")}
    of_both, _ = build({"translation": {}})(**alone)
    of_image, _ = build({"translation": {}})(**given("others", "others_valid") | {
        name: d[name][:2] for name in ("translated", "cycled")
    })  # fmt: skip
    found, _ = build({"translation": {}})(**named)
    torch.testing.assert_close(found + of_image, of_both, rtol=1e-12, atol=0)


def changed(**values) -> dict:
    return {**given(), "other_names": ("sound", "depth"), **values}


@pytest.mark.parametrize(
    "keywords, options, message",
    [
        ({"translations": (("text", "smell"),) * 6}, {}, "found smell, expected modalities of the "
         "call: image, text, sound, depth"),
        ({"translations": (("text", "image"),)}, {}, "translations: found 1, expected one for each "
         "of the 6"),
        ({"others": None, "others_valid": None, "other_names": None}, {}, "found 6 translations, "
         "expected 2, of text to image and back"),
        ({}, {"cycle": -1}, "cycle: found -1.0, expected a weight >= 0"),
        ({}, {"match": "contrastive"}, "match"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(keywords, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build({"translation": options})(**changed(**keywords))


# The head


def test_each_way_and_back_is_by_the_two_maps_of_the_pair():
    torch.manual_seed(0)
    options = schema.parse(config.TranslatorHead, {"pairs": [["text", "sound"], ["image", "text"]]})
    head = Translators(4, options)
    rows = {name: unit(torch.randn(3, 4)) for name in ("image", "text", "sound", "depth")}
    outputs = head(rows)

    n = 0
    for place, (source, target) in enumerate(options.directions):
        there = unit(head.maps[f"{source}-to-{target}"](rows[source]))
        back = unit(head.maps[f"{target}-to-{source}"](there))
        assert torch.equal(outputs["translated"][:, place], there)
        assert torch.equal(outputs["cycled"][:, place], back)
        n += 1
    assert n == 4 and outputs["translated"].shape == (3, 4, 4)
    assert head({"text": rows["text"], "image": rows["image"]}) == {}, "the sound is not there"
    linear = Translators(4, config.TranslatorHead(width=None))
    assert sum(p.numel() for p in linear.parameters()) == 2 * (4 * 4 + 4)


@pytest.mark.parametrize(
    "heads, message",
    [
        ({"pairs": [["text", "audoi"]]}, "translators.pairs names audoi; expected modalities of "
         "the model: image, text, audio"),
        ({"pairs": [["text", "text"]]}, "expected pairs of two different modalities"),
        ({"pairs": [["text", "audio"], ["audio", "text"]]}, "expected pairs of two different"),
        ({"pairs": []}, "expected pairs of two different modalities"),
        ({"width": 0}, "width is 0; expected at least 1, or null for a linear map"),
    ],
)  # fmt: skip
def test_translators_that_cannot_be_are_refused(heads, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        modalities = {"audio": {"features": 3}}
        schema.parse(config.Heads, {"modalities": modalities, "translators": heads})


def test_a_precomputed_tower_gives_translators_nothing_to_read():
    tower = {"name": "open_clip", "architecture": "ViT-B-32", "locked": True, "precomputed": True}
    model = {"image_tower": tower}
    with pytest.raises(ValueError, match="a precomputed one does not run"):
        schema.parse(config.Model, model | {"heads": {"translators": {}}})
