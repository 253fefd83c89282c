"""The head in which patches and sentences of a sample look at each other, against a loop over its
equations.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.tiny import inputs, siglip, tiny
from vlp.models.embedding import embed
from vlp.models.passing import pass_texts
from vlp.models.regions import in_place
from vlp.types import Batch

SENTENCES = 3
VALID = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
OUTPUTS = {"attended_captions", "patch_distances"}


def model_and_batch(**keys):
    """Three pairs, of which the first has two sentences and the second none."""
    model = tiny(heads={"regions": {"width": 7} | keys}).double()
    pixels, ids = inputs(model)
    captions = torch.stack([ids.roll(k, 0) for k in range(SENTENCES)], 1)
    fields = {"captions": captions, "captions_valid": VALID}
    return model, Batch(pixels, ids, torch.arange(3), ["a", "b", "c"], **fields)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def test_patches_and_sentences_look_at_each_other_by_gates():
    model, batch = model_and_batch()
    head, root = model.heads.regions, math.sqrt(48)
    embedded = embed(model, batch, {"image", "text", "captions", *OUTPUTS})
    assert embedded["region_scale"].item() == pytest.approx(10)
    assert "image_tokens" not in embedded, "patches stay in the model"

    sentences = pass_texts(model, batch.captions.flatten(0, 1))[0].view(3, SENTENCES, -1)
    kept = []
    hook = model.visual.ln_post.register_forward_hook(lambda *args: kept.append(args[2]))
    model.encode_image(batch.image)
    hook.remove()
    patches = kept[0][:, 1:] @ model.visual.proj

    for i in range(3):
        live = [k for k in range(SENTENCES) if VALID[i, k]]
        for k in live:
            query = head.text["query"](sentences[i, k])
            seen = 0
            for patch in patches[i]:
                gate = torch.sigmoid(query @ head.image["key"](patch) / root)
                seen = seen + gate * head.image["value"](patch)
            expected = F.normalize(seen, dim=0)
            torch.testing.assert_close(embedded["attended_captions"][i, k], expected)

        distance = 0
        for patch in patches[i]:
            query = head.image["query"](patch)
            seen = torch.zeros_like(patch)
            for k in live:
                gate = torch.sigmoid(query @ head.text["key"](sentences[i, k]) / root)
                seen = seen + gate * head.text["value"](sentences[i, k])
            if live:
                there = cosine(head.predictor(patch), seen)
                back = cosine(head.predictor(seen), patch)
                distance = distance + (1 - (there + back) / 2) / len(patches[i])
        if live:
            assert embedded["patch_distances"][i].item() == pytest.approx(distance.item())


def test_a_target_does_not_move_and_invalid_sentences_have_no_influence():
    patches = torch.randn(1, 4, 48, dtype=torch.float64, requires_grad=True)
    sentences = torch.randn(1, 2, 48, dtype=torch.float64, requires_grad=True)
    head = tiny(heads={"regions": {}}).double().heads.regions
    valid = torch.tensor([[True, False]])

    distances = head(patches, sentences, valid)["patch_distances"]
    before = torch.autograd.grad(distances, [patches, sentences])
    with torch.no_grad():
        sentences[0, 1] += 1
    again = head(patches, sentences, valid)["patch_distances"]
    after = torch.autograd.grad(again, [patches, sentences])
    assert torch.equal(distances, again) and all(map(torch.equal, before, after))
    assert not before[1][0, 1].any() and before[1][0, 0].any()
    assert head.predictor[0].out_features == 24, "half the width"


def test_rows_stand_at_their_places():
    rows = torch.arange(4.0).view(2, 2)
    assert torch.equal(in_place(rows, None, (2,)), rows)
    placed = in_place(rows, torch.tensor([3, 0]), (2, 2))
    assert placed.tolist() == [[[2, 3], [0, 0]], [[0, 0], [0, 1]]]


def test_an_image_tower_without_patches_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.heads\.regions reads the patches .* pools by an"):
        tiny(image_tower=siglip(tmp_path), text_tower=None, embed_dim=None, heads={"regions": {}})
