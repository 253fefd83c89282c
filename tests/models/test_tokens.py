"""What towers make of each patch and each token: in the space of their embeddings, on request
alone, and refused by name where a tower has none.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import languages
from tests.models.test_coca import section as coca
from tests.models.tiny import TEXT, VIT, inputs, language_model, siglip, tiny
from vlp import losses
from vlp.checks import check_needs, check_tokens
from vlp.data.prompted import PADDING
from vlp.models import tokens
from vlp.models.embedding import embed, token_masks
from vlp.plugin import keyed
from vlp.types import Batch

TIMM = {"name": "timm", "image_size": 64}
IMAGE_TOWERS = {
    "vit": VIT,
    "vit, mean": VIT | {"pool": "avg"},
    "timm, class token": TIMM | {"model": "test_vit"},
    "timm, mean of patches": TIMM | {"model": "test_vit", "pool": "avg"},
    "timm, cells": TIMM | {"model": "test_resnet", "proj_bias": True},
    "timm, norm behind the pool": TIMM | {"model": "test_convnext", "proj": "mlp"},
    "timm, channels last": TIMM | {"model": "test_mambaout", "pool": "avg"},
    "timm, layers behind the pool": TIMM | {"model": "mobilenetv3_small_050"},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64},
}


def architecture(folder, vision=None, **text):
    """A small model of open_clip, as an architecture of one's own."""
    vision = vision or {"layers": 1, "width": 64, "patch_size": 32, "image_size": 64}
    sizes = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    described = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": sizes | text}
    path = folder / "own.json"
    path.write_text(json.dumps(described))
    tower = {"name": "open_clip", "architecture": str(path)}
    return tiny(image_tower=tower, text_tower=None, embed_dim=None)


@pytest.mark.parametrize("kind", IMAGE_TOWERS)
def test_patches_are_in_the_space_of_the_embeddings(kind, tmp_path):
    described = IMAGE_TOWERS[kind]
    is_open_clips = kind == "resnet"
    model = architecture(tmp_path, described) if is_open_clips else tiny(image_tower=described)
    tower, (pixels, _) = model.visual, inputs(model)

    with torch.no_grad():
        given = model(image=pixels, token_rows={"image_tokens": (1, 3)})
        images = model.pixels(pixels)
        features, raw = tokens.with_tokens(tower, images)
        projected = tokens.project(tower, raw)
        expected = of_one_place(kind, tower, images)
        plain, plain_features = model(image=pixels), tower(images)

    n_patches = 16 if kind.startswith("vit") else 4
    if "test_vit" in str(described):
        n_patches = 16
    assert given.image_tokens.shape == (2, n_patches, 48)
    torch.testing.assert_close(given.image_tokens, F.normalize(projected[1:3], dim=-1))
    torch.testing.assert_close(projected, expected, rtol=1e-4, atol=1e-5)

    # The embeddings are those without tokens, bit for bit, and so is every later call.
    assert torch.equal(features, plain_features)
    assert torch.equal(given.image, plain.image) and plain.image_tokens is None


def of_one_place(kind: str, tower, images: Tensor) -> Tensor:
    """The features of pictures whose places, behind the last block, all are one of them, for each:
    [rows, P, D].
    """
    if kind.startswith("vit"):
        kept = []
        hook = tower.ln_post.register_forward_hook(lambda *args: kept.append(args[2]))
        tower(images)
        hook.remove()
        return kept[0][:, 1:] @ tower.proj

    if kind == "resnet":
        cells = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(images)))))
        return attended_alone(tower.attnpool, cells.flatten(2).permute(2, 0, 1))

    features = tower.trunk.forward_features(images)
    spatial = {3: [1], 4: [2, 3]}[features.ndim]
    if "channels last" in kind:
        spatial = [1, 2]
    n_class_tokens = 1 if "test_vit" in str(IMAGE_TOWERS[kind]) else 0

    expected = []
    places = torch.cartesian_prod(*(torch.arange(features.shape[dim]) for dim in spatial))
    for place in places.view(-1, len(spatial))[n_class_tokens:]:
        alike = features
        for dim, index in zip(spatial, place):
            alike = alike.index_select(dim, index.view(1))
        alike = alike.expand_as(features)
        expected.append(tower.head(tower.trunk.forward_head(alike)))
    return torch.stack(expected, 1)


def attended_alone(pool, cells: Tensor) -> Tensor:
    """open_clip's attention pool over cells [P, rows, width] of which each sees itself alone."""
    cells = cells + pool.positional_embedding[1:, None]
    biases = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    attended, _ = F.multi_head_attention_forward(
        cells,
        cells,
        cells,
        cells.shape[-1],
        pool.num_heads,
        None,
        biases,
        None,
        None,
        False,
        0.0,
        pool.c_proj.weight,
        pool.c_proj.bias,
        need_weights=False,
        attn_mask=~torch.eye(len(cells), dtype=torch.bool),
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )
    return attended.transpose(0, 1)


