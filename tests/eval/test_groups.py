"""Worst groups, several questions of one set, the macro F1, WinoGAViL."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval import material
from tests.eval.suite_material import CLASSES, add_vectors, write_wds, write_winogavil
from vlp import plugin
from vlp.eval import confidence, evaluation, metrics
from vlp.eval.embed import Context
from vlp.eval.pictures import DataError
from vlp.eval.tasks import winogavil, zeroshot


def knower() -> Any:
    """Sees every picture's class, but for picture 1."""

    def image(number: int) -> torch.Tensor:
        return material.direction(CLASSES[0] if number == 1 else CLASSES[number % 3])

    return material.known_encoder(
        image, lambda text: material.direction(text.removeprefix("a ").rstrip("."))
    )


def evaluate(task: str, data: Path, **options: Any) -> Any:
    (chosen,) = plugin.keyed("vlp.eval.tasks", {task: {"data": str(data), **options}})
    context = Context(cache=None, progress=False, batch=8, workers=1)
    (record,), _ = evaluation.evaluate(knower(), [chosen], context)
    return record


def test_worst_group_of_a_vector_in_the_shards(tmp_path):
    root = write_wds(tmp_path / "fmow", with_vector=True)
    record = evaluate("grouped", root, group=0)

    # Picture 1 is the wrong one, of the odd group: 2 of 3 there, 3 of 3 in the even one.
    assert record["metrics"]["acc1"] == pytest.approx(5 / 6)
    assert record["metrics"]["acc1_group_0"] == 1.0
    assert record["metrics"]["worst_group_acc1"] == pytest.approx(2 / 3)
    assert record["intervals_95"]["worst_group_acc1"] == list(confidence.wilson(2, 3))
    of_groups = ("worst_group_acc1", "acc1_group_0", "acc1_group_1")
    assert [record["chance"][name] for name in of_groups] == pytest.approx([1 / 3] * 3)
    assert record["metrics"]["group_gap_acc1"] == pytest.approx(1 / 3)
    assert record["counts"]["groups"] == 2

    # F1 of cat: 2 right of 3 chosen and 2 true; of dog: 1 of 1 and 2; of hot dog all.
    expected = (4 / 5 + 2 / 3 + 1) / 3
    assert record["metrics"]["f1_macro"] == pytest.approx(expected)


def test_languages_of_one_prefix_and_one_called_mean_are_apart(tmp_path):
    n = 4
    for i in range(n):
        (tmp_path / f"{i}.jpg").write_bytes(material.png(material.picture(i)))
    (tmp_path / "test_image_names.txt").write_text("\n".join(f"{i}.jpg" for i in range(n)))
    # Of every language as many captions stand at their own picture as its number says.
    right = {"fi": 4, "fil": 2, "mean": 0}
    for language, n_right in right.items():
        said = [i if i < n_right else (i + 1) % n for i in range(n)]
        if n_right == 2:
            said = [0, 1, 3, 2]
        lines = "\n".join(f"{language} {number}" for number in said)
        (tmp_path / f"test_1kcaptions_{language}.txt").write_text(lines)

    encoder = material.known_encoder(
        lambda number: material.direction(number),
        lambda text: material.direction(int(text.split()[-1])),
    )
    (chosen,) = plugin.keyed("vlp.eval.tasks", {"multilingual": {"data": str(tmp_path)}})
    (record,), _ = evaluation.evaluate(encoder, [chosen], Context(workers=0))
    names = {"fi": "fi", "fil": "fil", "mean": "group:mean"}
    at_1 = "image_retrieval_recall@1"
    scores = {language: record["metrics"][f"{name}_{at_1}"] for language, name in names.items()}
    assert scores == {"fi": 1, "fil": 1 / 2, "mean": 0}
    assert record["metrics"][f"mean_{at_1}"] == pytest.approx(1 / 2)
    n_scores = [
        sum(key.startswith(f"{name}_") for key in record["metrics"]) for name in names.values()
    ]
    assert len(set(n_scores)) == 1 and n_scores[0] >= 6


def test_macro_f1_is_the_mean_over_the_classes_that_occur():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (40,), generator=generator).tolist()
    answers = torch.randint(8, (40,), generator=generator).tolist()

    # By its definition: 1 / F1 = (1 / precision + 1 / recall) / 2, and 0 without any hit.
    of_classes = []
    for number in sorted(set(labels)):
        hits = sum(pair == (number, number) for pair in zip(answers, labels))
        parts = [answers.count(number) / hits, labels.count(number) / hits] if hits else [0]
        of_classes.append(2 / sum(parts) if hits else 0)
    expected = sum(of_classes) / len(of_classes)

    assert len(of_classes) == 5 and 0 < expected < 1
    assert metrics.macro_f1(torch.tensor(answers), torch.tensor(labels)) == pytest.approx(expected)


