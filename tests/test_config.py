"""Strict configuration: every problem at once, at its line, with a suggestion; what is dumped reads
back the same.
"""

import re
from dataclasses import dataclass
from typing import Literal

import pytest

from vlp import config, schema
from vlp.config import Duration, Plan
from vlp.schema import ConfigError, plain

GOOD = """
out: runs/x
data:
  sources:
    - {name: shards, path: data/train}
model:
  image_tower: {name: vit, width: 64, layers: 1, patch_size: 8, image_size: 32}
  text_tower: {name: transformer, width: 64, layers: 1, heads: 1}
  embed_dim: 32
train: {duration: 10, batch: 8}
objective:
  infonce: {}
"""


def load(tmp_path, text, overrides=()):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return config.load(path, list(overrides))


def test_resolved_configuration_reads_back(tmp_path):
    first = load(
        tmp_path,
        GOOD,
        ["train.optimizer.lr=1e-3", "train.duration=3ep", "checkpoint.every=200ksamples"],
    )
    assert first.train.optimizer.lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    again = load(tmp_path, config.dump(first))
    assert plain(again) == plain(first)


def test_all_problems_at_once_with_line_and_suggestion(tmp_path):
    bad = (
        GOOD.replace("batch: 8", "btach: 8")
        .replace("layers: 1, heads: 1", "layers: one, heads: 1")
        .replace("infonce", "infonec")
    )
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, bad, ["train.precision=fp8"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 5, lines
    text = str(caught.value)
    for expected in (
        "c.yaml:10: train.btach: unknown key 'btach', did you mean 'batch'?",
        "missing key 'batch'",
        "c.yaml:8: model.text_tower.layers: found 'one' (str), expected a whole number",
        "c.yaml:12: objective.infonec: no 'infonec' in vlp.losses, did you mean 'infonce'?",
        "override 'train.precision=fp8'",
    ):
        assert expected in text, (expected, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.batch=0", "at least 1"),
        ("train.optimizer.lr=-1", "must be positive"),
        ("train.optimizer.lr=.nan", "finite"),
        ("train.duration=5 minutes", "expected a duration"),
        ("data.sources=[]", "sources is empty"),
        ("data.augment.scale=[0.9, 0.1]", "low <= high"),
        ("objective={}", "objective is empty"),
        ("model.scale.init=1000", "must lie in"),
        ("data.captions.class_templates=[no place]", "exactly one {}"),
        (
            "data={sources: [{name: shards, path: x}], views: {n: 1}, "
            "augment: {scaled_decoding: true}}",
            "does not go with views",
        ),
        (
            "data={sources: [{name: shards, path: x}], views: {augment: {scaled_decoding: true}}}",
            "does not go with views",
        ),
        ("train=5", "expected a mapping"),
        ("train.batch=true", "whole number"),
    ],
)
def test_senseless_values_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=None) as caught:
        load(tmp_path, GOOD, [change])
    assert message in str(caught.value)


def test_duplicate_key_and_bad_yaml(tmp_path):
    with pytest.raises(ConfigError, match="appears twice"):
        load(tmp_path, GOOD + "out: other\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path, "out: [")
    with pytest.raises(ConfigError, match="nested too deep"):
        load(tmp_path, "out: " + "[" * 3000)
    with pytest.raises(ConfigError, match="is not a YAML value"):
        load(tmp_path, GOOD, ["out=" + "[" * 3000])
    with pytest.raises(ConfigError, match="no configuration file"):
        config.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (1000, 1000),
        ("5%", 10),
        ("3ep", 150),
        ("2ksamples", 20),
        ("2Msamples", 20_000),
        ("0%", 0),
        ("0.001%", 1),
    ],
)
def test_durations(text, steps):
    plan = Plan(batch=100, steps_per_epoch=50, total=200)
    duration = Duration.from_config(text)
    assert plan.steps(duration) == steps
    assert Duration.from_config(duration.to_config()) == duration


def test_due_counts_every_period_and_the_end():
    plan = Plan(batch=1, steps_per_epoch=10, total=25)
    assert [s for s in range(1, 26) if plan.due(Duration(10, "steps"), s)] == [10, 20, 25]
    assert [s for s in range(1, 26) if plan.due(None, s)] == [25]


