"""The arms of the evidence differ in one thing each, and every table compares arms and scores that
exist.
"""

import argparse
import io
import json
import re
import tarfile
from dataclasses import replace

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from tests.benchmarks import (
    evidence,
    evidence_arms,
    evidence_claims,
    evidence_cost,
    evidence_data,
    evidence_outcomes,
)
from tests.benchmarks.evidence_second import NOT_SHOWN
from vlp import config, plugin


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

            # Heads leave with the objective that reads them; SigLIP brings a scale and bias, and
            # Symile's product of three rows is smaller than that of two.
            has_own_scale = "siglip" in arm or "symile" in arm
            plain = replace(
                chosen.model,
                heads=baseline.model.heads,
                scale=baseline.model.scale if has_own_scale else chosen.model.scale,
                bias=chosen.model.bias if "siglip" not in arm else baseline.model.bias,
            )
            assert plain == baseline.model
            assert table.other_data or chosen.model.heads == baseline.model.heads
            assert baseline.train.batch % evidence.ARMS[arm].ranks == 0
            compared.add(arm)
    assert len(compared) >= 70


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
        assert set(table.evaluated_arms) <= table.arms.keys()
    assert set().union(*(table.arms for table in evidence.TABLES.values())) == evidence.ARMS.keys()


def test_every_objective_is_in_an_arm_or_it_is_said_why_not():
    in_arms = set()
    for arm in evidence.ARMS.values():
        in_arms |= yaml.safe_load(arm.objective).keys()
    names = set(plugin.names("vlp.losses"))
    assert names - in_arms == NOT_SHOWN.keys()
    assert len(names) >= 45 and all(NOT_SHOWN.values())


def test_a_third_modality_is_the_edges_of_the_same_samples(scenes, tmp_path):
    shard = next((scenes / "train").glob("*.tar"))
    evidence_data.add_edges(shard, tmp_path / "with.tar")
    before, after = names_in(shard), names_in(tmp_path / "with.tar")
    pictures = [name for name in before if name.endswith(".jpg")]
    added = [name for name in after if name not in before]
    assert [name for name in after if name in before] == before
    assert added == [name.replace(".jpg", ".edges.npy") for name in pictures]
    assert len(added) >= 200

    # A square of one lightness has none, a step in it has some where it is.
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (16, 0, 32, 32))
    written = io.BytesIO()
    picture.save(written, "PNG")
    rows = evidence_data.edges(written.getvalue())
    assert rows.shape == (16, 64)
    assert [bool(row.any()) for row in rows] == [False, True, True, False] * 4


def names_in(shard):
    with tarfile.open(shard) as tar:
        return tar.getnames()


def test_a_cell_is_empty_where_an_arm_cannot_be_evaluated_so():
    record = {"metrics": {"acc": 0.5}, "chance": {"acc": 0.1}}
    cost = dict.fromkeys(evidence.COSTS, 1.0)
    columns = {"a, %": ("first", "acc"), "b, %": ("second", "acc")}
    table = evidence_arms.Table("title", {"plain": "plain"}, columns, "notes")
    row = evidence.row("plain", [{"results": {"first": record}, "cost": cost}], [], table)
    assert (row["a, %"], row["b, %"]) == ("50.0", None)
    assert evidence.guessing({"first": record}, table)["b, %"] is None


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

    (tmp_path / "a" / "0" / "results.items.safetensors").unlink()
    assert evidence.distance(runs["a"], runs["b"], "negatives/acc", 100) == "no outcomes kept"


def records(folder):
    """The JSON of every sample."""
    for sample in evidence_data.samples_of(folder):
        yield json.loads(sample["json"])


def test_claims_are_of_arms_and_scores_of_their_tables(tmp_path):
    for claim in evidence_claims.CLAIMS:
        table = evidence.TABLES[f"evidence_{claim.table}"]
        assert {claim.arm, claim.against} <= table.arms.keys(), claim
        assert claim.score in table.columns, claim
    assert len(evidence_claims.CLAIMS) >= 40

    verdicts = {(2, 1, 3): "shown", (-2, -3, -1): "reversed", (1, -1, 3): "not shown"}
    for difference, told in verdicts.items():
        assert evidence_claims.verdict(difference) == told
        claim = evidence_claims.Claim("clean", "a", "b", "text R@1, %", "why")
        row = evidence_claims.row(claim, {"a": "A", "b": "B"}, 3, difference)
        assert row["most likely cause"] == (None if told == "shown" else "why")