def test_one_question_of_a_set_with_several(tmp_path):
    root = write_wds(tmp_path / "faces", with_vector=True)
    lines = ["age:young", "age:old", *(f"kind:{name}" for name in CLASSES)]
    (root / "classnames.txt").write_text("\n".join(lines))
    templates = root / "zeroshot_classification_templates.txt"
    templates.write_text("age:a {c} one.\nkind:a {c}.\n")
    add_vectors(root, [[i % 3, i % 2] for i in range(6)])

    record = evaluate("grouped", root, objective="kind", label=0, group=1)
    assert record["metrics"]["acc1"] == pytest.approx(5 / 6)
    assert record["counts"]["classes"] == 3 and record["counts"]["templates"] == 1
    asked = {"objective": "kind", "label": 0, "templates": ["{c}", "{c} there"]}
    assert evaluate("grouped", root, **asked)["counts"]["templates"] == 2
    with pytest.raises(DataError, match="leave out classes"):
        evaluate("grouped", root, **asked, classes=CLASSES)
    with pytest.raises(DataError, match="begin with 'race:'"):
        evaluate("grouped", root, objective="race", label=0)
    with pytest.raises(DataError, match="go together"):
        evaluate("grouped", root, objective="kind")
    with pytest.raises(DataError, match="no place 9"):
        evaluate("grouped", root, objective="kind", label=0, group=9)
    with pytest.raises(DataError, match="no 'region' noted"):
        evaluate("grouped", root, objective="kind", label=0, group="region")
    add_vectors(root, [[i % 3, float("nan")] for i in range(6)])
    for place in ({"label": 0, "group": 1}, {"label": 1}):
        with pytest.raises(DataError, match=r"(group|class) nan, expected a number"):
            evaluate("grouped", root, objective="kind", **place)


def test_every_class_has_the_mean_of_its_own_prompts(tmp_path):
    write_wds(tmp_path)
    sentences = {"cat": ["a cat", "one {}"], "dog": ["a dog."], "Hot dog": ["a hot dog."]}
    file = tmp_path / "cupl.json"
    file.write_text(json.dumps(sentences))
    (task,) = plugin.keyed("vlp.eval.tasks", {"zeroshot": {"data": str(tmp_path)}})
    options = replace(task.options, templates=str(file))
    data = zeroshot.read(options)

    encoder = material.random_encoder()
    context = Context(cache=None, progress=False, workers=1)
    rows = zeroshot.class_embeddings(encoder, data.templates, data.classes, context)
    cat = encoder.encode_texts(["a cat", "one cat"]).mean(0)
    assert torch.allclose(rows[0], cat / cat.norm(), atol=1e-6)
    assert torch.allclose(rows[1], encoder.encode_texts(["a dog."])[0], atol=1e-6)
    with pytest.raises(DataError, match="no prompts, e\\.g\\. 'hot dog'"):
        zeroshot.read(replace(options, templates={"cat": ["x"], "dog": ["y"]}))


def test_winogavil_scores_the_jaccard_index(tmp_path):
    write_winogavil(tmp_path)
    options = winogavil.Options(data=str(tmp_path))
    data = winogavil.read(options)
    right = {"An eagle": (0, 1), "A moss": (0, 1, 5)}

    def text(cue: str) -> torch.Tensor:
        return sum(material.direction(number) for number in right[cue])

    encoder = material.known_encoder(
        material.direction, lambda cue: torch.nn.functional.normalize(text(cue), dim=0)
    )
    context = Context(cache=None, progress=False, workers=1)
    result = winogavil.run(encoder, data, options, context)

    # Two of two; of three two are right and four are in the union.
    scores = {name: confidence.score(items) for name, items in result.items.items()}
    assert scores == {"jaccard": 0.75, "jaccard_5-6": 1.0, "jaccard_10-12": 0.5}
    assert winogavil.chance(5, 2) == pytest.approx(0.1 * 1 + 0.6 / 3)
    assert winogavil.jaccard(torch.zeros(4), torch.tensor([True, False, False, True]), 1e-6) == 0