def text_models(folder):
    """Models by their text towers, and ids whose padding begins at another place in each row."""
    language = {"name": "huggingface", "model": str(language_model(folder)), "pretrained": False}
    of_language = {"name": "llm", "model": str(languages.language_model(folder / "llm"))}
    models = {
        "causal": tiny(text_tower=TEXT),
        "class token": architecture(folder, embed_cls=True, output_tokens=True),
        "mean": tiny(text_tower=language | {"context_length": 16, "pooler": "mean_pooler"}),
        "first": tiny(text_tower=language | {"context_length": 16, "pooler": "cls_pooler"}),
        "last": tiny(text_tower=of_language | {"context_length": 16, "pool": "last"}),
        "latent": tiny(
            text_tower=of_language | {"context_length": 16, "pool": "latent", "latents": 4}
        ),
    }
    return {kind: (model, ids_of(kind, model)) for kind, model in models.items()}


def ids_of(kind: str, model) -> Tensor:
    ids = inputs(model)[1]
    if kind in ("last", "latent"):
        n_tokens = torch.tensor([[14], [9], [3]])
        ids = torch.where(torch.arange(16) < n_tokens, ids % 14, PADDING)
    return ids


def test_tokens_are_in_the_space_of_the_embeddings(tmp_path):
    n_kinds = 0
    for kind, (model, ids) in text_models(tmp_path).items():
        batch = batch_of(model, ids)
        with torch.no_grad():
            whole = embed(model, batch, {"text", "text_tokens"})
            mask = token_masks(model, batch, {"text_tokens_valid"})["text_tokens_valid"]
            model.cut_captions = False
            uncut = embed(model, batch, {"text", "text_tokens"})
            plain = embed(model, batch, {"text"})
            features, raw = tokens.with_tokens(model.text, ids)
        found = whole["text_tokens"]

        # As many as the mask counts, and the same where padding passed the tower.
        assert found.shape == (3, mask.shape[1], 48) and "text_tokens" not in plain
        torch.testing.assert_close(found[mask], uncut["text_tokens"][mask], rtol=0, atol=1e-5)
        assert torch.equal(uncut["text"], plain["text"]), kind
        norms = found[mask].norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))

        # Where one token is pooled, its row is the embedding.
        if kind in ("causal", "last"):
            last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
            pooled = found[torch.arange(3), last]
            torch.testing.assert_close(pooled, whole["text"], rtol=0, atol=1e-5)
        # A pool with weights passes each token alone.
        if kind == "first":
            alone = model.text.transformer.pooler(raw[:, 3:4])
            projected = tokens.project(model.text, raw)
            assert projected.shape == (3, 15, 48)
            torch.testing.assert_close(projected[:, 3], model.text.proj(alone))
        if kind == "latent":
            means = torch.stack([raw[i][mask[i]].mean(0) for i in range(3)])
            torch.testing.assert_close(model.text.projected(means), features)
        n_kinds += 1
    assert n_kinds == 6


def test_which_tokens_are_a_text_s(tmp_path):
    models = text_models(tmp_path)
    ids = torch.tensor([[9, 5, 0, 7, 0, 0], [9, 7, 0, 0, 0, 0]])
    n_tokens = torch.tensor([[4], [2]])
    places = torch.arange(6)

    # An id of 0 further in front is a word ("!" of CLIP), behind the last one padding.
    within = places < n_tokens
    expected = {
        "causal": within & (places > 0),
        "class token": within & (places > 0),
        "mean": within,
        "first": within[:, 1:],
    }
    for kind, mask in expected.items():
        assert torch.equal(models[kind][0].token_mask(ids), mask), kind

    # Marked ids are the prompt's.
    marked = torch.tensor([[-9, 5, 0, 7, PADDING, PADDING], [-9, -3, 4, PADDING, PADDING, PADDING]])
    expected_of_llm = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]]).bool()
    assert torch.equal(models["latent"][0].token_mask(marked), expected_of_llm)


def batch_of(model, ids: Tensor, **fields) -> Batch:
    pixels = inputs(model)[0]
    return Batch(pixels, ids, torch.arange(len(ids)), [str(i) for i in range(len(ids))], **fields)


