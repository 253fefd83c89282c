"""The step: any number of ranks and micro-batches gives the gradient of one process with the whole
batch.
"""

import dataclasses

import pytest
import torch

from tests import ranks
from vlp import config, dist, engines, losses, plugin, schema
from vlp.eval import metrics
from vlp.measurements import MEASURED, means_over_ranks, space
from vlp.models.build import build
from vlp.passes import leaf
from vlp.step import NonFiniteError, Training, embed, settle, train_step
from vlp.types import Batch

ROWS, LENGTH = 12, 77


def make_batch(rows=slice(None)):
    """The same ROWS samples on every rank; a rank takes its slice."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 400, (ROWS, LENGTH), generator=generator)
    text[:, 9] = 49407  # end of text: the token that is pooled
    text[:, 10:] = 0
    return Batch(
        image[rows], text[rows], torch.arange(ROWS)[rows], [f"key{i}" for i in range(ROWS)][rows]
    )


def make_training(
    micro_batches=1,
    *,
    engine="ddp",
    patch_dropout=0.0,
    objective=None,
    double=True,
    clip_norm=None,
    weights=None,
    checkpointing=False,
    train=None,
    heads=None,
    length=LENGTH,
    device="cpu",
    text_tower=None,
    optimizer=None,
    towers=None,
    whole=None,
    decoder=None,
    texts_alone=False,
):
    vit = {
        "name": "vit",
        "width": 32,
        "layers": 2,
        "head_width": 16,
        "patch_size": 4,
        "image_size": 16,
    }
    text = {"name": "transformer", "width": 32, "layers": 2, "heads": 2, "context_length": length}
    model = whole or config.Model(
        image_tower=plugin.Named("vlp.towers").parse(
            vit | {"patch_dropout": patch_dropout} | (towers or {}).get("image", {}), (), []
        ),
        text_tower=plugin.Named("vlp.towers").parse(
            (text_tower or text) | (towers or {}).get("text", {}), (), []
        ),
        embed_dim=32 if decoder else 16,  # as wide as the tokens that a decoder reads
        bias=-2.0,
        heads=schema.parse(config.Heads, heads or {}),
        decoder=decoder,
    )
    options = config.Train(
        config.Duration(4, "steps"),
        batch=ROWS,
        micro_batches=micro_batches,
        engine=engine,
        device=device,
        optimizer=optimizer or config.Optimizer(lr=1e-3, clip_norm=clip_norm),
        activation_checkpointing=checkpointing,
        **{"precision": "float32"} | (train or {}),
    )
    torch.manual_seed(0)
    encoder = build(model, texts_alone=texts_alone)
    if weights:
        encoder.load_state_dict(dict(weights))
    made = engines.start(options)
    made.prepare(encoder.double() if double else encoder, options)
    return Training(
        made,
        losses.build(objective or {"infonce": {}, "siglip": {"weight": 0.3}}),
        lambda step: 1e-3,
        micro_batches=micro_batches,
        dtype=engines.compute_dtype(options, made.device),
    )


def own_rows():
    size = ROWS // dist.world_size()
    return slice(dist.rank() * size, (dist.rank() + 1) * size)


def gradients_and_weights(micro_batches=1, steps=2, batch=make_batch, **options):
    """First step's gradients (AdamW's first moment is (1 − β₁) of them) and the weights after
    `steps` updates.
    """
    training = make_training(micro_batches, **options)
    loss = []
    for _ in range(steps):
        scalars = train_step(training, batch(own_rows()))
        loss.append(scalars["loss"].item())
        if training.step == 1:
            moments = training.engine.state(everywhere=True)[1]
            first = {
                k.removeprefix("exp_avg."): v / 0.1
                for k, v in moments.items()
                if k.startswith("exp_avg.")
            }
    weights, _ = training.engine.state(everywhere=True)
    return (
        {k: v.flatten().tolist() for k, v in first.items()},
        {k: v.flatten().tolist() for k, v in weights.items()},
        loss,
    )


def assert_close(one, other, tolerance, absolute=1e-12):
    assert one.keys() == other.keys()
    for name in one:
        a, b = (
            torch.tensor(one[name], dtype=torch.float64),
            torch.tensor(other[name], dtype=torch.float64),
        )
        assert (
            torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b) + absolute
        ), name
    return len(one)


@pytest.fixture(scope="module")
def reference():
    gradients, weights, loss = gradients_and_weights()
    assert len(gradients) > 20
    assert all(any(values) for values in gradients.values()), "an empty gradient proves nothing"
    return gradients, weights, loss


@pytest.mark.parametrize("micro_batches", [1, 3, 4, 12])
def test_micro_batches_change_nothing(reference, micro_batches):
    gradients, weights, loss = gradients_and_weights(micro_batches)
    assert assert_close(gradients, reference[0], 1e-10) > 20
    assert_close(weights, reference[1], 1e-9)
    assert loss == pytest.approx(reference[2], rel=1e-12)


@pytest.mark.parametrize(
    ("world", "micro_batches"), [(2, 1), (2, 3), pytest.param(4, 3, marks=pytest.mark.slow)]
)
def test_ranks_change_nothing(reference, world, micro_batches):
    results = ranks.run(world, gradients_and_weights, micro_batches)
    for gradients, weights, _ in results:
        assert_close(gradients, reference[0], 1e-10)
        assert_close(weights, reference[1], 1e-9)
    mean = [sum(values) / world for values in zip(*(loss for _, _, loss in results))]
    assert mean == pytest.approx(reference[2], rel=1e-12)


def fsdp2(micro_batches):
    return gradients_and_weights(micro_batches, engine="fsdp2", clip_norm=0.05)


def test_fsdp2_equals_one_process():
    expected = gradients_and_weights(clip_norm=0.05)
    for gradients, weights, _ in ranks.run(2, fsdp2, 3):
        assert_close(gradients, expected[0], 1e-9)
        assert_close(weights, expected[1], 1e-9)


def test_random_patch_drop_is_replayed(monkeypatch):
    """Two passes over three micro-batches equal one graph over the same three; without the replay
    they do not.
    """

    def one_graph():
        training = make_training(3, patch_dropout=0.5)
        parts = [embed(training, part, i) for i, part in enumerate(make_batch().split(3))]
        joined = {
            k: torch.cat([p[k] for p in parts]) if parts[0][k].ndim else parts[0][k]
            for k in parts[0]
        }
        training.objective(**joined, step=0)[0].backward()
        return {n: p.grad.flatten().tolist() for n, p in training.engine.module.named_parameters()}

    expected = one_graph()
    assert (
        assert_close(gradients_and_weights(3, steps=1, patch_dropout=0.5)[0], expected, 1e-10) > 20
    )

    calls = iter(range(10**6))
    # The known-wrong way: new randomness each pass.
    monkeypatch.setattr("vlp.passes.derive", lambda *position: next(calls))
    with pytest.raises(AssertionError):
        assert_close(gradients_and_weights(3, steps=1, patch_dropout=0.5)[0], expected, 1e-3)


def test_detached_micro_batches_are_not_exact(reference):
    """Negative control: the usual gradient accumulation, each micro-batch with its own loss, is
    another gradient.
    """
    training = make_training(3)
    for i, part in enumerate(make_batch().split(3)):
        (training.objective(**embed(training, part, i), step=0)[0] / 3).backward()
    wrong = {n: p.grad.flatten().tolist() for n, p in training.engine.module.named_parameters()}
    with pytest.raises(AssertionError):
        assert_close(wrong, reference[0], 1e-2)


def test_forward_count_and_one_loss():
    """Two passes cost one more forward of every micro-batch but the last, and no more losses."""
    counts = {}
    for parts in (1, 3):
        training = make_training(parts)
        seen = {"forward": 0, "loss": 0}
        training.engine.module.register_forward_hook(
            lambda *_, seen=seen: seen.__setitem__("forward", seen["forward"] + 1)
        )
        inner = training.objective

        def counted(evaluate=inner.evaluate, seen=seen, **inputs):
            seen["loss"] += 1
            return evaluate(**inputs)

        inner.evaluate = counted
        train_step(training, make_batch())
        counts[parts] = seen
    assert counts == {1: {"forward": 1, "loss": 1}, 3: {"forward": 5, "loss": 1}}


def poisoned(rank):
    """A NaN on one rank only."""
    training = make_training(2, double=False)
    before = training.engine.state(everywhere=True)[0]
    batch = make_batch(own_rows())
    if dist.rank() == rank:

        def hook(_, __, out):
            one = torch.tensor([1])
            return out._replace(image=out.image.clone().index_fill_(0, one, float("nan")))

        training.engine.module.register_forward_hook(hook)
    try:
        train_step(training, batch)
        settle(training)
    except NonFiniteError as error:
        after = training.engine.state(everywhere=True)[0]
        return str(error), all(torch.equal(before[k], after[k]) for k in before)
    return "no error", False


def test_nan_on_one_rank_stops_all_before_the_update():
    for message, unchanged in ranks.run(2, poisoned, 1):
        assert unchanged
        assert "image embedding (image tower) of sample 7 (key7)" in message, message
        assert "sample 10 (key10)" in message


@pytest.mark.parametrize("parts", [1, 3])
def test_recomputed_activations_change_nothing(parts):
    """Also in bf16, where attention is computed in another way than torch would choose."""
    weights = []
    for checkpointing in (False, True):
        training = make_training(parts, double=False, checkpointing=checkpointing)
        training.dtype = torch.bfloat16
        train_step(training, make_batch())
        weights.append(
            {n: p.flatten().tolist() for n, p in training.engine.module.named_parameters()}
        )
    assert assert_close(*weights, 1e-6) > 20


def test_carried_fields_reach_the_objective():
    """Hard captions go through the text tower with the texts and come back in their own shape."""
    batch = make_batch()
    batch = dataclasses.replace(
        batch,
        negatives=batch.text[:, None].repeat(1, 2, 1),
        negatives_valid=torch.ones(ROWS, 2, dtype=torch.bool),
    )
    training = make_training()
    training.objective.needs |= {"negatives", "negatives_valid"}
    output = embed(training, batch, 0)
    assert output["negatives"].shape == (ROWS, 2, 16)
    torch.testing.assert_close(output["negatives"][:, 1], output["text"])


def negatives_batch(rows=slice(None)):
    """`make_batch` with two hard captions a sample, five of the 24 valid, and three counting
    samples.
    """
    generator = torch.Generator().manual_seed(8)
    texts = torch.randint(1, 400, (ROWS, 4, LENGTH), generator=generator)
    texts[..., 9], texts[..., 10:] = 49407, 0
    mask = torch.zeros(ROWS, 2, dtype=torch.bool)
    mask[[0, 1, 4, 7, 11], [0, 1, 1, 0, 0]] = True
    counting = torch.arange(ROWS) % 5 == 0
    return dataclasses.replace(
        make_batch(rows),
        negatives=texts[rows, :2],
        negatives_valid=mask[rows],
        counterfactual=texts[rows, 2:],
        counterfactual_valid=counting[rows],
    )


NEGATIVES = {
    "hard_negatives": [{"form": "negclip"}, {"form": "own", "weight": 0.5}],
    "counting": {"counterfactuals": "all"},
}


def with_negatives(micro_batches=1, engine="ddp"):
    return gradients_and_weights(
        micro_batches, batch=negatives_batch, objective=NEGATIVES, engine=engine
    )


def test_only_valid_captions_pass_the_text_tower():
    """12 captions, 5 hard ones and 3 counting samples' 2 counterfactuals, by hooks; the others
    change nothing.
    """
    training = make_training(objective=NEGATIVES)
    rows = []
    training.engine.module.text.register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    batch = negatives_batch()
    before = train_step(training, batch)["loss"]
    assert rows == [12 + 5 + 3 * 2]
    batch.negatives[~batch.negatives_valid] = 7
    batch.counterfactual[~batch.counterfactual_valid] = 7
    assert train_step(make_training(objective=NEGATIVES), batch)["loss"] == before
    batch.negatives[0, 0, 3] += 1
    assert train_step(make_training(objective=NEGATIVES), batch)["loss"] != before


def test_ranks_with_unequal_numbers_of_valid_captions_change_nothing():
    expected = with_negatives()
    # The second micro-batch has one valid caption, the third two.
    assert_close(with_negatives(4)[0], expected[0], 1e-10)
    for engine in ("ddp", "fsdp2"):
        for gradients, weights, _ in ranks.run(2, with_negatives, 3, engine):
            assert_close(gradients, expected[0], 1e-9)
            assert_close(weights, expected[1], 1e-9)


WIDTHS = {
    "matryoshka": {
        "widths": [4, 16],
        "of": {"infonce": {}, "hard_negatives": {"form": "negclip", "weight": 0.5}},
    }
}


def at_widths(micro_batches=1):
    return gradients_and_weights(micro_batches, batch=negatives_batch, objective=WIDTHS)


def test_prefixes_of_embeddings_are_cut_after_ranks_and_micro_batches_meet():
    expected = at_widths()
    others = [at_widths(4), *ranks.run(2, at_widths, 3)]
    for gradients, weights, _ in others:
        assert assert_close(gradients, expected[0], 1e-9) > 20
        assert_close(weights, expected[1], 1e-9)
    assert len(others) == 3


def test_geometry_is_that_of_the_evaluation():
    """Of more rows than are looked at: the first ones count, and the evaluation's functions give
    the same.
    """
    generator = torch.Generator().manual_seed(2)
    image, text = (
        torch.nn.functional.normalize(
            torch.randn(MEASURED + 40, 8, generator=generator) + 0.3, dim=1
        )
        for _ in range(2)
    )
    found = space(image, text)
    x, t = image[:MEASURED].double(), text[:MEASURED].double()
    expected = {
        "space.modality_gap": metrics.modality_gap(x, t),
        "space.alignment": metrics.alignment(x, t),
        "space.uniformity_image": metrics.uniformity(x),
        "space.uniformity_text": metrics.uniformity(t),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        expected, rel=1e-5
    )
    assert metrics.modality_gap(image.double(), text.double()) != pytest.approx(
        expected["space.modality_gap"], rel=1e-4
    )
    # A uniformity needs two rows.
    assert space(image[:1], text[:1]).keys() == {
        "space.modality_gap",
        "space.alignment",
    }


def test_only_embeddings_are_cast_for_the_pairwise_kernels(monkeypatch):
    """In bf16 a sum of token losses would end at 256; as if these tensors lay on a device."""
    monkeypatch.setattr("vlp.pairwise.reduction.on_device", lambda tensor: True)
    training = make_training()
    training.dtype = torch.bfloat16
    output = {
        "image": torch.rand(300, 4),
        "text": torch.rand(300, 4),
        "text_views": torch.rand(300, 2, 4),
        "negatives": torch.rand(300, 2, 4),
        "caption_nll": torch.ones(300, 7),
        "concept_logits": torch.rand(300, 5),
        "scale": torch.tensor(14.3),
    }
    dtypes = {name: leaf(name, [output, output], training).dtype for name in output}
    narrow = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert narrow == {"image", "text", "text_views", "negatives"}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert leaf("caption_nll", [output], training).sum() == 2100


def averaged():
    scalars = {"loss": torch.tensor(1.0 + dist.rank()), "lr": torch.tensor(0.1)}
    scalars["rows"] = torch.tensor(7)
    exchanged = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dist, "gather_objects", lambda *_: exchanged.append(1))
        return means_over_ranks(scalars), exchanged


def test_scalars_are_averaged_without_pickling():
    for means, exchanged in ranks.run(2, averaged):
        assert means == pytest.approx({"loss": 1.5, "lr": 0.1, "rows": 7}) and not exchanged


def test_geometry_is_shown_when_asked_for():
    training = make_training()
    assert "space.modality_gap" not in train_step(training, make_batch())
    assert train_step(training, make_batch(), measure=True)["space.modality_gap"] > 0
