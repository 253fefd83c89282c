"""Terms over patches and tokens in the step: any number of ranks and micro-batches gives the
gradient of one process, and embeddings alone cost what they did.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import ranks
from tests.host_waits import HostWaits
from tests.test_step import (
    LENGTH,
    ROWS,
    assert_close,
    gradients_and_weights,
    make_batch,
    make_training,
)
from vlp.models.embedding import token_masks
from vlp.passes import embed, labels
from vlp.step import train_step

HEADS = {"regions": {"width": 8}}
OBJECTIVE = {
    "infonce": {},
    "fsc": {"weight": 0.5},
    "filip": {"scores": "apart", "weight": 0.5},
    "mil": {"weight": 0.5},
    "prior": {"weight": 0.5},
}


def texts(seed: int, *shape: int):
    """Ids of texts of 2 to 13 tokens, and a mask of two in three of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 400, (*shape, LENGTH), generator=generator)
    n_tokens = torch.randint(2, 14, shape, generator=generator).unsqueeze(-1)
    places = torch.arange(LENGTH)
    ids = torch.where(places < n_tokens - 1, ids, 0)
    ids = torch.where(places == n_tokens - 1, 49407, ids)
    return ids, torch.rand(shape, generator=generator) > 0.33


def batch_of_texts(rows=slice(None)):
    """`make_batch` with two hard captions and three sentences a sample, some of them valid."""
    (negatives, negatives_valid), (captions, captions_valid) = texts(7, ROWS, 2), texts(8, ROWS, 3)
    return dataclasses.replace(
        make_batch(rows),
        text=texts(9, ROWS)[0][rows],
        negatives=negatives[rows],
        negatives_valid=negatives_valid[rows],
        captions=captions[rows],
        captions_valid=captions_valid[rows],
    )


def run(micro_batches=1, engine="ddp", double=True):
    return gradients_and_weights(
        micro_batches,
        batch=batch_of_texts,
        engine=engine,
        heads=HEADS,
        objective=OBJECTIVE,
        double=double,
    )


@pytest.fixture(scope="module")
def reference():
    gradients, weights, loss = run()
    of_head = {name for name in gradients if name.startswith("heads.regions")}
    assert len(of_head) == 17 and all(any(gradients[name]) for name in of_head)
    return gradients, weights, loss


def test_micro_batches_change_nothing(reference):
    gradients, weights, loss = run(3)
    assert assert_close(gradients, reference[0], 1e-9) > 60
    assert_close(weights, reference[1], 1e-9)
    assert loss == pytest.approx(reference[2], rel=1e-9)


@pytest.mark.parametrize(
    "engine, micro_batches",
    [
        ("ddp", 2),
        pytest.param("fsdp2", 2, marks=pytest.mark.slow),
        pytest.param("zero1", 1, marks=pytest.mark.slow),
        pytest.param("zero3", 2, marks=pytest.mark.slow),
    ],
)
def test_ranks_change_nothing(engine, micro_batches, reference):
    # DeepSpeed's are float32, in which AdamW's first steps make whole steps of rounding.
    exact = not engine.startswith("zero")
    results = ranks.run(2, run, micro_batches, engine, exact)
    for gradients, weights, _ in results:
        tolerance, absolute = (1e-9, 1e-12) if exact else (1e-4, 1e-6)
        assert assert_close(gradients, reference[0], tolerance, absolute) > 60
        if exact:
            assert_close(weights, reference[1], 1e-9)
    means = [sum(losses) / 2 for losses in zip(*(result[2] for result in results))]
    assert means[0] == pytest.approx(reference[2][0], rel=1e-9 if exact else 1e-5)


def test_a_step_waits_for_nothing(monkeypatch):
    monkeypatch.setattr("vlp.pairwise.reduction.on_device", lambda tensor: True)
    kept = {"filip": {"keep": 0.5, "candidates": "rank"}}
    training = make_training(2, objective=OBJECTIVE | kept, heads=HEADS, double=False)
    batch = batch_of_texts()
    for _ in range(2):
        train_step(training, batch)
    with HostWaits() as waits:
        train_step(training, batch)
    assert waits.places == {}


def test_nothing_is_asked_of_the_towers_that_no_term_reads():
    training = make_training(objective={"infonce": {}})
    batch = batch_of_texts()
    embedded = embed(training, batch, 0)
    assert embedded.keys() == {"image", "text", "scale", "bias"}
    masks = token_masks(training.engine.model, batch, training.objective.reads)
    assert not masks and "text_tokens_valid" not in labels(training, [batch])