def test_every_percentage_ends_with_the_run_and_comes_at_its_even_places():
    """For all totals: nothing twice near the end, as often as the percentage says, never off by
    more than half a step.
    """
    counts = {"25%": 4, "20%": 5, "10%": 10, "33%": 3, "33.3%": 3, "12.5%": 8, "50%": 2, "100%": 1}
    n_checked = 0
    for total in range(1, 501):
        plan = Plan(batch=1, steps_per_epoch=10, total=total)
        for percent, count in counts.items():
            steps = plan.due_steps(Duration.from_config(percent))
            span = float(percent[:-1]) / 100 * total
            assert steps[-1] == total, (total, percent, steps)
            if span >= 1:
                assert len(steps) == count, (total, percent, steps)
                assert all(
                    abs(step - (i + 1) * span) <= 0.5 + 1e-9 for i, step in enumerate(steps[:-1])
                ), (total, percent)
            n_checked += 1
    assert n_checked == 4000
    assert Plan(batch=1, steps_per_epoch=10, total=234).due_steps(Duration(25, "%")) == [
        58,
        117,
        176,
        234,
    ]


def test_due_asks_about_one_step_what_due_steps_lists():
    spans = ["25%", "33%", "0%", "0.1%", "7", "10", "0.3ep", "2ep", "100samples"]
    n_checked = 0
    for total in (1, 7, 50, 99):
        plan = Plan(batch=48, steps_per_epoch=7, total=total)
        for every in [None, *map(Duration.from_config, spans)]:
            assert plan.due_steps(every) == [
                step for step in range(1, total + 1) if plan.due(every, step)
            ], (total, every)
            n_checked += 1
    assert n_checked == 40


@pytest.mark.parametrize(
    ("duration", "every", "count"),
    [
        ("5ep", "0.5ep", 10),
        ("2.5ep", "0.5ep", 5),
        ("90ksamples", "30ksamples", 3),
        ("1Msamples", "100ksamples", 10),
    ],
)
def test_spans_that_divide_a_run_end_with_it_whatever_an_epoch_is(duration, every, count):
    n_checked = 0
    for steps_per_epoch in range(20, 521):
        train = config.Train(duration=Duration.from_config(duration), batch=96)
        plan = Plan.of(train, steps_per_epoch)
        steps = plan.due_steps(Duration.from_config(every))
        assert len(steps) == count and steps[-1] == plan.total, (steps_per_epoch, steps)
        n_checked += 1
    assert n_checked == 501


def test_multiples_of_a_fraction_of_a_step_do_not_drift():
    plan = Plan(batch=48, steps_per_epoch=10, total=500)
    assert plan.due_steps(Duration(1e4, "samples")) == [208, 417, 500]  # 208.3, 416.7
    assert plan.due_steps(Duration(0.001, "%")) == list(range(1, 501))


@dataclass(frozen=True)
class Choices:
    """Flags, numbers and words to choose among."""

    flag: Literal["auto", True, False] = "auto"
    count: Literal[1, 2] = 1
    word: Literal["error", "drop"] = "error"


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("flag", 1, "1 is not a choice, did you mean true?"),
        ("flag", 0, "0 is not a choice, did you mean false?"),
        ("flag", 1.0, "1.0 is not a choice, did you mean true?"),
        ("flag", "True", "'True' is not a choice, did you mean true?"),
        ("flag", "1", "'1' is not a choice; known: auto, false, true"),
        ("count", 1.0, "1.0 is not a choice, did you mean 1?"),
        ("count", True, "True is not a choice, did you mean 1?"),
        ("count", "2", "'2' is not a choice, did you mean 2?"),
        ("count", 3, "3 is not a choice; known: 1, 2"),
        ("word", "eror", "'eror' is not a choice, did you mean 'error'?"),
        ("word", None, "None is not a choice; known: error, drop"),
    ],
)
def test_a_choice_is_told_by_its_kind_too(key, value, hint):
    with pytest.raises(config.ConfigError, match=f"^{key}: {re.escape(hint)}$"):
        schema.parse(Choices, {key: value})
    assert schema.parse(Choices, {"flag": False, "count": 2}) == Choices(False, 2)
