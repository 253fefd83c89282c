"""Choices among pictures and texts: against loops, chance of every shape, tables of all kinds."""

import itertools
import json

import pyarrow
import pytest
import torch
from pyarrow import parquet

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation, grids
from vlp.eval.embed import Context
from vlp.eval.grids import Grid
from vlp.eval.pictures import Contents, DataError, Picture

RIGHTS = [
    (((0,),), 4),
    (((0, 1),), 3),
    (((0,), (1,)), 2),
    (((0,), (1,)), 3),
    (((0,), (1,), (2,)), 3),
    (((0, 2), ()), 3),
]


def loop(scores, right, which):
    """(text, image) by the definition, item by item."""
    reach = min if which == "all" else max
    belongs = [[c in of_picture for c in range(len(scores[0]))] for of_picture in right]

    def chosen(values, marks):
        rights = [v for v, mark in zip(values, marks) if mark]
        wrongs = [v for v, mark in zip(values, marks) if not mark]
        return not rights or not wrongs or reach(rights) > max(wrongs)

    by_text = all(chosen(*pair) for pair in zip(scores, belongs))
    return by_text, all(chosen(*pair) for pair in zip(zip(*scores), zip(*belongs)))


@pytest.mark.parametrize("which", ["all", "any"])
def test_hits_and_chance_equal_the_loop_over_all_orders(which):
    generator = torch.Generator().manual_seed(0)
    for right, n_texts in RIGHTS:
        shape = (len(right), n_texts)
        grid = Grid((Picture("p"),) * shape[0], ("t",) * n_texts, right)
        scores = list(torch.rand(200, *shape, generator=generator, dtype=torch.float64))
        expected = [loop(s.tolist(), right, which) for s in scores]
        found = grids.hits(scores, [grid] * 200, which)
        text = found.get("text_acc", found["acc"])
        assert text.tolist() == [float(by_text) for by_text, _ in expected]
        if shape[0] > 1:
            assert found["image_acc"].tolist() == [float(by_image) for _, by_image in expected]
            assert found["acc"].tolist() == [float(a and b) for a, b in expected]

        # Chance is the share of all orders, or of drawn ones.
        chance = grids.chance(right, n_texts, which)
        if shape[0] * n_texts <= 6:
            orders = list(itertools.permutations(range(shape[0] * n_texts)))
            outcomes = [loop(torch.tensor(o).view(shape).tolist(), right, which) for o in orders]
            both = [a and (b or shape[0] == 1) for a, b in outcomes]
            assert chance["acc"] == pytest.approx(sum(both) / len(orders))
            assert chance["text_acc"] == pytest.approx(sum(a for a, _ in outcomes) / len(orders))
        else:
            assert 0 < chance["acc"] <= min(chance["text_acc"], chance["image_acc"])
    assert grids.chance(((0,), (1,)), 2, "all") == {
        "text_acc": 1 / 4,
        "image_acc": 1 / 4,
        "acc": pytest.approx(1 / 6),
    }


def evaluate(task, encoder, **options):
    chosen = plugin.keyed("vlp.eval.tasks", {task: options})
    return evaluation.evaluate(encoder, chosen, Context(workers=0, contents=Contents()))[0][0]


def knows() -> material.Encoder:
    """Picture n is near every text that ends in n."""
    return material.known_encoder(
        lambda n: material.direction(n), lambda text: material.direction(int(text.split()[-1]))
    )


def pictures(folder, n):
    for i in range(n):
        path = folder / f"a b/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(material.png(material.picture(i)))
    return folder


