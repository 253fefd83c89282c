"""Views, concepts and captions: trained with the towers, exact at any number of ranks and
micro-batches, left out of exports.
"""

import dataclasses

import pytest
import torch
from open_clip.transformer import MultimodalTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from tests import ranks
from tests.models.tiny import VIT, few_words, inputs, tiny
from tests.test_step import assert_close, gradients_and_weights, make_batch
from vlp import losses
from vlp.export import folder
from vlp.models import decoder as decoders
from vlp.models import trunk_features
from vlp.models.build import from_description
from vlp.models.decoder import Decoder
from vlp.models.embedding import embed
from vlp.models.load import load
from vlp.types import Batch

LENGTH = 10
END = 499  # of a vocabulary of 500: ranks send all weights to one another
HEADS = {
    "views": {"width": 24},
    "concepts": 5,
    "captions": {"layers": 1},
    "predictor": {"width": 24},
}
OBJECTIVE = {
    "multi_view": {},
    "slip": {},
    "siam": {},
    "captioning": {"weight": 2},
    "distill": {"form": "concepts"},
    "infonce": {},
}


def rich_batch(rows=slice(None)):
    """`make_batch` of short captions, with two views of each image and text, and weights of five
    concepts.
    """
    plain = make_batch()
    generator = torch.Generator().manual_seed(6)
    images = torch.randint(
        0, 256, (len(plain), 2, 3, 16, 16), dtype=torch.uint8, generator=generator
    )
    texts = torch.randint(1, 400, (len(plain), 2, LENGTH), generator=generator)
    texts[..., -1] = END
    concepts = torch.rand(len(plain), 5, generator=generator)
    return dataclasses.replace(
        make_batch(rows),
        text=plain.text[rows, :LENGTH].clamp(max=END),
        image_views=images[rows],
        text_views=texts[rows],
        concept_targets=concepts[rows],
    )


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory):
    return few_words(tmp_path_factory.mktemp("heads"), END + 1, LENGTH, layers=2)


def run(text_tower, micro_batches=1, engine="ddp"):
    return gradients_and_weights(
        micro_batches,
        batch=rich_batch,
        engine=engine,
        heads=HEADS,
        objective=OBJECTIVE,
        text_tower=text_tower,
    )


@pytest.fixture(scope="module")
def reference(text_tower):
    gradients, weights, loss = run(text_tower)
    mine = {name for name in gradients if name.startswith("heads.")}
    assert len(mine) > 20 and {name.split(".")[1] for name in mine} == set(HEADS)
    assert all(any(gradients[name]) for name in mine)
    return gradients, weights, loss


@pytest.mark.parametrize(
    "heads_of_run, n_learning",
    [
        ({"views": {"width": 24}}, 9),
        ({"views": {"width": 24, "text": False}}, 5),
        ({"views": {"width": 24, "image": False}}, 5),
        ({}, 0),
    ],
)
def test_views_join_a_term_that_can_do_without_them(heads_of_run, n_learning, text_tower):
    """`mv_infonce` takes image and text alone, and further views where they are embedded."""
    gradients, _, _ = gradients_and_weights(
        2,
        batch=rich_batch,
        heads=heads_of_run,
        objective={"mv_infonce": {}},
        text_tower=text_tower,
    )
    of_heads = [name for name in gradients if name.startswith("heads.")]
    assert len(of_heads) == n_learning
    assert all(any(gradients[name]) for name in of_heads if "scaling" not in name)


def test_micro_batches_change_nothing(reference, text_tower):
    gradients, weights, _ = run(text_tower, 3)
    assert assert_close(gradients, reference[0], 1e-10) > 40
    assert_close(weights, reference[1], 1e-9)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_ranks_change_nothing(reference, text_tower, engine):
    for gradients, weights, _ in ranks.run(2, run, text_tower, 2, engine):
        assert_close(gradients, reference[0], 1e-9)
        assert_close(weights, reference[1], 1e-9)