def test_a_claim_is_looked_at_over_the_seeds_of_both_arms(tmp_path, capsys):
    # Seed 2 of one arm is missing, seed 1 of the other kept no outcomes.
    records = {}
    for arm, hits, seeds in (("clean_koleo", 1.0, (0, 1, 2)), ("clean_plain", 0.5, (0, 1))):
        for seed in seeds:
            folder = tmp_path / arm / str(seed)
            folder.mkdir(parents=True)
            records[arm, seed] = {"folder": folder, "cost": {"commit": f"c{seed}"}}
            items = torch.tensor([[hits, 1.0]] * 50)
            if (arm, seed) != ("clean_plain", 1):
                name = "retrieval/text_retrieval_recall@1"
                save_file({name: items}, folder / "results.items.safetensors")

    out = tmp_path / "claims.json"
    args = argparse.Namespace(seeds=[0, 1, 2], json=str(out), publish=False)
    args.tables = ["evidence_clean", "evidence_local"]
    evidence_claims.show(evidence.TABLES, lambda arm, seed: records.get((arm, seed)), args)
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["arm"], row["seeds"], row["higher"]) == ("+ KoLeo .1", 1, "shown")
    assert row["difference, points (95 %)"].startswith("+50.0 (+")
    notes = json.loads(out.read_text())["notes"]
    assert notes.endswith("Trained at c0.")
    tables = [claim.table for claim in evidence_claims.CLAIMS]
    n_waiting = tables.count("clean") + tables.count("local") - 1
    assert f"1 of 1 are shown, {n_waiting} more wait" in notes

    # Tables that are not asked for are not looked at.
    args.tables = ["evidence_local"]
    evidence_claims.show(evidence.TABLES, lambda arm, seed: records.get((arm, seed)), args)
    assert "no claim can be looked at" in capsys.readouterr().out

    args.tables = list(evidence.TABLES)
    evidence_claims.show(evidence.TABLES, lambda arm, seed: None, args)
    assert "no claim can be looked at" in capsys.readouterr().out


def test_outcomes_of_what_was_evaluated_afterwards_lie_in_their_own_file(tmp_path):
    run = {"folder": tmp_path}
    of_training = torch.tensor([[1.0, 1.0]])
    save_file({"retrieval/r": of_training}, tmp_path / "results.items.safetensors")
    save_file({"retrieval/r": 0 * of_training}, tmp_path / "width_8.items.safetensors")
    assert evidence_outcomes.mean_outcomes([run], "retrieval/r")[0, 0] == 1
    assert evidence_outcomes.mean_outcomes([run], "width_8/r")[0, 0] == 0
    # Never those of another task instead.
    assert evidence_outcomes.outcomes(run, "width_16/r") is None


def test_the_command_says_first_what_is_missing_and_what_it_costs(tmp_path):
    tables = {
        "one": evidence_arms.Table("", {"plain": "Plain", "slow": "Slow"}, {}, ""),
        "two": evidence_arms.Table("", {"new": "New"}, {}, ""),
    }
    rows = [{"arm": "chance", "CPU s": None}, {"arm": "Slow", "CPU s": 7200.0}]
    (tmp_path / "one.json").write_text(json.dumps({"rows": rows}))
    known = evidence_cost.published(tables, tmp_path)
    assert known == {"slow": 7200.0}

    runs = [(arm, seed) for arm in ("plain", "slow", "new") for seed in (0, 1)]
    done = {("plain", 0): 3600.0}
    # 1 h for plain as measured, 2 h twice, and twice the mean of both for what nobody ran.
    assert evidence_cost.outlook(runs, done, known) == (
        "1 of 6 runs have finished, 5 are missing: about 8.0 CPU hours, 2 runs of unknown cost "
        "taken as 5400 s each"
    )
    assert evidence_cost.outlook(runs[:1], done, known) == "1 of 1 runs have finished"
    assert "is not known" in evidence_cost.outlook(runs, {}, {})


def test_runs_that_others_begin_with_are_counted():
    runs = evidence.all_runs(["resumed", "mined", "taught_all"], [1])
    assert sorted(runs) == [
        ("counted", 1),
        ("infonce", 0),
        ("infonce_256", 0),
        ("mined", 1),
        ("resumed", 1),
        ("taught_all", 1),
    ]
    every = evidence.all_runs(list(evidence.ARMS), [0, 1, 2])
    assert len(every) == 3 * len(evidence.ARMS) >= 240

    # Six hours on two cores are what the whole evidence may take.
    told = evidence_cost.outlook(every, {}, evidence_cost.published(evidence.TABLES))
    assert float(re.findall(r"about ([\d.]+) CPU hours", told)[0]) <= 12


def test_spread():
    assert evidence.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert evidence.spread([50.0]) == "50.0"
