"""Stages of a run: their extent, their joints, and runs stopped before, at and after these."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from open_clip.model import resize_pos_embed
from timm.layers import resample_abs_pos_embed

from tests import ranks
from tests.models.tiny import TEXT, VIT, tiny
from tests.test_train import losses
from vlp import checkpoint, config, stages
from vlp.config import Duration, Plan, Stage, WholePlan
from vlp.config.durations import of_stages
from vlp.engines.replicated import Replicated
from vlp.engines.zero import ZeRO
from vlp.eval.evaluation import in_training
from vlp.export.folder import export_run
from vlp.lifetime import Stopped
from vlp.models.load import load
from vlp.pretrained import image_size
from vlp.train import train
from vlp.validation import Validator

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


@pytest.mark.parametrize(
    ("duration", "first", "last"),
    [
        # 20 steps of 100 are 2 epochs of the 4; 20 of 50 are one, 50 of 20 the last.
        ("1ep", 10, 50),
        ("2.5ep", 30, 75),
        ("500samples", 5, 25),
        ("4ep", 90, 90),
        ("10%", 9, 9),
        (7, 7, 7),
        (0, 0, 0),
        # Beyond the run, as its last stage goes on: what is refused is told in its steps.
        ("5ep", 140, 100),
    ],
)
def test_warm_up_and_cooldown_count_the_samples_of_all_stages(duration, first, last):
    train = config.Train(Duration.from_config("4ep"), 20)
    lengths = [("2ep", 100), ("1ep", 50)]
    listed = [Stage(Duration.from_config(length), batch=size) for length, size in lengths]
    plans = of_stages(train, listed, lambda size: 1000 // size)
    assert [(plan.first, plan.end) for plan in plans] == [(0, 20), (20, 40), (40, 90)]
    whole, span = WholePlan(plans), Duration.from_config(duration)
    assert (whole.steps(span), whole.last_steps(span)) == (first, last)

    # Of one stage it is that stage's plan.
    (alone,) = of_stages(train, [], lambda size: 1000 // size)
    assert WholePlan([alone]).steps(span) == WholePlan([alone]).last_steps(span)
    assert WholePlan([alone]).steps(span) == alone.steps(span)


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
    one = checkpoint.load(checkpoint.newest(plain))

    # The last of them takes the whole run for one stage.
    for name, listed in (("parts", "{duration: 2}, {duration: 20%}"), ("one", "{duration: 100%}")):
        parts = train(settings(*options, f"stages=[{listed}]", out=name))
        assert losses(parts) == losses(plain)
        other = checkpoint.load(checkpoint.newest(parts))
        for tensors in ("model", "optimizer", "objective", "teacher"):
            kept, again = getattr(one, tensors), getattr(other, tensors)
            assert kept.keys() == again.keys() and all(kept[k].equal(again[k]) for k in kept)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_cooldown_in_samples_is_of_the_samples_of_the_last_steps(settings):
    wsd = "train.optimizer={lr: 1e-3, schedule: wsd, warmup: 0, cooldown: 96samples}"
    stage = "stages=[{duration: 4, batch: 8}]"
    run = train(settings("train.duration=6", "data.workers=0", wsd, stage))
    rates = [line["lr"] for line in records(run) if line["kind"] == "train"]
    # Two steps of 48 at the end, and not twelve of 8.
    assert rates[:5] == pytest.approx([1e-3] * 5) and rates[5] < 0.5e-3


def held_out(scenes, more=""):
    source = f"{{name: shards, path: {scenes / 'val'}}}"
    return f"validation={{data: {{sources: [{source}]}}, every: 1{more}}}"


def test_validation_sees_batches_pictures_and_texts_of_its_stage(settings, scenes, capsys):
    parts = "stages=[{duration: 1, batch: 4, image_size: 24, context_length: 12}, {duration: 1}]"
    seen = []

    def noted(self, training, model, batch, number):
        seen.append((self.batch, tuple(batch.image.shape[-2:]), batch.text.shape[1]))
        return measured(self, training, model, batch, number)

    measured = Validator._values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "_values", noted)
        options = ("data.workers=0", "train.duration=3", "train.batch=8")
        run = train(settings(*options, parts, held_out(scenes), "checkpoint.best=val.infonce"))
        assert seen == [(4, (24, 24), 12)] * 2 + [(8, (16, 16), 24)] * 2
        assert "(4, 8, 8)" in capsys.readouterr().err

        seen.clear()
        train(settings(*options, parts, held_out(scenes, ", batch: 2"), out="fixed"))
        assert [size for size, _, _ in seen] == [2] * 12
        assert "validation.batch" not in capsys.readouterr().err
    values = [line["val.infonce"] for line in records(run) if line["kind"] == "eval"]
    # Near log 4, then near log 8: of an untrained model.
    assert values[0] < values[1] and len(values) == 3


def test_a_last_stages_pictures_are_what_is_evaluated_and_exported(settings, scenes, tmp_path):
    seen = []

    def noted(model, tasks, dtype):
        seen.append((model.image_spec.size, model.visual.positional_embedding.shape[0]))
        return in_training(model, tasks, dtype)

    tasks = f"eval={{zeroshot: {{data: {scenes / 'zeroshot'}, every: 1}}}}"
    parts = "stages=[{duration: 1}, {duration: 1, image_size: [24, 32]}]"
    run = train(settings("train.duration=2", "data.workers=0", tasks, parts), noted)
    assert seen == [((24, 32), 13)] * 2
    export_run(run, tmp_path / "exported")
    assert load(tmp_path / "exported").image_spec.size == (24, 32)


@pytest.mark.parametrize("place", ["vlp.saving.collect", "vlp.stages.joint"])
def test_a_signal_between_two_stages_is_answered(settings, monkeypatch, place):
    """While the first one is left, and while the second one is built."""
    original, sent = resolve_name(place), []

    def asked(*args):
        if not sent:
            sent.append(signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args)

    # What it would meet where nobody listens.
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    monkeypatch.setattr(place, asked)
    options = ("train.duration=4", "data.workers=0", "stages=[{duration: 2}]")
    try:
        with pytest.raises(Stopped, match="stopped by SIGUSR1 after step 2; saved"):
            train(settings(*options))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sent and sorted(losses(train(settings(*options, "resume=auto")))) == [1, 2, 3, 4]


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
    "too few candidates": (
        "stages=[{duration: 2}, {duration: 2, batch: 4}]",
        r"stages\.1: the term 'infonce': hardest: found 8 of 3 other candidates",
    ),
    "one candidate": (
        "stages=[{duration: 2}, {duration: 2, batch: 1}]",
        r"stages\.1: the term 'hn_nce' needs at least 2 candidates a row, found 1",
    ),
    "more held-out samples than there are": (
        "stages=[{duration: 2, batch: 4}, {duration: 2, batch: 16}]",
        r"validation: a batch of 16 is larger than the data \(8 samples\); set validation.batch",
    ),
    "fewer held-out samples than a batch": (
        "stages=[{duration: 2, batch: 4}, {duration: 2, batch: 8}]",
        "validation.samples is 7, less than a batch of 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_stage_that_would_fail_later_is_refused_at_the_start(settings, scenes, tmp_path, case):
    override, message = REFUSED[case]
    besides = {
        "too few candidates": ["objective={infonce: {hardest: 8}}", "train.micro_batches=1"],
        "one candidate": ["objective={hn_nce: {}}", "train.micro_batches=1"],
        "more held-out samples than there are": [held_out(scenes), "train.batch=4"],
        "fewer held-out samples than a batch": [held_out(scenes, ", samples: 7"), "train.batch=4"],
    }
    with pytest.raises(ValueError, match=message):
        train(settings(override, "data.workers=0", *besides.get(case, [])))
    assert not (tmp_path / "run").exists()


def test_a_selection_is_checked_with_the_batch_of_every_stage(settings, scenes, tmp_path):
    sigmoid = ("data.workers=0", "train.batch=8", "model.bias=-10", "objective={siglip: {}}")
    reference = train(settings(*sigmoid, "train.duration=1", out="reference"))
    jest = f"selection={{jest: {{reference: {reference}, keep: 0.5, chunks: 4}}}}"
    parts = "stages=[{duration: 2, batch: 4}, {duration: 2, batch: 6, micro_batches: 1}]"
    with pytest.raises(ValueError, match=r"stages\.1: 4 chunks of jest do not divide .* 6"):
        train(settings(*sigmoid, jest, parts))
    assert not (tmp_path / "run").exists()

    # What mcl chose from is made once, for train.batch.
    model = {"image_tower": VIT, "text_tower": TEXT, "embed_dim": 48}
    segments = stage_of(model, batch=4)[:1]
    mcl = {"selection": {"mcl": {"labels": ["cells"]}}}
    whole = config.parse(config_of(model) | mcl)
    with pytest.raises(ValueError, match="mcl makes batches of one size"):
        stages.check(whole, segments, Replicated(torch.device("cpu")), tiny())


def config_of(model):
    """A run with this model section."""
    tree = {"out": "run", "data": {"sources": [{"name": "shards", "path": "none"}]}, "model": model}
    return tree | {"train": {"duration": 9, "batch": 8}, "objective": {"infonce": {}}}


def stage_of(model, **keys):
    """A one-stage run of this model section, as `stages.check` sees it."""
    loaded = config.parse(config_of(model) | {"stages": [{"duration": 2} | keys]})
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
        whole = segments[-1].config
        stages.check(whole, segments, Replicated(torch.device("cpu")), tiny(**model))
    except ValueError as error:
        assert message is not None and re.search(message, str(error))
    else:
        assert message is None


def test_an_engine_of_one_optimiser_a_process_is_refused():
    model = {"image_tower": VIT, "text_tower": TEXT, "embed_dim": 48}
    with pytest.raises(ValueError, match=r"DeepSpeed holds one .* fsdp2 or ddp"):
        segments = stage_of(model)
        stages.check(segments[-1].config, segments, ZeRO(torch.device("cpu"), 1), tiny())


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