def named_batch(rows=slice(None)):
    """`make_batch` whose samples name up to three of five concepts, some of them none."""
    targets = torch.zeros(len(make_batch()), 3, 2)
    for i in range(len(targets)):
        for n in range(i % 4):
            targets[i, n] = torch.tensor([(i + 2 * n) % 5, 1.0])
    return dataclasses.replace(make_batch(rows), concept_targets=targets[rows])


def run_of_trunk(micro_batches=1, engine="ddp"):
    return gradients_and_weights(
        micro_batches,
        batch=named_batch,
        engine=engine,
        heads={"concepts": 5, "concepts_of": "trunk"},
        objective={"distill": {"form": "concepts", "loss": "bce"}},
    )


def test_concepts_of_the_trunk_are_exact_however_a_step_is_divided():
    gradients, weights, _ = run_of_trunk()
    # The projection and the texts take no part.
    learning = {name for name, values in gradients.items() if any(values)}
    assert {"heads.concepts.weight", "heads.concepts.bias"} <= learning
    assert not [name for name in learning if name.startswith("text.") or name == "visual.proj"]
    assert len(learning) > 20

    divided = [run_of_trunk(3), *ranks.run(2, run_of_trunk, 2, "fsdp2")]
    for others, weights_after, _ in divided:
        assert_close(others, gradients, 1e-9)
        assert_close(weights_after, weights, 1e-9)


TRUNKS = {
    "vit": {},
    "pooled by mean": {"image_tower": VIT | {"pool": "avg"}},
    "resnet": {"image_tower": {"name": "timm", "model": "resnet10t", "image_size": 32}},
    "mobilenet": {
        "image_tower": {"name": "timm", "model": "mobilenetv3_small_050", "image_size": 32}
    },
}


@pytest.mark.parametrize("name", TRUNKS)
def test_the_head_reads_what_the_projection_reads(name):
    model = tiny(**TRUNKS[name], heads={"concepts": 5, "concepts_of": "trunk"})
    pixels, _ = inputs(model)
    with torch.no_grad():
        passed = trunk_features.with_trunk(model.visual, model.pixels(pixels))
        # Reading them changes nothing.
        assert torch.equal(passed.features, model.visual(model.pixels(pixels)))
        assert passed.trunk.shape == (3, trunk_features.width(model.visual))
        logits = model(pixels, pairs=2).concept_logits
        torch.testing.assert_close(logits, model.heads.concepts(passed.trunk[:2]))
        if name == "vit":
            assert torch.equal(passed.trunk @ model.visual.proj, passed.features)


def test_a_tower_without_known_features_cannot_have_a_head_on_them():
    with pytest.raises(ValueError, match=r"concepts_of: trunk needs .*found a Identity"):
        trunk_features.check(torch.nn.Identity())
    with pytest.raises(ValueError, match="there is none; write concepts: M"):
        tiny(heads={"concepts_of": "trunk"})


