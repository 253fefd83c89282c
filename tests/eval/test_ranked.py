"""Measures of ranked lists against loops from their definitions, and ECCV Caption's files."""

import itertools
import json
import math

import pytest
import torch

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation, ranked
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError


def test_lists_and_their_measures_equal_the_loops():
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(42, 8, generator=generator), dim=1)
    queries, candidates = rows[:12], rows[12:]
    right = [sorted({(i * 7) % 30, (i * 5) % 30, i}) for i in range(12)]
    lists = list(ranked.found(queries, candidates, right, 10))
    for query, places, hits in zip(queries, right, lists):
        scores = (candidates.double() @ query.double()).tolist()
        order = sorted(range(30), key=lambda j, s=scores: -s[j])
        assert hits.tolist() == [j in places for j in order[:10]]

        n_right = len(places)
        precisions = [sum(j in places for j in order[:r]) / r for r in range(1, n_right + 1)]
        marks = [order[r] in places for r in range(n_right)]
        expected = sum(p for p, mark in zip(precisions, marks) if mark) / n_right
        assert ranked.map_at_r(hits, n_right) == pytest.approx(expected)
        assert ranked.r_precision(hits, n_right) == pytest.approx(precisions[-1])
    assert len(lists) == 12

    same = material.direction("same").expand(5, 32)
    (hits,) = ranked.found(same[:1], same, [[0, 1]], 2)
    assert not hits.any()


def test_chance_is_the_mean_over_all_orders():
    orders = list(itertools.permutations([1, 1, 1, 0, 0, 0]))
    for k in (1, 2, 6):
        means = {f"recall@{k}": 0.0, "r_precision": 0.0, "map_at_r": 0.0}
        for order in orders:
            hits = torch.tensor(order, dtype=torch.bool)
            means[f"recall@{k}"] += float(hits[:k].any()) / len(orders)
            means["r_precision"] += ranked.r_precision(hits, 3) / len(orders)
            means["map_at_r"] += ranked.map_at_r(hits, 3) / len(orders)
        assert ranked.chance(3, 6, k) == pytest.approx(means)
    assert len(orders) == 720


def test_graded_measures_equal_their_definitions():
    gains = torch.tensor([1.0, 0.0, 3.0, 2.0])
    every_gain = torch.tensor([0.0, 3.0, 2.0, 1.0, 0.0, 3.0])
    dcg = sum(g / math.log2(1 + r) for r, g in enumerate(gains.tolist(), 1))
    ideal = sum(g / math.log2(1 + r) for r, g in enumerate([3, 3, 2, 1], 1))
    assert ranked.ndcg(gains, every_gain, 4) == pytest.approx(dcg / ideal)
    assert ranked.ndcg(gains, torch.zeros(4), 4) == 0

    # One right answer at rank 3: nDCG is 1 / log2(1 + rank).
    one = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert ranked.ndcg(one, one, 4) == pytest.approx(1 / 2)

    left, err, rbp = 1.0, 0.0, 0.0
    for rank, gain in enumerate(gains.tolist(), 1):
        stops = (2**gain - 1) / 2**3
        err += left * stops / rank
        left *= 1 - stops
        rbp += 0.2 * (gain / 3) * 0.8 ** (rank - 1)
    assert ranked.expected_reciprocal_rank(gains, 3) == pytest.approx(err)
    assert ranked.rank_biased_precision(gains / 3, 0.8) == pytest.approx(rbp)


def eccv(folder):
    """Two photos of one thing: the second is right too, but only ECCV and CxC know it."""
    images, annotations = [], []
    for i in range(4):
        (folder / f"COCO_val2014_{i}.png").write_bytes(material.png(material.picture(i)))
        images.append({"id": 10 + i, "file_name": f"COCO_val2014_{i}.png"})
        annotations.append({"id": 100 + i, "caption": f"see {i}"})
    coco = {"images": images, "annotations": annotations}
    (folder / "captions_val2014.json").write_text(json.dumps(coco))
    for name, more in (("original", []), ("cxc", [0]), ("eccv", [0])):
        to_caption = {10 + i: [100 + i] + [101] * (i in more) for i in range(4)}
        if name == "eccv":
            to_caption[10].append(103)
        to_image = {100 + i: [10 + i] + [11] * (i in more) for i in range(4)}
        (folder / f"{name}_image_to_caption.json").write_text(json.dumps(to_caption))
        (folder / f"{name}_caption_to_image.json").write_text(json.dumps(to_image))


def test_eccv_captions_files_are_scored_with_all_right_answers(tmp_path):
    eccv(tmp_path)

    # Picture 0 is nearest to caption 1, then to caption 0.
    near = {0: material.direction(0) + 1.5 * material.direction(1)}
    encoder = material.known_encoder(
        lambda n: near.get(n, material.direction(n)),
        lambda text: material.direction(int(text.split()[1])),
    )
    chosen = plugin.keyed("vlp.eval.tasks", {"eccv_caption": {"data": str(tmp_path)}})
    (record,), _ = evaluation.evaluate(encoder, chosen, Context(workers=0, contents=Contents()))
    scores = record["metrics"]
    assert scores["original_text_retrieval_recall@1"] == 3 / 4
    assert scores["cxc_text_retrieval_recall@1"] == scores["eccv_text_retrieval_recall@1"] == 1
    # Two of picture 0's three are the first two; in float32 their share would be off by 1e-8.
    for measure in ("map_at_r", "r_precision"):
        assert scores[f"eccv_text_retrieval_{measure}"] == pytest.approx(11 / 12, abs=1e-12)
    assert record["chance"].keys() == scores.keys()
    assert scores["eccv_image_retrieval_map_at_r"] <= 1 and len(scores) == 22
    (tmp_path / "eccv_image_to_caption.json").unlink()
    with pytest.raises(DataError, match="no annotations at"):
        evaluation.read_all(chosen)
