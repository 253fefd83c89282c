"""Representation, k nearest neighbours and linear probe on sets whose answer is known."""

import json

import pytest
import torch

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation, probes
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError
from vlp.eval.tasks import linear_probe


def evaluate(task, encoder, **options):
    tasks = plugin.keyed("vlp.eval.tasks", {task: options})
    return evaluation.evaluate(encoder, tasks, Context(contents=Contents()))[0][0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    samples = [(material.png(material.picture(i)), [f"text {i}"]) for i in range(120)]
    return str(
        material.clip_benchmark_set(tmp_path_factory.mktemp("pairs"), samples, kind="retrieval")
    )


def number(text):
    return int(text.split()[1])


def test_equal_modalities_have_no_gap(pairs):
    same = material.known_encoder(
        lambda n: material.direction(n), lambda t: material.direction(number(t))
    )
    scores = evaluate("representation", same, data=pairs)["metrics"]
    assert scores["modality_gap"] == pytest.approx(0, abs=1e-6)
    assert scores["alignment"] == pytest.approx(0, abs=1e-6)
    # Every held-out pair is told the same on both sides.
    assert scores["linear_separability"] == 0.5
    assert scores["uniformity_image"] == pytest.approx(scores["uniformity_text"])
    assert 25 < scores["effective_rank_image"] <= 32
    assert scores["temperature"] == 1


def test_shifted_modalities_are_told_apart(pairs):
    shift = 3 * material.direction("shift")
    apart = material.known_encoder(
        lambda n: material.direction(n) + shift, lambda t: material.direction(number(t)) - shift
    )
    record = evaluate("representation", apart, data=pairs)
    assert record["metrics"]["linear_separability"] == 1
    assert record["metrics"]["modality_gap"] > 1.7
    assert record["intervals_95"]["linear_separability"][0] > 0.9
    assert record["counts"]["pairs"] == 120


def test_too_few_pairs_are_refused(tmp_path):
    samples = [(material.png(material.picture(i)), ["a"]) for i in range(4)]
    root = material.clip_benchmark_set(tmp_path, samples, kind="retrieval", n_shards=1)
    with pytest.raises(DataError, match="at least 5"):
        evaluate("representation", material.constant(), data=str(root))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Four classes, by picture number mod 4; the test pictures are others than the training
    pictures.
    """
    root = tmp_path_factory.mktemp("labelled")
    rows = [
        {"image": f"{i}.png", "class": f"class {i % 4}", "split": "train" if i < 80 else "test"}
        for i in range(120)
    ]
    material.write_tar(
        root / "t.tar", [(f"{i}.png", material.png(material.picture(i))) for i in range(120)]
    )
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "t.jsonl"


def clustered(spread):
    def image(n):
        return material.direction("class", n % 4) + spread * material.direction("own", n)

    return material.known_encoder(image, lambda t: material.direction(t))


@pytest.mark.parametrize("task", ["knn", "linear_probe"])
def test_probes_find_clusters_and_nothing_in_noise(task, labelled):
    options = {"data": str(labelled)} | ({"decays": [1e-3, 1e-1]} if task == "linear_probe" else {})
    record = evaluate(task, clustered(0.5), **options)
    assert record["metrics"]["acc1"] == record["metrics"]["mean_per_class_recall"] == 1
    assert record["counts"] == {"train_images": 80, "images": 40, "classes": 4, "skipped": 0}
    low, high = evaluate(task, clustered(1e6), **options)["intervals_95"]["acc1"]
    assert low < 0.25 + 0.1 and high > 0.25 - 0.1
    assert evaluate(task, material.constant(), **options)["metrics"]["acc1"] <= 0.25


def test_the_probe_chooses_its_decay_on_every_fifth_training_image_of_a_class(labelled):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 2
    rows = torch.randn(60, 30, generator=generator) + 0.4 * labels[:, None]
    held = torch.tensor([(i // 2) % 5 == 4 for i in range(60)])
    options = linear_probe.Options(data="", decays=[1e-3, 1e-1, 1e2])
    scores = {}
    for decay in options.decays:
        weight, bias = probes.logistic_regression(rows[~held], labels[~held], 2, decay)
        answers = (rows[held].double() @ weight.T + bias).argmax(1)
        scores[decay] = int((answers == labels[held]).sum())
    assert len(set(scores.values())) > 1
    assert scores[linear_probe.choose(rows, labels, 2, options)] == max(scores.values())
    assert (
        evaluate("linear_probe", clustered(3), data=str(labelled), decays=[1e-2])["metrics"][
            "decay"
        ]
        == 1e-2
    )


def test_splits_must_be_separate_and_have_the_same_classes(labelled, tmp_path):
    with pytest.raises(DataError, match="share pictures"):
        evaluate("knn", clustered(1), data=str(labelled), train_split="test")
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    rows[0]["class"] = "only here"
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.tar").symlink_to(labelled.with_suffix(".tar"))
    with pytest.raises(DataError, match="different classes: only here"):
        evaluate("knn", clustered(1), data=str(tmp_path / "t.jsonl"))


def test_the_constant_direction_is_one_vector():
    assert torch.equal(material.direction("same"), material.direction("same"))
    assert not torch.equal(material.direction("same"), material.direction("other"))
