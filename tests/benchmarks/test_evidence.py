"""The arms of the evidence differ in one thing each, and every table compares arms and scores that
exist.
"""

import json
import re
from dataclasses import replace

import torch
from safetensors.torch import save_file

from tests.benchmarks import evidence, evidence_arms, evidence_data
from vlp import config


def test_arms_of_a_table_are_runs_that_differ_in_objective_topology_or_teacher():
    compared = set()
    for table in evidence.TABLES.values():
        baseline, *others = (
            config.load(evidence.BASE, evidence.recipe(arm, 3)["overrides"]) for arm in table.arms
        )
        for arm, chosen in zip(list(table.arms)[1:], others):
            assert (chosen.out, chosen.seed) == (f"{arm}/3", 3)
            assert chosen.eval == baseline.eval
            assert table.other_data or chosen.data == baseline.data
            is_longer = chosen.train != baseline.train
            assert not is_longer or arm.endswith("_long")
            assert replace(chosen.train, duration=baseline.train.duration) == baseline.train

            # Heads leave with the objective that reads them; SigLIP brings a scale and bias.
            plain = replace(
                chosen.model,
                heads=baseline.model.heads,
                scale=chosen.model.scale if "siglip" not in arm else baseline.model.scale,
                bias=chosen.model.bias if "siglip" not in arm else baseline.model.bias,
            )
            assert plain == baseline.model
            assert table.other_data or chosen.model.heads == baseline.model.heads
            assert baseline.train.batch % evidence.ARMS[arm].ranks == 0
            compared.add(arm)
    assert len(compared) >= 60


def test_arms_of_the_first_tables_are_the_file_itself():
    base, found = config.load(evidence.BASE), 0
    for arm, settings in evidence.ARMS.items():
        of_other_data = {evidence_arms.SMALL[0], evidence_arms.COUNTED[0]}
        if of_other_data.isdisjoint(settings.settings):
            chosen = config.load(evidence.BASE, evidence.recipe(arm, 3)["overrides"])
            assert (chosen.data, chosen.model, chosen.train, chosen.eval) == (
                base.data,
                base.model,
                base.train,
                base.eval,
            )
            found += 1
    assert found >= 8


def test_tables_compare_known_arms_by_scores_of_the_evaluation():
    for table in evidence.TABLES.values():
        baseline = next(iter(table.arms))
        assert evidence.ARMS[baseline].objective == "{infonce: {}}"
        assert table.arms.keys() <= evidence.ARMS.keys()

        loaded = config.load(evidence.BASE, evidence.recipe(baseline, 3)["overrides"])
        labels = {task.label for task in loaded.eval}
        assert labels.isdisjoint(table.evaluated)
        assert {label for label, _ in table.columns.values()} <= labels | table.evaluated.keys()
    assert set().union(*(table.arms for table in evidence.TABLES.values())) == evidence.ARMS.keys()


def test_misplaced_captions_are_those_of_others(scenes, tmp_path):
    evidence_data.misplace_captions(scenes / "train", tmp_path / "noisy")
    before, after = (
        {str(meta["scene"]): meta["captions"] for meta in records(folder)}
        for folder in (scenes / "train", tmp_path / "noisy")
    )
    moved = [key for key in before if after[key] != before[key]]
    assert before.keys() == after.keys()
    assert len(moved) == int(evidence_data.MISPLACED * len(before)) >= 80
    assert sorted(map(str, before.values())) == sorted(map(str, after.values()))


def test_counting_learns_numbers_from_counting_captions_alone(scenes, tmp_path):
    evidence_data.without_numbers(scenes / "train", tmp_path / "numberless")
    captions = []
    for meta in records(tmp_path / "numberless"):
        captions += meta["captions"]
    assert len(captions) >= 900
    numbers = set(evidence_data.NUMBERS[2:]) | set(map(str, range(2, 11)))
    assert not [text for text in captions if numbers & set(text.split())]
    assert [text for text in captions if " a " in f" {text} "]  # one and several stay apart


def test_counterfactuals_are_of_combinations_that_training_shows(scenes, tmp_path, monkeypatch):
    # So few scenes do not hold every number equally often.
    monkeypatch.setattr(evidence_data, "BALANCE", "none")
    evidence_data.count(scenes / "train", tmp_path / "counted")
    n_texts = 0
    for meta in records(tmp_path / "counted"):
        assert 6 <= len(meta["counterfactuals"]) <= 8
        for text in meta["counterfactuals"]:
            (number, shape) = evidence_data.COUNTED_SHAPE.findall(text)[0]
            combination = (evidence_data.number_of(number), evidence_data.SINGULAR[shape])
            assert combination not in evidence_data.HELDOUT_COUNTS
            n_texts += 1
    assert n_texts >= 300


def test_a_distance_is_paired_over_items(tmp_path):
    right = {
        "a": [1, 1, 1, 0] * 100,
        "b": [1, 0, 1, 0] * 100,
    }  # b fails where a does not, never else
    runs = {}
    for arm, hits in right.items():
        folder = tmp_path / arm / "0"
        folder.mkdir(parents=True)
        items = torch.stack([torch.tensor(hits), torch.ones(400, dtype=torch.int64)], 1).float()
        save_file({"negatives/acc": items}, folder / "results.items.safetensors")
        runs[arm] = [{"folder": folder}]

    said = evidence.distance(runs["a"], runs["b"], "negatives/acc", 100)
    middle, low, high = map(float, re.findall(r"[+-][\d.]+", said))
    # Unpaired the interval would be 13 points wide.
    assert middle == 25 and 20 < low < 25 < high < 30
    assert evidence.distance(runs["b"], runs["b"], "negatives/acc", 100) is None


def records(folder):
    """The JSON of every sample."""
    for sample in evidence_data.samples_of(folder):
        yield json.loads(sample["json"])


def test_spread():
    assert evidence.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert evidence.spread([50.0]) == "50.0"
