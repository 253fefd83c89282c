"""Texts cut to their length: the same embeddings and gradients as padded ones, from fewer tokens;
and texts whose padding counts stay as they are.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import ranks
from tests.models.tiny import language_model, siglip, tiny
from tests.test_step import assert_close, gradients_and_weights
from vlp.models import lengths
from vlp.models.concatenated import Concatenated
from vlp.models.embedding import embed
from vlp.types import Batch

ROWS, LENGTH = 40, 40
CAUSAL = {"name": "transformer", "width": 32, "layers": 2, "heads": 2, "context_length": LENGTH}
DEVICE = torch.device("cpu")


def ids_of(n_tokens: Any, length: int = LENGTH, end: int = 49407) -> Tensor:
    """Rows of that many random ids, the last of which ends the text, and padding."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.zeros(len(n_tokens), length, dtype=torch.long)
    for row, n in zip(ids, n_tokens):
        row[:n] = torch.randint(3, 14, (n,), generator=generator)
        row[n - 1] = end
    return ids


def some_ids(length: int = LENGTH, end: int = 49407) -> Tensor:
    """ROWS texts of 2 tokens up to the whole context, mostly short, in no order."""
    n_tokens = 2 + (np.arange(ROWS) * 17 % ROWS) ** 2 * (length - 2) // (ROWS - 1) ** 2
    assert n_tokens.min() == 2 and n_tokens.max() == length
    return ids_of(n_tokens, length, end)


def batch_of(ids: Tensor, **fields: Any) -> Batch:
    n = len(ids)
    image = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    return Batch(image, ids, torch.arange(n), [str(i) for i in range(n)], **fields)


def embedded(model: Any, batch: Batch, cut: bool, wanted=frozenset({"text"})) -> Any:
    """The fields wanted, the gradients of a function of all of them, and the texts' shapes in the
    tower.
    """
    shapes = []
    hook = model.text.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    model.cut_captions = cut
    model.zero_grad()
    fields = embed(model, batch, wanted)

    generator = torch.Generator().manual_seed(3)
    total: Any = 0
    for name in sorted(wanted):
        weights = torch.randn(fields[name].shape, generator=generator, dtype=torch.float64)
        total = total + (fields[name] * weights).sum()
    total.backward()
    hook.remove()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return SimpleNamespace(fields=fields, gradients=gradients, shapes=[tuple(s) for s in shapes])


def assert_same(one: Any, other: Any, n_gradients: int) -> None:
    for name, value in one.fields.items():
        torch.testing.assert_close(value, other.fields[name], rtol=0, atol=1e-5)
    assert one.gradients.keys() == other.gradients.keys()
    largest = max(value.abs().max() for value in other.gradients.values())
    for name, value in one.gradients.items():
        torch.testing.assert_close(value, other.gradients[name], rtol=0, atol=1e-5 * largest)
    assert len(one.gradients) >= n_gradients


def towers(folder: Any) -> dict[str, tuple[Any, int]]:
    """Models whose text towers do not look at padding, and the id that ends their texts."""
    language = {"name": "huggingface", "model": str(language_model(folder)), "pretrained": False}
    return {
        "causal": (tiny(text_tower=CAUSAL), 49407),
        "masked": (tiny(text_tower=language | {"context_length": 16}), 1),
        "first": (tiny(text_tower=language | {"context_length": 16, "pooler": "cls_pooler"}), 1),
    }


