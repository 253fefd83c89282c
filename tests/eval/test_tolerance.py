"""Uniformity and tolerance of a labelled set, against loops over pairs in float64."""

import math

import numpy as np
import pytest

from tests.eval import material
from tests.eval.suite_material import CLASSES, write_wds
from vlp import plugin
from vlp.eval import evaluation
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError
from vlp.eval.tasks import tolerance


def evaluate(data, encoder, **options):
    chosen = plugin.keyed("vlp.eval.tasks", {"tolerance": {"data": str(data), **options}})
    return evaluation.evaluate(encoder, chosen, Context(workers=0, contents=Contents()))[0][0]


def image_row(number):
    return material.direction(CLASSES[number % 3]) + material.direction("picture", number)


def text_row(text):
    return material.direction(text.removeprefix("a ").rstrip("."))


def test_scores_equal_the_loops_over_pairs(tmp_path):
    root = write_wds(tmp_path, n=10)
    record = evaluate(root, material.known_encoder(image_row, text_row))

    rows = [image_row(i).double() for i in range(10)]
    rows = [row / row.norm() for row in rows]
    pairs = [(i, j) for i in range(10) for j in range(10) if i != j]
    cosines = {pair: float(rows[pair[0]] @ rows[pair[1]]) for pair in pairs}
    same = [cosines[i, j] for i, j in pairs if i % 3 == j % 3]
    kernel = [math.exp(-2 * (2 - 2 * cosine)) for cosine in cosines.values()]
    to_class = [
        float((row - material.direction(CLASSES[i % 3]).double()).square().sum())
        for i, row in enumerate(rows)
    ]
    expected = {
        "tolerance": sum(same) / len(same),
        "tolerance_all_pairs": sum(same) / len(pairs),
        "mean_cosine": sum(cosines.values()) / len(pairs),
        "uniformity_image": math.log(sum(kernel) / len(kernel)),
        "alignment": sum(to_class) / 10,
    }
    assert len(same) == 24 and expected["tolerance"] > expected["mean_cosine"] + 0.2
    assert record["metrics"] == pytest.approx(expected, abs=1e-6)
    assert tuple(record["metrics"]) == tolerance.SCORES
    assert record["chance"] == {} and record["data_sha256"]


def test_a_constant_encoder_is_tolerant_and_not_uniform(tmp_path):
    scores = evaluate(write_wds(tmp_path), material.constant())["metrics"]
    assert scores["tolerance"] == pytest.approx(1) == pytest.approx(scores["mean_cosine"])
    assert scores["uniformity_image"] == pytest.approx(0, abs=1e-5)


def test_a_set_without_pairs_of_one_class_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"one picture a class \(3 in all\)"):
        evaluate(write_wds(tmp_path / "few", n=3), material.constant())
    several = np.array([1, 1, 0])
    samples = [(material.png(material.picture(i)), several) for i in range(3)]
    write = material.clip_benchmark_set
    root = write(tmp_path / "many", samples, classes=CLASSES, kind="multilabel")
    with pytest.raises(DataError, match="several labels an image; tolerance needs one"):
        evaluate(root, material.constant())
