"""SIMAT in its published layout, against the loop of its authors' protocol in float64."""

import csv
import math

import pytest
import torch

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError
from vlp.eval.tasks import simat

SUBJECTS, OBJECTS = ("dog", "cat", "cow"), ("sofa", "rug", "wall", "car")


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make(folder):
    """Two pictures of each of twelve scenes, every change of one word, an oracle that errs."""
    scenes = [(subject, thing) for subject in SUBJECTS for thing in OBJECTS]
    triplets, changes = [], []
    (folder / "images" / "images").mkdir(parents=True)
    for number in range(2 * len(scenes)):
        subject, thing = scenes[number % len(scenes)]
        region = 1000 - 7 * number
        row = {"region_id": region, "subj": subject, "rel": "on", "obj": thing}
        triplets.append({**row, "dataset_id": (5 * number) % 24})
        material.picture(number).save(folder / "images" / "images" / f"{region}.png")
        others = [(subject, other, "obj", thing, other) for other in OBJECTS if other != thing]
        others += [(other, thing, "subj", subject, other) for other in SUBJECTS if other != subject]
        for new_subject, new_thing, part, value, target in others:
            changes.append(
                {
                    "": len(changes),
                    "region_id": region,
                    "field": part,
                    "value": value,
                    "target": target,
                    "target_ids": scenes.index((new_subject, new_thing)),
                    "norm2": 1 + len(changes) % 9,
                    "is_test": len(changes) % 3 > 0,
                }
            )
    write(folder / "triplets.csv", triplets)
    write(folder / "transfos.csv", changes)
    oracle = torch.zeros(24, len(scenes))
    for number, row in enumerate(triplets):
        oracle[row["dataset_id"], number % len(scenes)] = 0.9
    oracle[3, :4] = 0.7
    torch.save(oracle, folder / simat.ORACLE)
    return triplets, changes, oracle


def rows_of(number):
    """A picture is its subject, its object, and something of its own."""
    subject, thing = SUBJECTS[number % 12 // 4], OBJECTS[number % 4]
    words = material.direction(subject) + material.direction(thing)
    vector = words + 1.2 * material.direction("picture", number)
    return torch.nn.functional.normalize(vector, dim=0)


def published(triplets, changes, oracle, step, wanted):
    """`eval.py` as a loop over the changes."""
    place = {row["region_id"]: i for i, row in enumerate(triplets)}
    images = [rows_of(i).double() for i in range(len(triplets))]
    score = total = share = 0.0
    for row in changes:
        if row["is_test"] is not wanted:
            continue
        moved = material.direction(row["target"]) - material.direction(row["value"])
        query = images[place[row["region_id"]]] + step * moved.double()
        others = [i for i in range(len(images)) if i != place[row["region_id"]]]
        best = max(others, key=lambda i, q=query: float(q @ images[i]))
        right = [float(oracle[triplets[i]["dataset_id"], row["target_ids"]]) > 0.5 for i in others]
        weight = 1 / math.sqrt(row["norm2"])
        score += weight * right[others.index(best)]
        share += weight * sum(right) / len(right)
        total += weight
    return score / total, share / total


def evaluate(folder, encoder, **options):
    chosen = plugin.keyed("vlp.eval.tasks", {"simat": {"data": str(folder), **options}})
    return evaluation.evaluate(encoder, chosen, Context(workers=0, contents=Contents()))[0][0]


@pytest.mark.parametrize("split", ["test", "dev"])
def test_the_score_equals_the_loop_of_its_authors(split, tmp_path):
    made = make(tmp_path)
    encoder = material.known_encoder(rows_of, material.direction)
    record = evaluate(tmp_path, encoder, split=split, lambdas=[0.4, 1, 2])

    scores = record["metrics"]
    assert list(scores) == ["simat", "simat_lambda_0.4", "simat_lambda_2"]
    for name, step in zip(scores, (1, 0.4, 2)):
        expected, by_guessing = published(*made, step, split == "test")
        assert scores[name] == pytest.approx(expected, abs=1e-12), name
        assert record["chance"][name] == pytest.approx(by_guessing)
    assert 0 < scores["simat_lambda_0.4"] < scores["simat"] < 1
    assert record["counts"]["changes"] == (80 if split == "test" else 40)

    # A constant encoder finds nothing: every tie goes against it.
    assert evaluate(tmp_path, material.constant(), split=split)["metrics"]["simat"] == 0


def test_what_is_wrong_with_the_folder_is_said(tmp_path):
    make(tmp_path)
    (tmp_path / "images" / "images" / "1000.png").unlink()
    with pytest.raises(DataError, match="1 of 24 annotations name images"):
        evaluate(tmp_path, material.constant())
    record = evaluate(tmp_path, material.constant(), missing="skip")
    assert record["counts"]["images"] == 23 and record["counts"]["skipped"] == 1

    torch.save(torch.zeros(24, 3), tmp_path / simat.ORACLE)
    with pytest.raises(DataError, match=r"holds \(24, 3\); expected a matrix of at least 24"):
        evaluate(tmp_path, material.constant(), missing="skip")
    (tmp_path / simat.ORACLE).write_bytes(b"version https://git-lfs")
    with pytest.raises(DataError, match=r"not whole \(23 bytes\); fetch it with `git lfs pull`"):
        evaluate(tmp_path, material.constant(), missing="skip")
    (tmp_path / simat.ORACLE).unlink()
    with pytest.raises(DataError, match="no oracle at"):
        evaluate(tmp_path, material.constant(), missing="skip")
    with pytest.raises(ValueError, match=r"lambdas is \[0\.0\]; expected numbers above 0"):
        evaluate(tmp_path, material.constant(), lambdas=[0.0])
    text = (tmp_path / "transfos.csv").read_text()
    (tmp_path / "transfos.csv").write_text(text.replace("1000,obj", "1001,obj"))
    with pytest.raises(DataError, match=r"expected a region_id of triplets\.csv"):
        evaluate(tmp_path, material.constant(), missing="skip")
    text = (tmp_path / "triplets.csv").read_text()
    row = text.splitlines()[1].rpartition(",")
    for wrong in ("-1", "first"):
        (tmp_path / "triplets.csv").write_text(text.replace("".join(row), f"{row[0]},{wrong}"))
        with pytest.raises(DataError, match=r"expected a dataset_id from 0, the picture's row"):
            evaluate(tmp_path, material.constant(), missing="skip")
    (tmp_path / "triplets.csv").unlink()
    with pytest.raises(DataError, match="no table at"):
        evaluate(tmp_path, material.constant())