@pytest.mark.parametrize("kind", ["causal", "masked", "first"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_cut_texts_have_the_embeddings_and_gradients_of_padded_ones(kind, mode, tmp_path):
    model, end = towers(tmp_path)[kind]
    model.train(mode == "train")
    length = model.text_spec.context_length
    batch = batch_of(some_ids(length, end))
    padded, cut = embedded(model, batch, cut=False), embedded(model, batch, cut=True)

    assert padded.shapes == [(ROWS, length)]
    assert sum(n for n, _ in cut.shapes) == ROWS and len(cut.shapes) > 1
    assert all(n_tokens % lengths.STEP == 0 or n_tokens == length for _, n_tokens in cut.shapes)
    assert sum(n * n_tokens for n, n_tokens in cut.shapes) < ROWS * length * 0.8
    assert_same(cut, padded, n_gradients=20)


def test_a_tower_that_attends_to_padding_is_not_cut(tmp_path):
    model = tiny(image_tower=siglip(tmp_path), text_tower=None, embed_dim=None)
    assert lengths.spared_padding(model.text) is None
    batch = batch_of(some_ids(12, end=1))
    passed = embedded(model, batch, cut=True)
    assert passed.shapes == [(ROWS, 12)]
    with pytest.raises(ValueError, match=r"expected \[rows, 12\]"):
        model(text=batch.text[:, :8])


def test_which_open_clip_towers_are_cut():
    """By the class's own options, each built at the smallest size."""
    from open_clip.transformer import TextTransformer

    def padding(**options):
        sizes = {"context_length": 8, "vocab_size": 20, "width": 8, "heads": 1, "layers": 1}
        return lengths.spared_padding(TextTransformer(**sizes, **options))

    causal = {"argmax": 0, "eos": 0, "first": 0, "last": None}
    assert {pool: padding(pool_type=pool) for pool in causal} == causal

    # Ids above the end token's would be pooled instead of it.
    assert padding(pad_id=19) is None and padding(pad_id=19, pool_type="eos") == 19
    assert padding(embed_cls=True) is None
    assert padding(no_causal_mask=True) is None
    assert padding(no_causal_mask=True, use_pad_mask=True) == 0


def test_padding_that_open_clip_masks_is_cut():
    from open_clip.transformer import TextTransformer

    torch.manual_seed(0)
    tower = TextTransformer(
        LENGTH, 49408, 16, 2, 2, output_dim=8, no_causal_mask=True, use_pad_mask=True
    )
    ids = some_ids()
    cut = lengths.cut(ids.numpy(), 0, DEVICE)
    features, tokens = lengths.pass_in_parts(tower, ids, cut)
    assert len(cut.parts) > 1 and tokens is None
    torch.testing.assert_close(features, tower(ids), rtol=0, atol=1e-5)


def rich_batch(masked: int) -> Batch:
    """Pairs with hard captions and counterfactuals, of which every `masked`-th counts, and views of
    the texts.
    """
    texts = some_ids()
    numbers = torch.arange(ROWS)
    valid = numbers % masked == 0
    return batch_of(
        texts,
        negatives=torch.stack([texts.flip(0), texts.roll(3, 0)], 1),
        negatives_valid=torch.stack([valid, valid.roll(1)], 1),
        counterfactual=texts.roll(5, 0).unsqueeze(1),
        counterfactual_valid=valid,
        image_views=torch.zeros(ROWS, 1, 3, 32, 32, dtype=torch.uint8),
        text_views=texts.flip(0).unsqueeze(1),
    )


FIELDS = frozenset({"image", "text", "negatives", "counterfactual", "text_views", "image_views"})


@pytest.mark.parametrize("masked", [2, 1000])
def test_all_texts_of_a_batch_are_cut_together(masked):
    model = tiny(text_tower=CAUSAL, heads={"views": {"width": 24}})
    batch = rich_batch(masked)
    padded, cut = (embedded(model, batch, cut, FIELDS) for cut in (False, True))
    assert_same(cut, padded, n_gradients=30)

    n_taking_part = int(batch.negatives_valid.sum() + batch.counterfactual_valid.sum())
    assert sum(n for n, _ in cut.shapes) == 2 * ROWS + n_taking_part
    assert not cut.fields["negatives"][~batch.negatives_valid].any()
    assert cut.fields["negatives"][batch.negatives_valid].norm(dim=1).min() > 0.99


def test_the_decoder_of_captions_sees_the_tokens_in_their_places():
    """Its loss is compared where a term reads it: at the tokens that are no padding."""
    model = tiny(text_tower=CAUSAL, heads={"captions": {"layers": 1}})
    batch = batch_of(some_ids())
    is_token = batch.text[:, 1:] != 0

    losses = []
    for cut in (False, True):
        model.cut_captions = cut
        nll = embed(model, batch, {"image", "text", "caption_nll"})["caption_nll"]
        losses.append(nll[is_token])
        model.zero_grad()
        losses[-1].sum().backward()
        losses.append(model.text.token_embedding.weight.grad.clone())
    assert len(losses[0]) > ROWS
    torch.testing.assert_close(losses[2], losses[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(losses[3], losses[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_rows", [1, 7, 15, 16, 17, 33, 100])
def test_every_row_is_in_one_part_and_no_part_is_longer_than_it_must_be(n_rows):
    n_tokens = np.random.default_rng(n_rows).integers(1, 78, n_rows)
    ids = ids_of(n_tokens, 77).numpy()
    cut = lengths.cut(ids, 0, DEVICE)
    assert sorted(cut.order.tolist()) == list(range(n_rows))
    assert cut.order[cut.back].tolist() == list(range(n_rows))

    first = 0
    for n, length in cut.parts:
        of_part = n_tokens[cut.order[first : first + n]]
        assert of_part.max() <= length < of_part.max() + lengths.STEP
        first += n
    assert first == n_rows and len(cut.parts) <= lengths.PARTS
    assert min(n for n, _ in cut.parts) >= min(n_rows, lengths.LEAST_ROWS)


def test_a_text_of_padding_alone_keeps_one_token():
    ids = np.array([[0, 0, 0], [0, 5, 0], [1, 2, 3], [0, 0, 4]])
    assert lengths.used(ids, 0).tolist() == [1, 2, 3, 3]


def test_dropout_repeats_in_a_second_pass():
    """The step embeds twice with one seed: what was dropped must be the same."""
    from transformers import BertConfig

    assert BertConfig().hidden_dropout_prob == 0.1
    model = tiny(text_tower=CAUSAL).train()
    model.text.transformer.register_forward_hook(lambda _, args, out: torch.dropout(out, 0.5, True))
    batch = batch_of(some_ids())
    passes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        passes.append(embed(model, batch, {"text"})["text"])
    assert torch.equal(passes[0], passes[1]) and not torch.equal(passes[0], passes[2])


def test_the_device_is_asked_nothing():
    """On the meta device there is nothing to read: what asks for a value there fails."""
    model = tiny(text_tower=CAUSAL, heads={"views": {"width": 24}}).to("meta")
    batch = rich_batch(3)
    with pytest.raises(NotImplementedError):
        batch.negatives.to("meta")[batch.negatives_valid.to("meta")]

    first, second = batch.to("meta").split(2)
    for part in (first, second):
        fields = embed(model, part, FIELDS)
        assert fields["negatives"].shape == (ROWS // 2, 2, 48)
        assert fields["text"].device.type == "meta"
    assert torch.equal(second.host("text"), batch.text[ROWS // 2 :])

    # What is changed on the device has no old values on the host.
    changed = dataclasses.replace(batch.to("meta"), text=batch.text.roll(1, 0))
    assert torch.equal(changed.host("text"), batch.text.roll(1, 0))


def test_a_compiled_tower_meets_few_shapes():
    """However many hard captions count, in whatever lengths: the shapes of 20 batches are few, and
    the embeddings those of the others.
    """
    model = tiny(text_tower=CAUSAL)
    shapes: list[tuple[int, ...]] = []
    model.text.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    chance = torch.Generator().manual_seed(1)
    row_counts = set()
    for _ in range(20):
        texts = some_ids()[torch.randperm(ROWS, generator=chance)]
        valid = torch.rand(ROWS, 1, generator=chance) < torch.rand((), generator=chance)
        batch = batch_of(texts, negatives=texts.roll(1, 0)[:, None], negatives_valid=valid)
        fields = []
        for model.static_shapes in (False, True):
            shapes.clear()
            with torch.no_grad():
                fields.append(embed(model, batch, {"text", "negatives"}))

        row_counts.add(tuple(n for n, _ in shapes))
        for name in ("text", "negatives"):
            torch.testing.assert_close(fields[1][name], fields[0][name], rtol=0, atol=1e-5)

    # At most eight, of which those under the 40 texts that always count do not come.
    assert 2 <= len(row_counts) <= 5, row_counts


@pytest.mark.slow
def test_a_compiled_model_has_one_graph_and_a_second_for_all_other_lengths():
    model = tiny(text_tower=CAUSAL)
    model.static_shapes = True
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for longest in (8, 16, 24, 32, 40):
        ids = some_ids()
        ids[:, longest:] = 0
        fields = embed(compiled, batch_of(ids), {"image", "text"})
        expected = embed(model, batch_of(ids), {"image", "text"})
        torch.testing.assert_close(fields["text"], expected["text"], rtol=0, atol=1e-6)
    assert len(graphs) <= 2


def test_stages_cut_alike_or_not_at_all(tmp_path):
    members = [tiny(seed=seed, text_tower=CAUSAL) for seed in (1, 2)]
    batch = batch_of(some_ids())
    shapes = []
    members[1].text.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    with torch.no_grad():
        cut = embed(Concatenated(members), batch, {"text"})["text"]
        members[0].cut_captions = False
        padded = embed(Concatenated(members), batch, {"text"})["text"]
    torch.testing.assert_close(cut, padded, rtol=0, atol=1e-5)
    assert len(shapes) > 2 and shapes[-1] == (ROWS, LENGTH)

    members[1].padding = None
    assert Concatenated(members).cut(batch.text.numpy(), DEVICE, ROWS) is None


def test_the_switch():
    batch = batch_of(some_ids())
    for said in (True, False):
        model = tiny(text_tower=CAUSAL, cut_captions=said)
        assert model.cut_captions == said
        assert (model.cut(batch.text.numpy(), DEVICE, ROWS) is not None) == said


def many_rows(rows: slice) -> Batch:
    """The part of this rank of 64 texts, which is long enough to be cut into several parts."""
    from vlp import dist

    n_own = 64 // dist.world_size()
    own = slice(n_own * dist.rank(), n_own * (dist.rank() + 1))
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=generator)
    ids = ids_of(2 + (np.arange(64) * 17 % 64) ** 2 * 38 // 63**2)
    keys = [str(i) for i in range(64)]
    return Batch(images[own], ids[own], torch.arange(64)[own], keys[own])


def run(micro_batches: int = 1, engine: str = "ddp", **options: Any) -> Any:
    return gradients_and_weights(
        micro_batches, batch=many_rows, engine=engine, length=LENGTH, **options
    )


@pytest.fixture(scope="module")
def one_process():
    return run()


@pytest.mark.parametrize(
    ("engine", "checkpointing"),
    [
        ("ddp", False),
        ("fsdp2", True),
        pytest.param("fsdp2", False, marks=pytest.mark.slow),
        pytest.param("zero2", False, marks=pytest.mark.slow),
        pytest.param("zero3", False, marks=pytest.mark.slow),
    ],
)
def test_parts_change_nothing_in_any_engine(engine, checkpointing, one_process):
    """Two ranks, two micro-batches of 16 rows, each in two parts, and so two calls of every block
    in one of the model.
    """
    # DeepSpeed's are float32, in which AdamW's first steps make whole steps of rounding.
    exact = not engine.startswith("zero")
    options = {"checkpointing": checkpointing, "double": exact}
    for gradients, weights, _ in ranks.run(2, run_cut, 2, engine, options):
        tolerance, absolute = (1e-9, 1e-12) if exact else (1e-4, 1e-6)
        assert assert_close(gradients, one_process[0], tolerance, absolute) > 40
        if exact:
            assert_close(weights, one_process[1], tolerance)


def run_cut(micro_batches: int, engine: str, options: dict[str, Any]) -> Any:
    return run(micro_batches, engine, **options)