def test_hard_captions_that_are_not_valid_have_no_tokens():
    model = tiny()
    ids = inputs(model)[1]
    valid = torch.tensor([[True, False], [False, False], [True, True]])
    negatives = torch.stack([ids.roll(1, 0), ids.roll(2, 0)], 1)
    captions = negatives.flip(1)
    batch = batch_of(
        model,
        ids,
        negatives=negatives,
        negatives_valid=valid,
        captions=captions,
        captions_valid=torch.ones(3, 2, dtype=torch.bool),
    )
    wanted = {"image", "text", "captions", "negatives", "image_tokens", "negative_tokens"}
    embedded = embed(model, batch, wanted)
    masks = token_masks(model, batch, {"negative_tokens_valid", "text_tokens_valid", "scale"})

    found = embedded["negative_tokens"]
    assert found.shape == (3, 2, 16, 48) and not found[~valid].any()
    assert not masks["negative_tokens_valid"][~valid].any() and len(masks) == 2

    # Captions pass the tower between text and negatives: each has its own.
    alone = embed(model, batch_of(model, negatives[2]), {"text", "text_tokens"})
    n = masks["negative_tokens_valid"][2]
    torch.testing.assert_close(found[2][n], alone["text_tokens"][:2][n], rtol=0, atol=1e-5)


def test_batch_norms_behind_the_pool_move_by_pictures_alone():
    model = tiny(image_tower=TIMM | {"model": "mobilenetv4_conv_small_035"}).train()
    pixels, _ = inputs(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved = []
    for token_rows in (None, {"image_tokens": (0, 3)}):
        model.load_state_dict(before)
        model(image=pixels, token_rows=token_rows)
        moved.append({name: value.clone() for name, value in model.named_buffers()})

    statistics = [name for name in before if name.endswith("norm_head.running_mean")]
    assert len(statistics) == 1 and not torch.equal(moved[0][statistics[0]], before[statistics[0]])
    assert all(torch.equal(moved[1][name], value) for name, value in moved[0].items())


def test_queries_of_a_cascade_pass_the_pool_behind_them_alone():
    model = tiny(**coca("cascade"))
    pixels, _ = inputs(model)
    with torch.no_grad():
        given = model(image=pixels, token_rows={"image_tokens": (0, 3)}).image_tokens
        _, queries = tokens.with_tokens(model.visual, model.pixels(pixels))
        pool, projection = model.visual.attn_pool_contrastive, model.visual.proj
        alone = [pool(queries[:, place : place + 1]) @ projection for place in range(4)]
    assert given.shape == (3, 4, 32)
    torch.testing.assert_close(given, F.normalize(torch.stack(alone, 1), dim=-1))


def test_a_description_and_the_weights_know_nothing_of_tokens():
    asked, plain = tiny(), tiny()
    pixels, ids = inputs(asked)
    rows = {"image_tokens": (0, 3), "text_tokens": (0, 3)}
    asked(pixels, ids, token_rows=rows).text_tokens.sum().backward()

    assert asked.description() == plain.description()
    weights, expected = asked.open_clip_state_dict(), plain.open_clip_state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert torch.is_tensor(asked.visual(asked.pixels(pixels)))


def test_towers_without_tokens_are_refused_by_name(tmp_path):
    folder = tmp_path / "llm"
    languages.language_model(folder)
    cases = {
        "the image tower pools by an attention of its own": tiny(
            image_tower=siglip(tmp_path), text_tower=None, embed_dim=None
        ),
        "the image tower pools by an attention of its own;": tiny(
            image_tower=TIMM | {"model": "test_vit3"}
        ),
        "the image tower pools embedding and tokens side by side": tiny(**coca("parallel")),
        "the text tower reads stored embeddings": tiny(
            text_tower={"name": "stored", "embeddings": str(languages.text_store(tmp_path))}
        ),
    }
    terms = keyed("vlp.losses", {"infonce": {}, "fsc": {}})
    for message, model in cases.items():
        with pytest.raises(ValueError, match=f"the term 'fsc' needs .*, and {message}"):
            check_tokens(terms, model)
        check_tokens(keyed("vlp.losses", {"infonce": {}}), model)

        # As a later stage would find it.
        carried = frozenset({"negatives", "negatives_valid"})
        with pytest.raises(ValueError, match="which this run does not have; it comes from a"):
            check_needs(losses.build({"fsc": {}}), carried, model)
    check_tokens(terms, tiny())


def test_without_hard_captions_their_tokens_are_missed():
    with pytest.raises(ValueError) as refused:
        check_needs(losses.build({"fsc": {}}), frozenset(), tiny())
    missing = {line.split("'")[3] for line in str(refused.value).splitlines()}
    fields = {"negatives", "negatives_valid", "negative_tokens", "negative_tokens_valid"}
    assert missing == fields