def test_anybody_can_write_choices_as_a_table(tmp_path):
    images = pictures(tmp_path / "images", 4)
    rows = [
        {"images": ["a b/0.png", "a b/1.png"], "texts": ["see 0", "see 1"], "group": "pairs"},
        {"image": "a b/2.png", "texts": ["see 3", "see 2"], "right": 1, "group": "one"},
        {"image": "a b/3.png", "texts": ["a 3", "b 3", "no 1"], "right": [0, 1], "group": "one"},
        {"image": "a b/3.png", "texts": ["no 1", "see 3"], "group": "one"},
    ]
    tables = [tmp_path / name for name in ("t.jsonl", "t.json", "t.csv")]
    tables[0].write_text("\n".join(map(json.dumps, rows)))
    tables[1].write_text(json.dumps(rows))
    tables[2].write_text(
        "image_1,image_2,text_1,text_2,text_3,right,group\n"
        "a b/0.png,a b/1.png,see 0,see 1,,,pairs\n"
        "a b/2.png,,see 3,see 2,,1,one\n"
        'a b/3.png,,a 3,b 3,no 1,"[0, 1]",one\n'
        "a b/3.png,,no 1,see 3,,0,one\n"
    )
    records = [evaluate("choices", knows(), data=str(t), images=str(images)) for t in tables]
    for record in records:
        # The last item names the wrong text.
        assert record["metrics"]["acc"] == 3 / 4
        assert record["metrics"]["one"] == pytest.approx(2 / 3)
        assert record["metrics"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
        assert record["chance"]["pairs"] == pytest.approx(1 / 6)
        assert record["chance"]["acc"] == pytest.approx((1 / 6 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
        assert record["counts"] == {"items": 4, "skipped": 0}
    assert len(records) == 3

    one = tmp_path / "one.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"image": "0.png", "texts": ["0", "1"]}]), one)
    record = evaluate("choices", knows(), data=str(one), images=str(images))
    assert record["metrics"] == {"acc": 1} and record["chance"] == {"acc": 1 / 2}
    assert evaluate("choices", material.constant(), data=str(one), images=str(images))[
        "metrics"
    ] == {"acc": 0}


def test_groups_keep_their_names_and_what_guessing_gives_them(tmp_path):
    """Groups of other sizes and shapes, some called as scores are, or not at all."""
    images = pictures(tmp_path / "images", 1)
    n_texts = {"mean": [2], "acc": [4, 4, 4], "": [3], "group:mean": [2, 5], "täst a": [2]}
    rows = []
    for group, numbers in n_texts.items():
        rows += [{"image": "0.png", "texts": ["see 0"] * n, "group": group} for n in numbers]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = str(tmp_path / "t.jsonl")
    record = evaluate("choices", material.constant(), data=table, images=str(images))

    marked = {"mean": "group:mean", "acc": "group:acc", "": "group:"}
    marked |= {"group:mean": "group:group:mean", "täst a": "täst a"}
    of_groups = {g: sum(1 / n for n in numbers) / len(numbers) for g, numbers in n_texts.items()}
    assert len({*marked.values()}) == 5
    assert set(record["metrics"]) == {"acc", "mean", *marked.values()}
    for group, expected in of_groups.items():
        assert record["chance"][marked[group]] == pytest.approx(expected)
    assert record["chance"]["mean"] == pytest.approx(sum(of_groups.values()) / 5)
    pooled = [1 / n for numbers in n_texts.values() for n in numbers]
    assert record["chance"]["acc"] == pytest.approx(sum(pooled) / len(pooled))
    assert record["chance"]["acc"] != pytest.approx(record["chance"]["mean"], rel=0.01)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "0.png", "texts": ["a"], "right": 1}, "from 0 to 0"),
        ({"image": "0.png", "texts": ["a", "b"], "right": [[0], [1]]}, "right is"),
        ({"images": ["0.png", "1.png"], "texts": ["a"], "right": None}, "from 0 to 0"),
        ({"image": "0.png"}, "expected texts"),
        ({"texts": ["a", "b"]}, "expected images"),
        ({"image": "0.png", "texts": "a b"}, "no JSON list"),
        ({"image": "9.png", "texts": ["a", "b"]}, "images that are not in"),
    ],
)
def test_items_that_cannot_be_scored_are_named(tmp_path, row, message):
    images = pictures(tmp_path / "images", 2)
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        evaluate("choices", knows(), data=str(tmp_path / "t.jsonl"), images=str(images))
