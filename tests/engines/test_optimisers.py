"""Which optimiser runs under which engine, and that its state travels whole."""

import os
import re
from pathlib import Path

import pytest
import torch

from tests import ranks
from tests.test_step import make_batch, make_training, own_rows
from vlp import config, optim
from vlp.engines import LaunchError
from vlp.engines.fitness import check_optimizer
from vlp.step import NonFiniteError, settle, train_step

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "optimisers.md"
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")

# Classes of timm's with a way of their own of keeping state: numbers, counts in groups, rows and
# columns, what comes into being late; the others are slow.
KINDS = ("muon", "lamb", "adan", "adafactorbv", "nadamlegacy", "lookahead_lion")
ALL_KINDS = (
    *KINDS,
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *("adamw", "adam", "nadam", "adabelief", "adopt", "laprop", "lion", "lars"),
            *("adafactor", "madgrad", "novograd", "mars", "adamuon", "adagrad", "rmsproptf"),
            *("sgd", "sgdw"),
        )
    ),
)
STEPS = 3


def optimiser(name):
    options = {"min_dim_size_to_factor": 8} if name == "adafactorbv" else {}
    return config.Optimizer(name=name, lr=1e-3, clip_norm=0.05, options=options)


def training_of(name, engine="ddp", double=True, **settings):
    # DeepSpeed looks for ninja.
    os.environ["PATH"] = os.path.dirname(os.sys.executable) + os.pathsep + os.environ["PATH"]
    return make_training(engine=engine, double=double, optimizer=optimiser(name), **settings)


def moved(training):
    """How far the weights went, in one vector.

    Without the biases of keys: softmax does not see them, so that their gradient is rounding, of
    which optimisers that take its sign make whole steps.
    """
    weights, _ = training.engine.state(everywhere=True)
    names = sorted(name for name in weights if not name.endswith("in_proj_bias"))
    return torch.cat([weights[name].double().flatten() for name in names])


def walk(engine, names, double):
    """By name the way of the weights in a few steps, or why the optimiser is refused."""
    ways = {}
    environment = dict(os.environ)
    for name in names:
        # Accelerate leaves DeepSpeed's settings there, which the next engine would take for a
        # launcher's.
        os.environ.clear()
        os.environ.update(environment)
        try:
            training = training_of(name, engine, double)
        except (ValueError, LaunchError) as error:
            ways[name] = str(error)
            continue
        start = moved(training)
        for _ in range(STEPS):
            train_step(training, make_batch(own_rows()))
        ways[name] = (moved(training) - start).tolist()
    return ways


def compare(ways, expected, tolerance):
    """How many optimisers ran, and went the way of one process."""
    n_compared = 0
    for name, way in ways.items():
        if isinstance(way, str):
            continue
        wanted = torch.tensor(expected[name], dtype=torch.float64)
        distance = (torch.tensor(way, dtype=torch.float64) - wanted).norm() / wanted.norm()
        # Muon multiplies in bf16, through DTensor in another order.
        assert distance < (0.1 if "muon" in name else tolerance), (name, distance)
        n_compared += 1
    return n_compared


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("lion", "muon"), ("adafactorbv",)),
        pytest.param(
            ("lamb", "adamw", "nadamw", "adan", "lookahead_lion", "lars", "adopt", "sgd", "laprop"),
            ("adamuon", "mars", "adamp"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sharded_optimisers_go_the_way_of_one_process(names, refused):
    expected = walk("ddp", names, True)
    ways = ranks.run(2, walk, "fsdp2", names + refused, True)[0]
    assert compare(ways, expected, 1e-9) == len(names)
    for name in refused:
        assert f"{name} looks at whole tensors, and fsdp2 cuts them into parts" in ways[name]


# Of AdamW's, tests/engines/test_engines.py shows it in the fast suite.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("zero2", "lion"),
        ("zero2", "rmsproptf"),
        ("zero1", "lion"),
        ("zero1", "nadamw"),
        ("zero3", "lion"),
        ("zero3", "nadamw"),
        ("zero3", "sgd"),
    ],
)
def test_flat_shards_go_the_way_of_one_process(engine, name):
    """DeepSpeed takes one engine a process."""
    refused = ("muon", "lamb", "adan")
    expected = walk("ddp", (name,), False)
    ways = ranks.run(2, walk, engine, (*refused, name), False)[0]

    # In float32 a sign may be another where a gradient is almost nothing.
    assert compare(ways, expected, 0.05) == 1
    assert all(
        f"{other} " in ways[other] and "train.engine=ddp" in ways[other] for other in refused
    )


def table():
    """Optimisers by the engines that take them, as the page shows them."""
    from timm.optim import list_optimizers

    rows: dict[tuple[bool, ...], list[str]] = {}
    for name in [*list_optimizers(), "lookahead_adamw"]:
        if optim.obstacle(name) is not None:
            continue
        runs = []
        for engine in ("ddp", "fsdp2", "zero1"):
            try:
                check_optimizer(config.Optimizer(name=name), engine)
                runs.append(True)
            except ValueError:
                runs.append(False)
        rows.setdefault(tuple(runs), []).append(name)

    lines = ["| optimisers | ddp | fsdp2 | zero1, zero2, zero3 |", "|---|---|---|---|"]
    for runs, names in sorted(rows.items(), reverse=True):
        marks = " | ".join("yes" if run else "refused" for run in runs)
        lines.append(f"| {', '.join(names)} | {marks} |")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_page_has_the_table():
    """By what the engines take; the tests above compare what they compute."""
    page = PAGE.read_text(encoding="utf-8")
    written = re.search(r"<!-- table -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert written is not None and written[1] == table()


def state_of(training):
    weights, moments = training.engine.state()
    return weights | {f"moment {name}": value for name, value in moments.items()}


@pytest.mark.parametrize("name", ALL_KINDS)
def test_a_resumed_optimiser_goes_on_bit_for_bit(name, tmp_path):
    whole = training_of(name)
    for _ in range(2):
        train_step(whole, make_batch())
    weights, moments = whole.engine.state()
    assert len(moments) > 20

    resumed = training_of(name)
    resumed.engine.module.load_state_dict(weights)
    resumed.engine.load_moments(moments)
    resumed.step = 2
    before = state_of(resumed)
    assert all(torch.equal(before[f"moment {key}"], value) for key, value in moments.items())

    for training in (whole, resumed):
        train_step(training, make_batch())
    one, other = state_of(whole), state_of(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(not torch.equal(one[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "n_before"),
    [("adamw", 0), ("lion", 0), *((name, 1) for name in ("adam", "muon", "lamb", "adan", "sgd"))],
)
def test_nothing_moves_where_a_gradient_is_not_finite(name, n_before):
    training = training_of(name)
    for _ in range(n_before):
        train_step(training, make_batch())
    settle(training)
    before = state_of(training)

    gradient_free = training.engine.module.scaling.logit_scale
    with torch.no_grad():
        kept = gradient_free.clone()
        gradient_free.fill_(torch.nan)
    train_step(training, make_batch())
    with pytest.raises(NonFiniteError):
        settle(training)
    with torch.no_grad():
        gradient_free.copy_(kept)

    after = state_of(training)
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    # A first step that does not count may make the state, and leaves it as it starts.
    for key in after.keys() - before.keys():
        assert not after[key].any(), key


def test_state_of_other_options_is_refused_by_name():
    training = training_of("lion")
    train_step(training, make_batch())
    _, moments = training.engine.state()
    with pytest.raises(ValueError, match=r"has no 'step' of visual.*give the train.optimizer.name"):
        training_of("nadamw").engine.load_moments(moments)
