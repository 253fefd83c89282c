"""Arms side by side: means and deviations over seeds, distances paired over what was evaluated."""

import itertools
import json

import pytest
import torch

from tests.eval import material
from vlp import cli, config
from vlp.eval import confidence
from vlp.eval.evaluation import in_training
from vlp.eval.pictures import DataError
from vlp.eval.report import arms, records
from vlp.train import train

UNITS = 400


def write(folder, hits, *, options=None, dataset="photos", with_items=True):
    """The results of one run: an accuracy of `hits`, and a score without outcomes."""
    accuracy = torch.stack([hits.float(), torch.ones(len(hits))], 1)
    record = {
        "label": "negatives",
        "dataset": dataset,
        "metrics": {"acc": float(hits.float().mean()), "gap": 0.5},
        "protocol": {"name": "negatives", "version": 3, "options": options or {}},
        "data_sha256": "a",
        "chance": {},
    }
    items = {"negatives/acc": accuracy} if with_items else {}
    records.write(folder / "results.json", [record], items)


def drawn(share, seed):
    return torch.rand(UNITS, generator=torch.Generator().manual_seed(seed)) < share


def test_distances_are_paired_over_units_and_seeds(tmp_path):
    base = [drawn(0.5, seed) for seed in range(3)]
    better = [hits | drawn(0.1, 10 + seed) for seed, hits in enumerate(base)]
    for name, of_seeds in {"base": base, "better": better}.items():
        for seed, hits in enumerate(of_seeds):
            write(tmp_path / name / str(seed), hits)

    scores = arms.compare(arms.read([str(tmp_path / "base"), f"ours={tmp_path / 'better'}"]))
    accuracy, gap = scores
    first, second = accuracy.lines
    assert (first.arm, second.arm) == ("base", "ours") and first.distance is None

    # By the definition: the mean over seeds of each unit, then the bootstrap over units.
    parts = [torch.stack(of_seeds).double().mean(0) for of_seeds in (better, base)]
    pair = [torch.stack([hits, torch.ones(UNITS)], 1) for hits in parts]
    value, low, high = confidence.paired_difference(*pair)
    assert second.distance.value == pytest.approx(value, abs=1e-6)
    assert second.distance.bounds == pytest.approx((low, high), abs=1e-6)
    assert second.distance.is_shown and low > 0

    shares = [float(hits.float().mean()) for hits in base]
    mean, deviation = map(float, first.spread.split(" ± "))
    assert mean == pytest.approx(sum(shares) / 3, abs=1e-4) and 0 < deviation < 0.1

    # A score without outcomes has a distance, and no interval.
    assert gap.lines[1].distance == arms.Distance(0.0, None) and not gap.lines[1].distance.is_shown


def test_other_settings_are_named_instead_of_compared(tmp_path):
    write(tmp_path / "a", drawn(0.5, 0), options={"k": 1})
    write(tmp_path / "b", drawn(0.5, 0), options={"k": 2})
    scores = arms.compare(arms.read([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert scores[0].lines[1].distance is None
    assert "not comparable: options differ: k (1 and 2)" in arms.text(scores)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["a"], "--compare got 1 arm"),
        (["a", "a"], "several arms are called a"),
        (["a", "none"], "neither results.json nor runs with one"),
        (["a", "x=none"], "neither results.json nor runs with one"),
    ],
)
def test_what_cannot_be_compared_is_said(places, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", drawn(0.5, 0))
    (tmp_path / "none").mkdir()
    with pytest.raises((ValueError, DataError), match=said):
        arms.read(places)


def test_a_folder_may_be_named_by_its_settings(tmp_path):
    write(tmp_path / "lr=0.1", drawn(0.5, 0))
    write(tmp_path / "lr=0.2", drawn(0.6, 0))
    read = arms.read([str(tmp_path / "lr=0.1"), f"faster={tmp_path / 'lr=0.2'}"])
    assert [arm.name for arm in read] == ["lr=0.1", "faster"]


def test_a_run_leaves_outcomes_that_the_command_pairs(scenes, tmp_path, capsys):
    settings = {
        **material.OUR_CONFIG,
        "data": {"sources": [{"name": "shards", "path": str(scenes / "train")}], "workers": 0},
        "eval": {
            "zeroshot": {"data": str(scenes / "zeroshot")},
            "retrieval": {"data": str(scenes / "retrieval")},
        },
    }
    for seed, steps in itertools.product((0, 1), (1, 2)):
        run = {
            "out": str(tmp_path / f"{steps}" / f"{seed}"),
            "seed": seed,
            "train": {"duration": steps, "batch": 8, "device": "cpu"},
        }
        train(config.parse(settings | run), in_training)

    folder = tmp_path / "1" / "0"
    opened = records.open_results(str(folder))
    assert [record["label"] for record, _ in opened] == ["zeroshot", "retrieval"]
    assert all(
        "items" not in record for record in json.loads((folder / "results.json").read_text())
    )
    for record, outcomes in opened:
        for name, items in outcomes.items():
            assert confidence.score(items) == pytest.approx(record["metrics"][name])
        assert outcomes

    page = tmp_path / "page.html"
    command = ["report", "--compare", str(tmp_path / "1"), str(tmp_path / "2"), "--to", str(page)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "image_retrieval_recall@1" in shown and " to " in shown
    text = page.read_text()
    assert "2 against 1" in text and text.count("<table>") >= 4 and str(tmp_path) not in text
