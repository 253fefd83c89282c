"""Effective robustness against a fit in float64; references in every form; what is refused."""

import json
import math

import numpy as np
import pytest

from tests.eval import material
from tests.eval.suite_material import CLASSES, write_wds
from vlp import plugin
from vlp.eval import evaluation, robustness
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError
from vlp.eval.report import records

POINTS = [(0.3, 0.2), (0.5, 0.32), (0.62, 0.5), (0.8, 0.61)]


def evaluate(root, missed=(1,), **options):
    """Picture i of the standard set is picture i of the shifted one, and some are missed."""

    def image(number):
        return material.direction(CLASSES[(number % 3 + (number in missed)) % 3])

    encoder = material.known_encoder(
        image, lambda text: material.direction(text.removeprefix("a ").rstrip("."))
    )
    tree = {"data": str(root / "plain"), "shifted": str(root / "moved"), **options}
    chosen = plugin.keyed("vlp.eval.tasks", {"robustness": tree})
    data = evaluation.read_all(chosen)
    return evaluation.evaluate(encoder, chosen, Context(workers=0, contents=Contents()), data)


@pytest.fixture
def sets(tmp_path):
    write_wds(tmp_path / "plain", n=12)
    write_wds(tmp_path / "moved", n=6)
    lines = [f"{standard},{shifted}" for standard, shifted in POINTS]
    (tmp_path / "table.csv").write_text("\n".join(["standard,shifted", *lines]))
    return tmp_path


def logit(share):
    return math.log(share / (1 - share))


def test_the_score_is_the_distance_from_the_line_in_logits(sets):
    ((record,), _) = evaluate(sets, reference=str(sets / "table.csv"))
    xs, ys = ([logit(point[side]) for point in POINTS] for side in (0, 1))
    slope, intercept = np.polyfit(xs, ys, 1)
    expected = 1 / (1 + math.exp(-(intercept + slope * logit(11 / 12))))

    scores = record["metrics"]
    assert scores["acc1_standard"] == pytest.approx(11 / 12)
    assert scores["acc1_shifted"] == pytest.approx(5 / 6)
    assert scores["expected_acc1_shifted"] == pytest.approx(expected)
    assert scores["effective_robustness"] == pytest.approx(5 / 6 - expected)
    off = [y - 1 / (1 + math.exp(-(intercept + slope * x))) for x, (_, y) in zip(xs, POINTS)]
    assert scores["reference_residual"] == pytest.approx(math.sqrt(np.mean(np.square(off))))

    low, high = record["intervals_95"]["effective_robustness"]
    assert low < scores["effective_robustness"] < high
    assert record["chance"] == {"acc1_standard": 1 / 3, "acc1_shifted": 1 / 3}
    assert record["counts"]["reference_models"] == 4
    assert robustness.fit(POINTS).lowest == 0.3


def test_accuracies_of_zero_and_one_stay_finite(sets):
    for missed in ((), range(12)):
        ((record,), _) = evaluate(sets, missed, reference=str(sets / "table.csv"))
        bounds = record["intervals_95"]["effective_robustness"]
        assert all(map(math.isfinite, [*record["metrics"].values(), *bounds]))
        assert record["metrics"]["acc1_standard"] == (0.0 if missed else 1.0)


def test_results_of_several_models_are_a_reference(sets):
    """Files of this task without a line, of two zero-shot tasks, and a folder of both."""
    folder = sets / "models"
    pairs = []
    for number, missed in enumerate([(1, 6), (0, 1, 2, 7, 8)]):
        found, items = evaluate(sets, missed)
        assert "effective_robustness" not in found[0]["metrics"]
        records.write(folder / f"{number}.json", found, items)
        pairs.append(tuple(found[0]["metrics"].values()))
    of_zeroshot = [
        {"label": "a", "dataset": "plain", "metrics": {"acc1": 0.5}},
        {"label": "b", "dataset": "moved", "metrics": {"acc1": 0.4}},
    ]
    (folder / "other.json").write_text(json.dumps({"results": of_zeroshot}))

    line = robustness.read(str(folder), ("plain", "moved"))
    assert line == robustness.fit([*pairs, (0.5, 0.4)]) and line.n == 3
    some = [str(folder / "0.json"), str(folder / "other.json")]
    assert robustness.read(some, ("plain", "moved")).n == 2
    (folder / "other.json").write_text(json.dumps(of_zeroshot))  # as a run leaves its results
    assert robustness.read(str(folder), ("plain", "moved")) == line
    with pytest.raises(DataError, match=r"has no acc1 on elsewhere, only results on plain, moved"):
        robustness.read(str(folder / "other.json"), ("plain", "elsewhere"))


def test_what_is_wrong_is_said_before_a_model_is_asked(sets):
    table = sets / "table.csv"
    cases = {
        "standard,shifted\n.5,.4\n": "found 1 reference models with 1 different standard",
        "standard,shifted\n.5,.4\n.5,.3\n": "with 1 different standard accuracies",
        "standard,shifted\n50,40\n60,50\n": r"an accuracy is 50, expected a share",
        "model,standard\na,.5\n": "lacks shifted",
    }
    for text, message in cases.items():
        table.write_text(text)
        with pytest.raises(DataError, match=message):
            evaluate(sets, reference=str(table))
    other = sets / "other.json"
    for text in ("[1, 2]", '[{"metrics": null}]', '{"results": []}'):
        other.write_text(text)
        with pytest.raises(DataError, match=r"other\.json"):
            evaluate(sets, reference=str(other))
    (sets / "nothing").mkdir()
    with pytest.raises(DataError, match=r"is a folder without a \.json"):
        evaluate(sets, reference=str(sets / "nothing"))
    with pytest.raises(DataError, match="no reference at"):
        evaluate(sets, reference=str(sets / "nowhere.csv"))
    with pytest.raises(DataError, match="give the other as shifted=PATH"):
        evaluate(sets, shifted="")
    (sets / "moved" / "classnames.txt").write_text("cat\ndog\nfox\n")
    with pytest.raises(DataError, match="have different classes: fox, hot dog"):
        evaluate(sets)
    assert len(cases) == 4
