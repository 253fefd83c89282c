"""The contract of a loss file, for every file found in vlp/losses: a new one is tested without
being named here.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

from tests import ranks
from tests.losses.family_data import LEAVES, data, gradients_of, own_rows
from tests.losses.test_family import FAMILY
from tests.losses.test_moving import CASES
from vlp import dist, plugin
from vlp.fields import FIELDS, supplier
from vlp.losses import Common, build
from vlp.losses._inputs import KEYWORDS
from vlp.losses._objective import INSTEAD

NAMES = plugin.names("vlp.losses")
FOLDER = Path(__file__).resolve().parents[2] / "vlp" / "losses"


def given():
    return data() | {"sample_id": torch.arange(8)}


def test_every_file_is_found_and_compared_with_a_loop():
    assert len(NAMES) == 46
    assert set(NAMES) == {p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_")}
    assert {name for name, *_ in (*FAMILY, *CASES)} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_explains_itself(name):
    text = " ".join(plugin.load("vlp.losses", name).__doc__.split())  # wherever lines end
    assert re.search(r"\bL\s+=|softmax of", text), "no formula"
    assert re.search(r"\[(b|V|A), ", text), "no shape"
    assert re.search(r"arXiv \d{4}\.\d{5}", text), "no paper"


@pytest.mark.parametrize("name", NAMES)
def test_options_are_frozen_and_none_is_required(name):
    options = plugin.load("vlp.losses", name).Options
    assert is_dataclass(options) and options.__dataclass_params__.frozen
    options()
    assert not {f.name for f in fields(options)} & {f.name for f in fields(Common)}


def test_files_import_nothing_but_torch_and_this_project():
    n = 0
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                root = module.split(".")[0]
                assert root in {"torch", "vlp"} | sys.stdlib_module_names, (
                    f"{path.name} imports {module}"
                )
                n += 1
    assert n > 100


def test_files_load_without_gpu_and_extras():
    script = (
        "import sys\n"
        "for name in ('triton', 'open_clip', 'transformers', 'timm', 'accelerate', 'deepspeed'):\n"
        "    sys.modules[name] = None\n"  # makes an import raise
        "from vlp import plugin\n"
        "found = [plugin.load('vlp.losses', name) for name in plugin.names('vlp.losses')]\n"
        "print(len(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=_without_gpu(),
        timeout=120,
    )
    assert done.stdout.strip() == "46", done.stderr


def _without_gpu():
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(FOLDER.parents[1])}


def with_defaults():
    results = {}
    for name in NAMES:
        d = given()
        results[name] = gradients_of(build({name: {}})(**own_rows(d), step=3)[0], d)
    return results


def test_defaults_give_finite_gradients_and_ranks_agree():
    alone, found = with_defaults(), ranks.run(2, with_defaults)
    for name in NAMES:
        values = [torch.tensor(v, dtype=torch.float64) for v in alone[name]]
        assert all(v.isfinite().all() for v in values) and any(
            v.norm() > 1e-6 for v in values[1:]
        ), name
        for i, leaf in enumerate(("value", *LEAVES)):
            mean = sum(torch.tensor(r[name][i], dtype=torch.float64) for r in found) / 2
            # numbers of each sample are float32: a learned temperature starts at a rounded value,
            # the same on all ranks
            assert (mean - values[i]).norm() <= 1e-9 * values[i].norm() + 1e-12, f"{name}, {leaf}"


@pytest.mark.parametrize("name", NAMES)
def test_aligned_pairs_and_identical_rows_stay_finite_in_float32(name):
    """At a scale of 100: texts that are the images' own embeddings; then one embedding for all
    rows.
    """
    for same in (False, True):
        d = {k: v.detach().float() if v.is_floating_point() else v for k, v in given().items()}
        d["image"] = d["image"][:1].expand(8, -1).contiguous() if same else d["image"]
        d |= {"text": d["image"].clone(), "scale": torch.tensor(100.0)}
        leaves = [d[leaf].requires_grad_() for leaf in LEAVES]
        total, _ = build({name: {}})(**d, step=0)
        found = torch.autograd.grad(total, leaves, materialize_grads=True)
        assert total.isfinite() and all(g.isfinite().all() for g in found), f"same: {same}"


def test_what_is_missing_is_named_with_the_term_and_its_supplier():
    n = 0
    for name in NAMES:
        objective = build({name: {}})
        for keyword in sorted(objective.needs):
            absent = {keyword, INSTEAD.get(keyword)}
            rest = {k: v for k, v in given().items() if k not in absent}
            named = f"the term '{name}.*' needs '{keyword}'"
            origin = re.escape(f"(it comes from {supplier(keyword)})")
            with pytest.raises(ValueError, match=f"{named}.* {origin}"):
                objective(**rest)
            assert supplier(keyword)
            n += 1
    assert n == 52
    assert {*FIELDS, "step", "other_names", "translations"} == set(KEYWORDS)


def shortened(queue):
    return queue[:7]


def changed(name, **values):
    d = given() | {key: change(given()[key]) for key, change in values.items()}
    return lambda: build({name: {}})(**d)


@pytest.mark.parametrize(
    "call, message",
    [
        *(
            (
                changed(name, queue_text=shortened, queue_image=shortened),
                f"'{name}': a queue of 7 is smaller than the batch of 8",
            )
            for name in ("mixing", "momentum_queue")
        ),
        (
            changed("slip", image_views=lambda v: v[:1]),
            "'slip': found 1 image views, expected at least 2",
        ),
        (
            changed("ranked", score=lambda s: s - 1),
            "'ranked': score: found -1, expected numbers >= 0",
        ),
    ],
)
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mann_whitney", {"tau": 0}, "expected tau > 0"),
        ("momentum_queue", {"temperature": -1}, "expected a number > 0"),
        ("slip", {"temperature": 0}, "expected a number > 0"),
        ("mixing", {"hardest": 0}, "expected hardest >= 1"),
        ("multi_view", {"label_smoothing": 1}, "expected 0 <= ε < 1"),
        ("ranked", {"power": -1}, "expected a number >= 0"),
        ("cyclip", {"in_modal": -1}, "expected numbers >= 0"),
        ("distill", {"form": "rank"}, "did you mean 'ranking'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build({name: options})


def test_a_queue_on_two_ranks_must_hold_the_whole_step():
    for message in ranks.run(2, short_queue):
        assert "a queue of 7 is smaller than the batch of 8" in message


def short_queue():
    assert dist.world_size() == 2
    d = own_rows(data())
    try:
        build({"momentum_queue": {}})(
            **d | {name: d[name][:7] for name in ("queue_image", "queue_text")}
        )
    except ValueError as error:
        return str(error)
