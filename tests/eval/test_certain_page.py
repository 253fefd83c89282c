"""The pages show R@1 of the most certain queries, and of each tenth of them."""

import json

import pytest
import torch

from tests.eval.page_material import Reader, make_run
from vlp import cli
from vlp.eval import certainty
from vlp.eval.report import certain, page

N_QUERIES = {"images": 37, "captions": 95}  # no multiples of ten
NAME = "text_retrieval_recall@1"


def drawn(n, seed=0):
    """Hits and certainties of queries; the certain ones hit more often."""
    generator = torch.Generator().manual_seed(seed)
    certainties = torch.rand(n, generator=generator, dtype=torch.float64)
    return torch.rand(n, generator=generator) < certainties, certainties


def record(seed=0, ways=("text", "image")):
    """What `retrieval certainty=` gives."""
    metrics = {}
    for way, n in zip(("text", "image"), N_QUERIES.values()):
        if way in ways:
            hits, certainties = drawn(n, seed)
            metrics[f"{way}_retrieval_recall@1"] = hits.double().mean().item()
            metrics |= certainty.scores(way, hits, certainties)
    chance = {NAME: 1 / N_QUERIES["captions"]}
    return {
        "label": "retrieval",
        "dataset": "pairs",
        "metrics": metrics,
        "counts": N_QUERIES,
        "chance": chance,
        "protocol": {"name": "retrieval", "version": 3, "options": {"certainty": "model"}},
        "data_sha256": "a",
    }


@pytest.mark.parametrize(
    "way, n", [("text", N_QUERIES["images"]), ("image", N_QUERIES["captions"])]
)
def test_tenths_are_what_each_share_has_beyond_the_one_before(way, n):
    hits, certainties = drawn(n)
    order = sorted(range(n), key=lambda query: -certainties[query])
    expected, before = [], 0
    for tenth in range(10, 0, -1):
        until = round((11 - tenth) / 10 * n)
        of_tenth = [float(hits[query]) for query in order[before:until]]
        expected.append((float(tenth), sum(of_tenth) / len(of_tenth)))
        before = until

    tenths = certain.by_tenth(record(), way)
    assert [place for place, _ in tenths] == list(range(1, 11))
    assert tenths == [(place, pytest.approx(value)) for place, value in reversed(expected)]

    shares = certain.shares_kept(record(), way)
    assert [share for share, _ in shares] == pytest.approx(list(range(10, 101, 10)))
    assert shares[-1][1] == pytest.approx(hits.double().mean().item())


def test_few_queries_and_unknown_numbers_give_no_false_tenths():
    hits, certainties = drawn(3)
    metrics = {NAME: hits.double().mean().item()} | certainty.scores("text", hits, certainties)
    few = {"metrics": metrics, "counts": {"images": 3, "captions": 3}}
    assert len(certain.by_tenth(few, "text")) == 3
    assert certain.by_tenth({"metrics": metrics}, "text") == []
    assert certain.shares_kept({"metrics": {NAME: 0.5}}, "text") == []
    assert certain.certainty([("run", [{"label": "a", "metrics": {NAME: 0.5}}])], None) is None


def test_the_page_of_a_run_shows_both_ways(tmp_path):
    run = make_run(tmp_path / "run", checkpoints=False)
    (run / "results.json").write_text(json.dumps([record()]))
    shown = Reader(page.write(run, with_model=False).read_text())
    assert list(shown.sections).index("certainty") == 3
    for title in ("images seek texts, kept", "texts seek images, by tenth"):
        assert title in shown.sections["certainty"]
    over = [attrs["data-over"] for tag, attrs in shown.tags if "data-over" in attrs]
    assert over.count("% kept") == over.count("tenth") == 2 and "step" in over


def test_queries_of_other_data_have_charts_of_their_own(tmp_path):
    records = [record(seed) for seed in (0, 1)]
    records[1] |= {"dataset": "others", "data_sha256": "b"}
    for seed, of_seed in enumerate(records):
        place = tmp_path / "ours" / str(seed)
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps([of_seed]))
    (tmp_path / "base.json").write_text(json.dumps(records[:1]))

    target = tmp_path / "arms.html"
    arms = [str(tmp_path / "base.json"), str(tmp_path / "ours")]
    assert cli.main(["report", "--compare", *arms, "--to", str(target)]) == 0
    shown = Reader(target.read_text())
    text = shown.sections["certainty"]
    for data in ("pairs", "others"):
        assert f"retrieval · {data} · images seek texts, kept" in text
    names = [attrs["data-name"] for tag, attrs in shown.tags if "data-name" in attrs]
    assert names.count("base.json") == 4 and names.count("ours") == 8


def test_arms_lie_in_one_chart_with_their_colors(tmp_path, capsys):
    # Two seeds of an arm are one curve; one arm was asked in one direction alone.
    for seed in (0, 1):
        place = tmp_path / "ours" / str(seed)
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps([record(seed)]))
    (tmp_path / "base.json").write_text(json.dumps([record(ways=("text",))]))

    target = tmp_path / "arms.html"
    arms = [str(tmp_path / "base.json"), str(tmp_path / "ours")]
    assert cli.main(["report", "--compare", *arms, "--to", str(target)]) == 0
    shown = Reader(target.read_text())
    names = [attrs["data-name"] for tag, attrs in shown.tags if "data-name" in attrs]
    assert names.count("base.json") == 2 and names.count("ours") == 4
    assert shown.count("i", class_="k0") == shown.count("i", class_="k1") == 1
    assert "base.json" in capsys.readouterr().out
