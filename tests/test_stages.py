"""Stages of a run: their extent, their joints, and runs stopped before, at and after these."""

import json
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from open_clip.model import resize_pos_embed
from timm.layers import resample_abs_pos_embed

from tests import ranks
from tests.models.tiny import TEXT, VIT, tiny
from tests.test_train import losses
from vlp import checkpoint, config, stages
from vlp.config import Duration, Plan, Stage
from vlp.config.durations import of_stages
from vlp.engines.replicated import Replicated
from vlp.engines.zero import ZeRO
from vlp.eval.run import in_training
from vlp.pretrained import image_size
from vlp.train import train

STAGES = (  # of 200 scenes: sizes, masks, texts, rates and batches change at steps 3 and 5
    "stages=[{duration: 3, image_size: 24, batch: 24, context_length: 12, patch_dropout: 0.5},"
    "{duration: 2, micro_batches: 1, lr: 0.5, warmup: 1}]"
)
SHORT = (
    "train.duration=8",
    "data.workers=0",
    "checkpoint={every: 1, keep: 20}",
    "teacher={ema: 0.5, eval_ema: true}",
    STAGES,
)


# ---- extents


def extents(duration, *stages, batch=50, n=1000):
    """(first, end, batch) of every part of a run over n samples."""
    train = config.Train(Duration.from_config(duration), batch)
    listed = [Stage(Duration.from_config(length), batch=size) for length, size in stages]
    plans = of_stages(train, listed, lambda size: n // size)
    assert all(plan.total == plans[-1].end for plan in plans)
    return [(plan.first, plan.end, plan.batch) for plan in plans]


@pytest.mark.parametrize(
    ("duration", "stages", "expected"),
    [
        (100, (), [(0, 100, 50)]),
        ("3ep", (), [(0, 60, 50)]),
        (100, (("90%", None), ("10%", 20)), [(0, 90, 50), (90, 100, 20)]),
        (100, ((30, 10),), [(0, 30, 10), (30, 100, 50)]),
        (100, (("2ep", 100),), [(0, 20, 100), (20, 100, 50)]),
        # Epochs and samples are what they are at each stage's own batch.
        ("4ep", (("3ep", 100),), [(0, 30, 100), (30, 50, 50)]),
        ("4ep", (("75%", 100),), [(0, 30, 100), (30, 50, 50)]),
        ("4ep", ((30, 100),), [(0, 30, 100), (30, 50, 50)]),
        ("4ksamples", (("3ksamples", 100),), [(0, 30, 100), (30, 50, 50)]),
        ("4ksamples", (("3ep", 100), ("1ep", 40)), [(0, 30, 100), (30, 55, 40)]),
        # Thirds do not drift.
        (100, (("33.3%", None),) * 3, [(0, 33, 50), (33, 67, 50), (67, 100, 50)]),
    ],
)
def test_stages_are_measured_in_the_units_of_the_whole(duration, stages, expected):
    assert extents(duration, *stages) == expected


@pytest.mark.parametrize(
    ("duration", "stages", "message"),
    [
        (100, (("60%", None), ("50%", None)), r"stages\.1\.duration is 50%, .* more than train"),
        ("2ep", (("3ep", 100),), r"stages\.0\.duration is 3ep"),
        (100, (("0.1%", None),), r"stages\.0\.duration is 0\.1 steps"),
    ],
)
def test_extents_that_do_not_fit_are_refused(duration, stages, message):
    with pytest.raises(ValueError, match=message):
        extents(duration, *stages)


def test_what_is_due_every_epoch_follows_the_epochs_of_all_stages():
    train = config.Train(Duration.from_config("4ep"), 50)
    listed = [Stage(Duration.from_config("1.5ep"), batch=100)]
    first, rest = of_stages(train, listed, lambda size: 1000 // size)
    every = Duration.from_config("1ep")
    due = [s for s in range(1, first.end) if first.due(every, s)]
    due += [s for s in range(rest.first, rest.total + 1) if rest.due(every, s)]
    # 10 steps of 100 are an epoch; 15 and then 10 of 50 are two; 20 more three.
    assert due == [10, 25, 45, 65] and rest.epochs_before == Fraction(3, 2)
    plain = Plan(50, 20, 60)
    assert [s for s in range(1, 61) if plan_due(plain, every, s)] == [20, 40, 60]
    of_samples = Duration.from_config("500samples")
    assert [s for s in range(15, 40) if rest.due(of_samples, s)] == [15, 25, 35]


def plan_due(plan, every, step):
    assert (step in plan.due_steps(every)) == plan.due(every, step)
    return plan.due(every, step)


# ---- positions


def test_positions_are_interpolated_as_the_towers_libraries_do():
    old = tiny(image_tower=VIT | {"image_size": 24})
    new = tiny(seed=1)
    weights = {"visual.positional_embedding": old.state_dict()["visual.positional_embedding"]}
    expected = dict(weights)
    resize_pos_embed(expected, new)
    (name,) = weights
    assert weights[name].shape == (10, 64) and expected[name].shape == (17, 64)
    fitted = image_size.fitted(weights, new.visual, (24, 24))
    assert torch.equal(fitted[name], expected[name])

    grid = torch.randn(1, 5 + 16, 8)  # a class token and four registers
    theirs = resample_abs_pos_embed(grid, [7, 7], old_size=[2, 8], num_prefix_tokens=5)
    ours = image_size.interpolated(grid, (2, 8), (7, 7), n_before=5)
    torch.testing.assert_close(ours, theirs)
    assert image_size.interpolated(grid.bfloat16(), (4, 4), (7, 7), 5).dtype == torch.bfloat16


def test_a_joint_between_rectangles_of_as_many_places_turns_the_grid():
    """From 16 x 32 to 32 x 16: every tensor keeps its shape."""
    old, new = (tiny(image_tower=VIT | {"image_size": size}) for size in ([16, 32], [32, 16]))
    moments = {f"exp_avg.{name}": value for name, value in old.state_dict().items()}
    saved = checkpoint.Contents(
        model=old.state_dict(),
        optimizer=moments,
        teacher={f"ema_{name}": value for name, value in old.state_dict().items()},
        description=old.description(),
    )
    entered = stages.in_form_of(new, saved)
    name = "visual.positional_embedding"
    turned = image_size.interpolated(old.state_dict()[name], (2, 4), (4, 2))
    assert not torch.equal(turned, old.state_dict()[name])
    for tensors, key in (
        (entered.model, name),
        (entered.optimizer, f"exp_avg.{name}"),
        (entered.teacher, f"ema_{name}"),
    ):
        assert torch.equal(tensors[key], turned)


# ---- runs


@pytest.fixture(scope="module")
def staged(scenes, tmp_path_factory):
    """A run of three parts with every checkpoint kept, and how to load its configuration anew."""
    from tests.conftest import SETTINGS

    folder = tmp_path_factory.mktemp("staged")

    def make(out, *overrides):
        path = folder / f"{out}.yaml"
        path.write_text(SETTINGS.format(out=folder / out, data=scenes / "train"))
        tasks = f"eval={{zeroshot: {{data: {scenes / 'zeroshot'}, every: 25%}}}}"
        return config.load(path, [*SHORT, tasks, *overrides])

    return train(make("whole"), in_training), make


def test_every_stage_has_its_form_and_the_end_is_as_configured(staged):
    run, _ = staged
    assert sorted(losses(run)) == list(range(1, 9))
    sizes = []
    for step in range(1, 9):
        contents = checkpoint.load(run / f"checkpoints/step_{step:08d}")
        sizes.append(contents.description["model_cfg"]["vision_cfg"]["image_size"])
        positions = contents.optimizer["exp_avg_sq.visual.positional_embedding"]
        assert positions.min() >= 0
        average = contents.teacher["ema_visual.positional_embedding"]
        assert len(positions) == len(average) == (10 if step <= 3 else 5)
    assert sizes == [24] * 3 + [16] * 5

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if line["kind"] == "train"}
    # Stage 2 has a schedule of its own, over its two steps; what follows is the whole run's.
    assert rates[4] == rates[5] == pytest.approx(0.5e-3) and rates[6] < rates[3]
    evaluated = [line["step"] for line in lines if line["kind"] == "eval"]
    assert evaluated == [2, 4, 6, 8]
    state = json.loads((run / "checkpoints/step_00000008/state.json").read_text())
    assert state["loader"]["batch"] == [[0, 24], [3, 48]]


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(staged, step):
    """At a joint, and between two: after the first and before the second."""
    run, make = staged
    out = f"cut{step}"
    shutil.copytree(run, run.parent / out)
    for later in range(step + 1, 9):
        shutil.rmtree(run.parent / out / "checkpoints" / f"step_{later:08d}")
    again = train(make(out, "resume=auto", "eval={}"))
    assert losses(again) == losses(run)
    one, other = (checkpoint.load(checkpoint.newest(r)) for r in (run, again))
    assert all(one.model[k].equal(other.model[k]) for k in one.model)
    assert all(one.optimizer[k].equal(other.optimizer[k]) for k in one.optimizer)
    assert all(one.teacher[k].equal(other.teacher[k]) for k in one.teacher)
    assert len(one.optimizer) > 30 < len(one.teacher)


def test_a_joint_that_changes_nothing_changes_no_bit(settings):
    options = ("train.duration=5", "data.workers=0", "teacher={ema: 0.9, eval_ema: true}")
    plain = train(settings(*options, out="plain"))
    parts = train(settings(*options, "stages=[{duration: 2}, {duration: 20%}]", out="parts"))
    assert losses(parts) == losses(plain)
    one, other = (checkpoint.load(checkpoint.newest(r)) for r in (plain, parts))
    for tensors in ("model", "optimizer", "teacher"):
        kept, again = getattr(one, tensors), getattr(other, tensors)
        assert kept.keys() == again.keys() and all(kept[k].equal(again[k]) for k in kept)


REFUSED = {
    "a batch": ("stages=[{duration: 2, batch: 25}]", r"stages\.0\.batch is 25, .*batch=24"),
    "too large a batch": ("stages=[{duration: 2, batch: 400}]", "batch of 400 is larger"),
    "a size": ("stages=[{duration: 2, image_size: 20}]", "patch_size 8 does not divide"),
    "a context": ("stages=[{duration: 2, context_length: 25}]", r"context_length is 25, .* 24"),
    "beyond the whole": ("stages=[{duration: 10}]", r"more than train\.duration"),
    "too long a warm-up": (
        "stages=[{duration: 2, warmup: 3}]",
        r"stages\.0\.warmup is 3 steps, but the stage has 2",
    ),
    "no length": ("stages=[{duration: 0}]", "duration is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_stage_that_would_fail_later_is_refused_at_the_start(settings, tmp_path, case):
    override, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        train(settings(override, "data.workers=0"))
    assert not (tmp_path / "run").exists()


def stage_of(model, **keys):
    """A one-stage run of this model section, as `stages.check` sees it."""
    tree = {"out": "run", "data": {"sources": [{"name": "shards", "path": "none"}]}, "model": model}
    tree |= {"train": {"duration": 9, "batch": 8}, "objective": {"infonce": {}}}
    loaded = config.parse(tree | {"stages": [{"duration": 2} | keys]})
    plans = of_stages(loaded.train, loaded.stages, lambda size: 10)
    stage = loaded.stages[0]
    made = stages.Segment(1, 2, stage, stages.configured(loaded, stage), plans[0], [])
    return [made, replace(made, number=2, stage=None, config=loaded, plan=plans[1])]


TOWERS = {  # the image tower, a stage's keys, what is said of it; None: it works
    "vit": (VIT, {"image_size": 24}, None),
    "vit without patches": (VIT, {"patch_dropout": 0.5}, None),
    "resnet": (
        {"name": "timm", "model": "test_resnet", "image_size": 64},
        {"image_size": 32},
        None,
    ),
    "timm's vit": ({"name": "timm", "model": "test_vit"}, {"image_size": 96}, None),
    "a rectangle": (VIT, {"image_size": [16, 48]}, None),
    "timm's, a rectangle": ({"name": "timm", "model": "test_vit"}, {"image_size": [96, 128]}, None),
    "a vit with adapters": (VIT | {"lora": {"r": 2}}, {"image_size": 24}, None),
    "odd rectangle": (VIT, {"image_size": [16, 20]}, "patch_size 8 does not divide"),
}


@pytest.mark.parametrize("case", TOWERS)
def test_which_towers_can_change_in_a_stage(case):
    tower, keys, message = TOWERS[case]
    model = {"image_tower": tower, "text_tower": TEXT, "embed_dim": 48}
    try:
        segments = stage_of(model, **keys)
        stages.check(segments, Replicated(torch.device("cpu")), tiny(**model))
    except ValueError as error:
        assert message is not None and re.search(message, str(error))
    else:
        assert message is None


def test_an_engine_of_one_optimiser_a_process_is_refused():
    model = {"image_tower": VIT, "text_tower": TEXT, "embed_dim": 48}
    with pytest.raises(ValueError, match=r"DeepSpeed holds one .* fsdp2 or ddp"):
        stages.check(stage_of(model), ZeRO(torch.device("cpu"), 1), tiny())


def on_ranks(folder, data, engine, *overrides):
    """Train on this rank; the losses that the first one reports."""
    from tests.conftest import SETTINGS

    path = Path(folder) / "run.yaml"
    if not path.exists():
        path.write_text(SETTINGS.format(out=Path(folder) / "run", data=data))
    run = train(config.load(path, [*SHORT, f"train.engine={engine}", *overrides]))
    return losses(run)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_ranks_pass_the_joints_as_a_resumed_run_does(scenes, tmp_path, engine):
    folder, data = str(tmp_path), str(scenes / "train")
    whole = ranks.run(2, on_ranks, folder, data, engine)[0]
    for later in range(4, 9):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{later:08d}")
    assert ranks.run(2, on_ranks, folder, data, engine, "resume=auto")[0] == whole
    assert sorted(whole) == list(range(1, 9))