def test_what_heads_give():
    model = tiny(heads=HEADS)
    pixels, ids = inputs(model)
    batch = Batch(
        pixels,
        ids,
        torch.arange(3),
        list("abc"),
        image_views=pixels[:, None].repeat(1, 2, 1, 1, 1),
        text_views=ids[:, None].repeat(1, 2, 1),
    )
    found = embed(
        model,
        batch,
        {"image", "text", "image_views", "text_views", "concept_logits", "caption_nll"},
    )
    assert found["image_views"].shape == found["text_views"].shape == (3, 2, 48)
    assert torch.allclose(found["image_views"].norm(dim=-1), torch.ones(3, 2))
    # The same view twice. Close, not equal: a kernel's last bits may depend on a row's place in its
    # batch.
    torch.testing.assert_close(
        found["image_views"][:, 0], found["image_views"][:, 1], rtol=0, atol=1e-6
    )
    assert (
        found["image_views"][:, 0] - found["image"]
    ).abs().max() > 0.01  # by a projection of their own
    assert found["concept_logits"].shape == (3, 5)
    assert found["caption_nll"].shape == (3, ids.shape[1] - 1) and (found["caption_nll"] > 0).all()
    bare = embed(model, batch, {"image", "text"})
    assert bare.keys() == {"image", "text", "scale"}
    # Without the views' rows beside them.
    torch.testing.assert_close(bare["image"], found["image"], rtol=0, atol=1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation made."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.n = max(self.n, made.numel())
        return made


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_are_held_in_chunks_and_change_nothing(checkpointing, monkeypatch):
    torch.manual_seed(0)
    rows, length, width, vocabulary = 6, 5, 16, 200
    decoder = Decoder(width, 2, 2, 8, output_dim=vocabulary)
    torch.nn.init.normal_(decoder.text_projection, std=0.3)
    decoder.set_grad_checkpointing(checkpointing)
    image = torch.randn(rows, 4, width, requires_grad=True)
    text = torch.randn(rows, length, width, requires_grad=True)
    targets = torch.randint(vocabulary, (rows, length))
    weights = torch.rand(rows, length)

    # open_clip's own forward pass gives all logits.
    logits = MultimodalTransformer.forward(decoder, image, text)
    expected = -logits.log_softmax(-1).gather(2, targets[..., None]).squeeze(2)
    leaves = [image, text, *decoder.parameters()]
    expected_gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    assert len(leaves) > 20 and all(gradient.any() for gradient in expected_gradients[:2])

    for chunk in (7, 1000):
        monkeypatch.setattr(decoders, "LOGITS_BYTES", 4 * vocabulary * chunk)
        with Largest() as largest:
            nll = decoder(image, text, targets)
            gradients = torch.autograd.grad((nll * weights).sum(), leaves)
        torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
        for gradient, expected_gradient in zip(gradients, expected_gradients):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
        n_logits = min(chunk, rows * length) * vocabulary
        assert largest.n == max(n_logits, decoder.text_projection.numel())


def test_a_caption_position_sees_the_image_and_the_words_before_it():
    model = tiny(heads={"captions": {}})
    pixels, ids = inputs(model)

    def nll(pixels, ids):
        return model(pixels, ids, pairs=3).caption_nll

    before, changed = nll(pixels, ids), ids.clone()
    changed[:, 4] += 1
    after = nll(pixels, changed)
    # Position 3 is about token 4, and those from 4 on see it.
    assert torch.equal(before[:, :3], after[:, :3])
    assert ((before[:, 3:6] - after[:, 3:6]).abs() > 1e-5).all()
    assert (before - nll(255 - pixels, ids)).abs().amax(1).min() > 1e-4


def test_token_losses_stand_for_logits():
    logits = torch.randn(4, 5, 9, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 9, (4, 5))
    objective, unit = losses.build({"captioning": {}}), torch.ones(4, 1, dtype=torch.float64)
    total, _ = objective(image=unit, text=unit, scale=1.0, caption_logits=logits, caption_ids=ids)
    nll = -logits.log_softmax(2).gather(2, ids.unsqueeze(2)).squeeze(2)
    other, _ = objective(image=unit, text=unit, scale=1.0, caption_nll=nll, caption_ids=ids)
    assert torch.allclose(total, other)
    assert torch.allclose(
        *(torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (total, other))
    )


def test_heads_return_from_a_checkpoint_and_stay_out_of_an_export(tmp_path):
    model = tiny(heads=HEADS)
    again = from_description(model.description())
    assert again.state_dict().keys() == model.state_dict().keys()
    folder.export(model, tmp_path / "export")
    exported = load(tmp_path / "export").eval()
    assert not [name for name in exported.state_dict() if name.startswith("heads.")]
    pixels, ids = inputs(model)
    assert torch.allclose(exported.encode_image(pixels), model.encode_image(pixels), atol=1e-6)
    assert torch.allclose(exported.encode_text(ids), model.encode_text(ids), atol=1e-6)


def test_a_captioner_needs_a_tower_with_tokens():
    with pytest.raises(
        ValueError, match=r"heads\.captions reads the towers' tokens.*found TimmModel"
    ):
        tiny(
            image_tower={"name": "timm", "model": "resnet10t", "image_size": 32},
            heads={"captions": {}},
        )
