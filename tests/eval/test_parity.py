"""Our figures are those of the libraries of the field (tests/eval/parity): of the numbers that are
kept on every run, and of their own code where it is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace

import pytest
import torch

from tests.eval.parity import KEPT, PARTS, guide, inputs, open_clip
from tests.eval.parity.__main__ import Outcome, obstacle_of, report
from tests.eval.parity.compare import (
    BOUND,
    Declared,
    difference,
    difference_from_kept,
    differences,
)
from vlp.eval import models

THEIRS = json.loads(KEPT.read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    inputs.build(folder)
    return folder


def apart_from_kept(name, figures):
    """The differences of figures from those that are kept of a part."""
    theirs = THEIRS[name]["figures"]
    assert figures.keys() == theirs.keys()
    return {figure: difference_from_kept(theirs[figure], figures[figure]) for figure in theirs}


# What other tests compare on every run, with the libraries themselves (tests/models, tests/export).
LATER = ("open_clip: towers", "sentence-transformers", "timm")
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in PARTS]


@pytest.mark.parametrize("name", EACH)
def test_our_figures_are_theirs(root, name):
    apart = apart_from_kept(name, PARTS[name].ours(root))
    differing = {figure: value for figure, value in apart.items() if value > BOUND}
    assert not differing, differing


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_their_code_says_today_what_is_kept(root, name):
    obstacle = obstacle_of(PARTS[name])
    if obstacle:
        pytest.skip(f"{obstacle}; see docs/parity.md")
    apart = apart_from_kept(name, PARTS[name].theirs(root))
    assert max(apart.values()) <= BOUND, apart


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_finds_no_difference():
    """In an environment with all libraries, where VLP_PARITY_PYTHON names its interpreter."""
    interpreter = os.environ.get("VLP_PARITY_PYTHON")
    if not interpreter:
        pytest.skip("set VLP_PARITY_PYTHON to the interpreter of docs/parity.md")
    command = [interpreter, "-m", "tests.eval.parity"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_what_is_kept_is_enough_to_tell():
    numbers = []
    for part in THEIRS.values():
        for figure in part["figures"].values():
            numbers.append(figure["entries"] if isinstance(figure, dict) else [figure])
    assert THEIRS.keys() == PARTS.keys() and len(numbers) >= 80
    # A figure near zero would agree with anything that is small.
    assert not [values for values in numbers if max(map(abs, values)) <= 100 * BOUND]
    for part in THEIRS.values():
        for declared in part["declared"]:
            assert abs(declared["theirs"] - declared["ours"]) > 100 * BOUND, declared


def test_a_model_that_is_off_by_little_is_found(root):
    """The negative control: image embeddings that are turned by a thousandth."""
    encoder = models.load(str(root / "model"))
    turned = replace(encoder, image=lambda pixels: encoder.image(pixels) + 1e-3, fingerprint="")
    figures = open_clip.our_zero_shot(root, turned)
    theirs = THEIRS["open_clip: scores"]["figures"]
    apart = {key: difference_from_kept(theirs[f"model: {key}"], figures[key]) for key in figures}
    assert apart["cosines with the classes"] > BOUND
    assert apart["zero-shot classifier"] <= BOUND  # of texts, which are as they were


def test_every_kind_of_disagreement_counts():
    ones, kept = torch.ones(3), {"shape": [3], "entries": [1.0, 1.0, 1.0]}
    assert difference_from_kept(kept, ones) == difference(ones, ones) == 0
    assert difference_from_kept(kept, ones + 2e-6) > BOUND
    cases = [torch.ones(3, 1), torch.ones(4), torch.tensor(1.0), 1.0, torch.full((3,), torch.nan)]
    for wrong in cases:
        assert difference(ones, wrong) == difference_from_kept(kept, wrong) == torch.inf
    assert difference_from_kept(1.0, ones) == torch.inf
    assert differences({"a": 1.0}, {"a": 1.0, "b": 1.0}) == {"a": 0, "b": torch.inf}
    assert len(cases) == 5


def test_the_command_fails_where_a_figure_differs(capsys):
    same = Outcome("peer", "1.0", {"a": 1.0, "b": torch.ones(2)}, {"a": 1.0, "b": torch.ones(2)})
    other = replace(same, ours={"a": 1.0 + 2e-6, "b": torch.ones(2)})
    lacking = replace(same, ours={"a": 1.0})
    declared = [Declared("c", 1.0, 2.0, "ties")]
    cases = [
        (same, {}, 0, "2 figures, of which 0 differ"),
        (other, {}, 1, "DIFFERS"),
        (lacking, {}, 1, "DIFFERS"),
        (same, {"more": "peer: not installed"}, 2, "more: not compared; peer: not installed"),
        (replace(same, declared=declared), {}, 0, "on purpose: c: 1 there, 2 here"),
    ]
    for outcome, obstacles, code, message in cases:
        assert report({"part": outcome}, obstacles) == code
        assert message in capsys.readouterr().out
    assert len(cases) == 5


def test_the_guide_shows_what_is_kept():
    assert guide.between_marks(guide.PAGE.read_text()) == guide.tables(THEIRS)
