"""Retrieval with grades: lists, measures and chance against loops in float64; CxC's layout."""

import itertools
import json
import math

import pytest

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation, ranked
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError

GRADES = [(0, 0, 5.0), (0, 1, 3.0), (1, 1, 4.5), (1, 2, 0.0), (2, 2, 2.0), (2, 0, 1.0), (3, 4, 0.0)]


def evaluate(data, encoder=None, **options):
    chosen = plugin.keyed("vlp.eval.tasks", {"graded": {"data": str(data), **options}})
    context = Context(workers=0, contents=Contents())
    return evaluation.evaluate(encoder or material.random_encoder(), chosen, context)[0][0]


def write(folder, header="text,image,grade", name="judged.csv", text="say {}"):
    """Four texts and five pictures, seven judgements."""
    for number in range(5):
        (folder / f"{number}.png").write_bytes(material.png(material.picture(number)))
    lines = [f"{text.format(t)},{image}.png,{grade}" for t, image, grade in GRADES]
    path = folder / name
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def of_one_query(order, grades, k, highest, persistence):
    """The three measures of one order of candidates, from their definitions."""
    best = sorted(grades.values(), reverse=True)[:k]
    ideal = sum(gain / math.log2(1 + rank) for rank, gain in enumerate(best, 1))
    dcg = err = rbp = 0.0
    reads_on = 1.0
    for rank, candidate in enumerate(order[:k], 1):
        gain = grades.get(candidate, 0.0)
        dcg += gain / math.log2(1 + rank)
        stops = (2**gain - 1) / 2**highest
        err += reads_on * stops / rank
        reads_on *= 1 - stops
        rbp += (1 - persistence) * gain / highest * persistence ** (rank - 1)
    return {"ndcg": dcg / ideal, "err": err, "rbp": rbp}


@pytest.mark.parametrize("k", [1, 2, 10])
def test_measures_both_ways_equal_the_loops(k, tmp_path):
    record = evaluate(write(tmp_path), k=k, persistence=0.8)
    texts = [material.direction(0, "text", f"say {i}").double() for i in range(4)]
    images = [material.direction(0, "image", i).double() for i in range(5)]

    # The fourth text is judged, and nothing is right for it; picture 3 nobody has judged.
    shown = [0, 1, 2, 4]
    n_scores = 0
    for way, asked, sought, candidates in (
        ("image_retrieval", texts, images, shown),
        ("text_retrieval", images, texts, [0, 1, 2, 3]),
    ):
        sums = {"ndcg": 0.0, "err": 0.0, "rbp": 0.0}
        for query in range(3):
            pairs = [(t, i) if way == "image_retrieval" else (i, t) for t, i, _ in GRADES]
            grades = {j: grade for (q, j), (_, _, grade) in zip(pairs, GRADES) if q == query}
            order = sorted(candidates, key=lambda j, q=query: -float(asked[q] @ sought[j]))
            for name, value in of_one_query(order, grades, k, 5.0, 0.8).items():
                sums[name] += value / 3
        for name, value in sums.items():
            assert record["metrics"][f"{way}_{name}@{k}"] == pytest.approx(value), (way, name)
            n_scores += 1
        assert record["counts"][f"{way}_without_answer"] == 1
    assert n_scores == len(record["metrics"]) == len(record["chance"]) == 6


def test_chance_is_the_mean_over_all_orders():
    grades = {0: 3.0, 1: 1.0, 2: 0.5}
    orders = list(itertools.permutations(range(6)))
    for k in (1, 2, 4, 6):
        means = {"ndcg": 0.0, "err": 0.0, "rbp": 0.0}
        for order in orders:
            for name, value in of_one_query(order, grades, k, 3.0, 0.7).items():
                means[name] += value / len(orders)
        expected = {f"{name}@{k}": value for name, value in means.items()}
        chance = ranked.graded_chance(list(grades.values()), 6, k, 3.0, 0.7)
        assert chance == pytest.approx(expected)
    assert len(orders) == 720

    # Long lists among many candidates: the numbers of ways leave the range of floats.
    assert 0 < ranked.graded_chance([1.0] * 5, 50_000, 300, 1.0, 0.9)["err@300"] < 0.01


def test_of_equal_scores_the_lowest_grade_stands_first():
    same = material.direction("same").expand(4, 32)
    (gains,) = ranked.graded(same[:1], same, [{0: 2.0, 1: 1.0, 3: 3.0}], 4)
    assert gains.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("karpathy", [False, True])
def test_crisscrossed_captions_as_published(karpathy, tmp_path):
    header = "caption,image,agg_score"
    table = write(tmp_path, header, "sits_val.csv", "COCO_val2014:sentid:{}")
    with pytest.raises(DataError, match=r"annotations=captions_val2014\.json"):
        evaluate(table)

    if karpathy:
        sentences = [{"sentid": i, "raw": f"say {i}"} for i in range(4)]
        content = {"images": [{"sentences": sentences[:1]}, {"sentences": sentences[1:]}]}
    else:
        content = {"annotations": [{"id": i, "caption": f"say {i}"} for i in range(4)]}
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(content))
    scores = evaluate(table, annotations=str(file))["metrics"]
    (tmp_path / "plain").mkdir()
    assert scores == evaluate(write(tmp_path / "plain"))["metrics"]

    file.write_text(json.dumps({"annotations": [{"id": 0, "caption": "say 0"}]}))
    with pytest.raises(DataError, match="row 3: the annotations have no caption"):
        evaluate(table, annotations=str(file))


def test_what_is_wrong_with_a_table_is_said(tmp_path):
    path = write(tmp_path)
    good = path.read_text()
    cases = {
        "say 9,9.png,1": "1 of 8 annotations name images",
        "say 0,0.png,4": "grade 5.0 in an earlier row and 4.0 here",
        "say 0,0.png,-1": "the grade is -1, expected 0 to 1000",
        "say 0,0.png,good": "the grade is '(5.0|5|good)', expected a number",
        ",0.png,4": "row 8: found nothing in text",
        "say 0,,4": "row 8: found nothing in image",
    }
    for line, message in cases.items():
        path.write_text(f"{good}{line}\n")
        with pytest.raises(DataError, match=message):
            evaluate(path)
    path.write_text(good.replace("grade", "stars"))
    with pytest.raises(DataError, match="grade_column=NAME"):
        evaluate(path)
    assert evaluate(path, grade_column="stars")["counts"]["judgements"] == 7
    path.write_text("text,image,grade\nsay 0,0.png,0\n")
    with pytest.raises(DataError, match="every grade is 0"):
        evaluate(path)
    path.write_text("text,image,grade\n")
    with pytest.raises(DataError, match="row"):
        evaluate(path)
    with pytest.raises(ValueError, match="k is 0 and persistence"):
        evaluate(path, k=0)
    assert len(cases) == 6
