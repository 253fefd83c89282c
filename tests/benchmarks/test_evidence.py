"""The arms of the evidence differ in one thing each, and every table compares arms and scores that exist."""

from tests.benchmarks import evidence
from vlp import config


def test_arms_are_runs_that_differ_in_objective_topology_or_teacher():
    base = config.load(evidence.BASE)
    for arm in evidence.ARMS:
        chosen = config.load(evidence.BASE, evidence.recipe(arm, 3)["overrides"])
        assert (chosen.out, chosen.seed) == (f"{arm}/3", 3)
        assert (chosen.data, chosen.model, chosen.train, chosen.eval) == (base.data, base.model, base.train, base.eval)
        assert base.train.batch % evidence.ARMS[arm].ranks == 0
    assert len(evidence.ARMS) >= 9


def test_tables_compare_known_arms_by_scores_of_the_evaluation():
    labels = {task.label for task in config.load(evidence.BASE).eval}
    for table in evidence.TABLES.values():
        assert next(iter(table.arms)) == "infonce"
        assert table.arms.keys() <= evidence.ARMS.keys()
        assert {label for label, _ in table.columns.values()} <= labels
    assert set().union(*(table.arms for table in evidence.TABLES.values())) == evidence.ARMS.keys()


def test_spread():
    assert evidence.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert evidence.spread([50.0]) == "50.0"
