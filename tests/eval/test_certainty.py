"""Retrieval over the share of queries that is most certain: by an adapter, and by the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.eval import material
from tests.eval.test_retrieval import CAPTIONS, evaluate, perfect
from tests.models.tiny import inputs, tiny
from vlp.eval import certainty, models
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError
from vlp.eval.tasks import retrieval
from vlp.models.certainty import Adapters, Form, save


@pytest.fixture()
def shards(tmp_path):
    samples = [(material.png(material.picture(i)), texts) for i, texts in enumerate(CAPTIONS)]
    return material.clip_benchmark_set(tmp_path / "set", samples, kind="retrieval")


def adapter(path, width=32):
    torch.manual_seed(0)
    adapters = Adapters(Form(width, hidden=16, model="a model"))
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save(adapters, path)
    return adapters.eval()


def half_right():
    """Texts of every other picture are said to be of the next one."""
    return material.known_encoder(
        lambda n: material.direction(n),
        lambda t: material.direction(int(t.split()[1]) // 2 * 2),
    )


def test_recalls_of_the_more_certain_are_a_count(shards, tmp_path):
    path = tmp_path / "adapter.safetensors"
    adapters = adapter(path)
    record, _ = evaluate(half_right(), data=str(shards), certainty=str(path))
    options = retrieval.Options(data=str(shards), certainty=str(path))
    assert set(retrieval.scores(options)) == record["metrics"].keys()

    texts = [text for of_image in CAPTIONS for text in of_image]
    rows = torch.stack([material.direction(int(t.split()[1]) // 2 * 2) for t in texts])
    certainties = adapters.certainty("text", torch.nn.functional.normalize(rows.float(), dim=1))
    hits = [int(t.split()[1]) % 2 == 0 for t in texts]
    # By a loop: queries of one certainty count as their mean.
    pairs = sorted(zip(certainties.tolist(), hits), reverse=True)
    means = [
        sum(hit for other, hit in pairs if other == value) / sum(o == value for o, _ in pairs)
        for value, _ in pairs
    ]
    for share in (0.9, 0.5, 0.1):
        n_kept = max(1, round(share * len(means)))
        expected = sum(means[:n_kept]) / n_kept
        found = record["metrics"][f"image_retrieval_recall@1_of_{share:.0%}"]
        assert found == pytest.approx(expected, abs=1e-4)
    assert -1 <= record["metrics"]["image_retrieval_certainty_spearman"] <= 1

    # What was there without it stays as it is.
    without, _ = evaluate(half_right(), data=str(shards))
    assert without["metrics"].items() <= record["metrics"].items()
    assert len(record["metrics"]) == len(without["metrics"]) + 20


def model_with(**heads):
    torch.manual_seed(0)
    model = tiny(heads=heads)
    if model.heads.concentration is not None:
        for side in ("image", "text"):
            torch.nn.init.normal_(getattr(model.heads.concentration, side)[-1].weight)
    return model


def test_a_model_says_its_own(shards):
    model = model_with(concentration={"init": 50.0})
    encoder = models.from_model(model)
    pixels, ids = inputs(model)
    with torch.no_grad():
        outputs = model(pixels, ids, pairs=3)
        image = certainty._as_direction(model.image_certainty(pixels))
        rows = torch.nn.functional.normalize(image, dim=1)
    torch.testing.assert_close(rows[:, 0] / rows[:, 1], outputs.image_concentration.log())
    assert outputs.text_concentration.unique().numel() == 3

    record, _ = evaluate(encoder, data=str(shards), certainty="model")
    assert "text_retrieval_recall@1_of_50%" in record["metrics"]

    # Of a run's texts and pictures in batches, as of each alone.
    texts = ["a dog", "a cat that is no dog", "two red circles"]
    context = Context(batch=2, workers=0, contents=Contents())
    read = retrieval.read(retrieval.Options(data=str(shards), certainty="model"))
    pictures = [one.picture for one in read.records[:3]]
    narrow = replace(encoder, width=8)
    found = certainty.of_queries("model", narrow, {}, pictures, texts, context)
    with torch.no_grad():
        alone = torch.cat([encoder.certainty[1]([text]) for text in texts])
    torch.testing.assert_close(found["text"], alone, rtol=1e-4, atol=1e-4)
    assert alone.unique().numel() == 3 and found["image"].unique().numel() == 3


def test_what_cannot_say_how_certain_it_is_is_refused(shards, tmp_path):
    path = tmp_path / "adapter.safetensors"
    adapter(path, width=8)
    trials = [
        (perfect(), str(path), "is of embeddings of 8 numbers .a model., and known has 32"),
        (perfect(), "model", "known does not say how certain its embeddings are"),
        (models.from_model(model_with()), "model", "does not say how certain"),
        (perfect(), str(tmp_path / "absent"), "absent holds no adapters .*, or model"),
    ]
    for encoder, place, expected in trials:
        with pytest.raises(DataError, match=expected):
            evaluate(encoder, data=str(shards), certainty=place)
    assert len(trials) == 4
