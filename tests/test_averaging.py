"""Averages of weights: the moving average beside the weights, soups, blends, and their sweep."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import ranks
from tests.models.tiny import TEXT, VIT, siglip, tiny
from tests.test_step import make_batch, make_training, own_rows
from tests.test_train import losses
from vlp import averaging, checkpoint, config
from vlp.averaging import average, mean_of
from vlp.cli import main
from vlp.eval.evaluation import in_training
from vlp.export.averages import soup
from vlp.export.folder import export, export_run
from vlp.models.build import build
from vlp.models.load import load
from vlp.resume import start_from
from vlp.step import train_step
from vlp.teacher import Teacher
from vlp.train import train

RESNET = {"image_tower": {"name": "timm", "model": "test_resnet", "image_size": 64}}


def stirred(seed, **keys):
    """A model of equal form and other weights, of a run in which everything had moved."""
    model = tiny(**keys)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator), alpha=0.1)
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(seed)
    return model


# ---- soups and blends


def test_a_mean_of_nonnegative_models_is_one_and_of_others_too_is_refused():
    models = [stirred(seed, heads={"nonnegative": True}) for seed in (1, 2)]
    mean = mean_of(models, [0.5, 0.5], ["a", "b"])
    pixels, ids = mean.example(3)
    assert (mean.encode_image(pixels) >= 0).all() and (mean.encode_text(ids) >= 0).all()
    with pytest.raises(ValueError, match=r"heads\.nonnegative False, not True"):
        mean_of([models[0], stirred(2)], [0.5, 0.5], ["a", "b"])


@pytest.mark.parametrize("keys", [{}, {"bias": -4.0}, RESNET], ids=["vit", "a bias", "resnet"])
def test_a_mean_is_the_loop_over_its_tensors_in_float64(keys):
    models, weights = [stirred(seed, **keys) for seed in (1, 2, 3)], [0.5, 0.2, 0.3]
    mean = mean_of(models, weights, ["a", "b", "c"]).state_dict()
    n_counts = 0
    for name, value in mean.items():
        parts = [model.state_dict()[name] for model in models]
        if name.endswith("num_batches_tracked"):
            assert value.item() == 3
            n_counts += 1
            continue
        expected = sum(weight * part.double() for weight, part in zip(weights, parts))
        assert torch.equal(value, expected.float()), name
    assert len(mean) > 40 and (n_counts > 5) == (keys is RESNET)


def test_the_scale_is_averaged_as_its_bounded_logarithm():
    models = [tiny(scale={"init": init, "max": 50.0}) for init in (10.0, 40.0)]
    with torch.no_grad():
        models[1].logit_scale.fill_(9.0)  # bounded at 50 in the forward pass
    mean = mean_of(models, [0.5, 0.5], ["a", "b"])
    assert mean().scale.item() == pytest.approx(math.sqrt(10 * 50), rel=1e-6)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Exports a and b, and what each of them holds."""
    folder = tmp_path_factory.mktemp("two models")  # with a space in it
    for seed, name in enumerate(("a", "b"), start=1):
        export(stirred(seed), folder / name)
    return folder


@pytest.mark.parametrize(("alpha", "name"), [(0, "a"), (1, "b")])
def test_a_blend_at_an_end_is_that_model_byte_for_byte(two, tmp_path, alpha, name):
    command = ["export", "--blend", str(two / "a"), str(two / "b"), "--alpha", str(alpha)]
    assert main([*command, "--to", str(tmp_path / "out")]) == 0
    n_compared = 0
    for file in (two / name).rglob("*.safetensors"):
        same = tmp_path / "out" / file.relative_to(two / name)
        assert same.read_bytes() == file.read_bytes()
        n_compared += 1
    assert n_compared == 2


def test_a_soup_takes_every_kind_of_reference_and_its_card_names_them(two, tmp_path):
    """A run, a checkpoint of it, an export and a file of weights that says no architecture."""
    models = [stirred(seed) for seed in (3, 4)]
    for step, model in enumerate(models, start=1):
        contents = checkpoint.Contents(
            model.state_dict(), {}, config="out: run", description=model.description()
        )
        checkpoint.save(tmp_path / "run", step, contents, keep=2)
    bare = tmp_path / "weights.safetensors"
    save_file(load_file(two / "b/open_clip_model.safetensors"), bare)

    members = [tmp_path / "run", tmp_path / "run/checkpoints/step_00000001", two / "a", bare]
    listed = ",".join(map(str, [bare, *members[:3]]))
    command = ["export", "--average", listed, "--weights", ".4,.3,.2,.1"]
    assert main([*command, "--to", str(tmp_path / "out")]) == 0

    parts = [load(two / "b"), models[1], models[0], load(two / "a")]
    expected = mean_of(parts, [0.4, 0.3, 0.2, 0.1], list("abcd")).state_dict()
    soup_of_four = load(tmp_path / "out").state_dict()
    assert all(torch.equal(soup_of_four[name], value) for name, value in expected.items())
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "an average of 4 models': 0.4 · `weights.safetensors` + 0.3 · `run` + "
        "0.2 · `run/step_00000001` + 0.1 · `a`."
    ) in card
    assert str(tmp_path) not in card


UNLIKE = {
    "a width": ({"image_tower": VIT | {"width": 96}}, "vision_cfg.width 96, not 64"),
    "heads of equal width": ({"image_tower": VIT | {"head_width": 16}}, "vision_cfg.head_width"),
    "an activation": (
        {"image_tower": VIT | {"quick_gelu": True}, "text_tower": TEXT | {"quick_gelu": True}},
        "quick_gelu True, not False",
    ),
    "a size": ({"image_tower": VIT | {"image_size": 64}}, r"pixels: size \(64, 64\), not \(32"),
    "a context": ({"text_tower": TEXT | {"context_length": 9}}, "tokens: .*context_length=9"),
    "a bias": ({"bias": -4.0}, "scaling.logit_bias|init_logit_bias"),
    "another tower": (RESNET, "vision_cfg"),
    "how pictures lie": ({"decoding": {"exif": False}}, "pixels: decoding"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_models_without_a_mean_are_refused_by_what_they_differ_in(case):
    keys, message = UNLIKE[case]
    with pytest.raises(ValueError, match=f"b and a have no average, .*{message}"):
        mean_of([tiny(), tiny(**keys)], [1.0, 0.0], ["a", "b"])


def test_what_changes_no_embedding_is_no_difference(tmp_path):
    keys = {"image_tower": VIT | {"patch_dropout": 0.5}, "heads": {"concepts": 3}}
    mean_of([tiny(), tiny(**keys)], [0.5, 0.5], ["a", "b"])
    # Each export brings a copy of its tokenizer, in a folder of its own.
    tower = siglip(tmp_path)
    model = tiny(image_tower=tower, text_tower=None, embed_dim=None)
    for name in ("a", "b"):
        export(model, tmp_path / name)
    average([str(tmp_path / "a"), str(tmp_path / "b")], [0.5, 0.5])


WRONG = {
    "nothing": ([], "found no model; expected one of RUN, --average, --blend"),
    "two ways": (["{a}", "--average", "{a},{b}"], "found RUN and --average"),
    "one model": (["--average", "{a}"], "expected two models or more"),
    "an absent one": (["--average", "{a},{a}x"], "no model"),
    "too few weights": (["--average", "{a},{b}", "--weights", ".5"], "1 numbers .* expected 2"),
    "a sum of 1.1": (["--average", "{a},{b}", "--weights", ".5,.6"], "sum 1.1; expected 2"),
    "no number": (["--average", "{a},{b}", "--weights", "half"], "expected numbers of 0 to 1"),
    "stray weights": (["{a}", "--weights", ".5,.5"], "--weights belongs to --average"),
    "stray alpha": (["{a}", "--alpha", ".5"], "--alpha belongs to --blend"),
    "alpha of 2": (["--blend", "{a}", "{b}", "--alpha", "2"], "alpha is 2; expected 0"),
    "no run": (["{a}", "--ema"], "no run of vlp, and only runs and their checkpoints keep"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_question_is_answered_and_writes_nothing(two, tmp_path, capsys, case):
    arguments, message = WRONG[case]
    given = [argument.format(a=two / "a", b=two / "b") for argument in arguments]
    assert main(["export", *given, "--to", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_weights_are_equal_unless_given_and_a_path_may_hold_a_comma(tmp_path):
    (tmp_path / "a,b").mkdir()
    members = soup([f"{tmp_path}/a,b", "c,d"], None)
    assert members.references == [f"{tmp_path}/a,b", "c", "d"]
    assert members.weights == [1 / 3] * 3
    assert averaging.card_name("hf-hub:me/clip") == "hf-hub:me/clip"


# ---- the moving average


def averaged_twice():
    """The moving average as the checkpoint holds it, and as evaluation gets it."""
    training = make_training(2, engine="fsdp2", double=False)
    model = training.engine.evaluation_model()
    options = config.Teacher(ema=0.5, eval_ema=True)
    training.teacher = Teacher(options, training.engine, model, training.objective.needs, {})
    for _ in range(2):
        train_step(training, make_batch(own_rows()))
    given = training.teacher.evaluation_model().state_dict()
    stored = {name.removeprefix("ema_"): v for name, v in training.teacher.state().items()}
    current = training.engine.evaluation_model().state_dict()
    moved = any(not torch.equal(given[name], current[name]) for name in given)
    return (
        len(given),
        [name for name in stored if not torch.equal(stored[name], given[name])],
        moved,
    )


def test_sharded_averages_are_whole_when_they_are_evaluated():
    results = ranks.run(2, averaged_twice)
    assert results[0][0] > 20 and results[0][1:] == (([], True))


@pytest.fixture(scope="module")
def with_average(scenes, tmp_path_factory):
    """A run that evaluated its moving average, which no term reads."""
    from tests.conftest import SETTINGS

    folder = tmp_path_factory.mktemp("averaged")
    path = folder / "run.yaml"
    path.write_text(SETTINGS.format(out=folder / "run", data=scenes / "train"))
    options = (
        "train.duration=4",
        "data.workers=0",
        "checkpoint.every=2",
        "train.optimizer.lr=1e-2",
        "teacher={ema: 0.5, eval_ema: true}",
        f"eval={{zeroshot: {{data: {scenes / 'zeroshot'}, every: 50%}}}}",
    )
    loaded = config.load(path, list(options))
    return train(loaded, in_training), loaded


def test_the_moving_average_is_evaluated_beside_the_weights(with_average):
    run, _ = with_average
    results = json.loads((run / "results.json").read_text())
    assert [record["label"] for record in results] == ["zeroshot", "ema.zeroshot"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in scored] == [2, 4]
    assert all({"zeroshot.acc1", "ema.zeroshot.acc1"} <= line.keys() for line in scored)
    # Of other weights: what is stored is what was evaluated.
    assert results[0]["scale"] != results[1]["scale"]
    stored = checkpoint.load_any(f"{run}@ema")
    assert results[1]["scale"] == stored().scale.item()
    assert results[0]["scale"] == checkpoint.load_any(run)().scale.item()


def test_a_resumed_run_evaluates_the_same_moving_average(with_average, tmp_path):
    run, loaded = with_average
    shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_00000004")
    again = train(replace(loaded, out=str(tmp_path / "cut"), resume="auto"), in_training)
    assert losses(again) == losses(run)
    one, other = (json.loads((r / "results.json").read_text()) for r in (run, again))
    assert [r["metrics"] for r in one] == [r["metrics"] for r in other] and len(one) == 2


def test_the_moving_average_is_exported_and_evaluated_with_its_own_scores(
    with_average, scenes, tmp_path
):
    run, _ = with_average
    assert main(["export", str(run), "--ema", "--to", str(tmp_path / "average")]) == 0
    export_run(run, tmp_path / "weights")
    average = load(tmp_path / "average").state_dict()
    stored = checkpoint.load_any(f"{run}@ema").state_dict()
    assert all(torch.equal(average[name], stored[name]) for name in average) and len(average) > 20
    assert any(
        not torch.equal(v, average[k]) for k, v in load(tmp_path / "weights").state_dict().items()
    )

    # Each card shows one model's scores.
    scores = {
        r["label"]: r["metrics"]["acc1"] for r in json.loads((run / "results.json").read_text())
    }
    for name, label in (("average", "ema.zeroshot"), ("weights", "zeroshot")):
        card = (tmp_path / name / "README.md").read_text()
        assert card.count("| acc1 |") == 1 and f"| acc1 | {scores[label]:.4g} |" in card
    task = ["--task", "zeroshot", "--data", str(scenes / "zeroshot"), "--cache", "none", "--quiet"]
    out = tmp_path / "results.json"
    assert main(["eval", str(run), "--ema", *task, "--device", "cpu", "--out", str(out)]) == 0
    (record,) = json.loads(out.read_text())["results"]
    assert record["metrics"]["acc1"] == scores["ema.zeroshot"]
    assert "moving average" in (tmp_path / "average/README.md").read_text()
    assert "moving average of" not in (tmp_path / "weights/README.md").read_text()


def test_the_moving_average_is_a_reference_wherever_a_model_is_named(with_average):
    """As a start, as pretrained weights; and a folder that is called so comes first."""
    run, loaded = with_average
    average = checkpoint.load_any(f"{run}@ema").state_dict()
    started = build(loaded.model)
    start_from(started, f"{run}@ema")
    pretrained = build(replace(loaded.model, pretrained=f"{run}@ema"))
    for model in (started, pretrained):
        assert all(torch.equal(v, average[k]) for k, v in model.state_dict().items())
    assert not torch.equal(build(loaded.model).logit_scale, started.logit_scale)

    export_run(run, run.parent / "taken@ema")
    assert checkpoint.load_any(run.parent / "taken@ema").embed_dim == 16


def test_a_run_without_a_moving_average_says_which_key_keeps_one(settings, tmp_path, capsys):
    run = train(settings("train.duration=1", "data.workers=0"))
    assert main(["export", str(run), "--ema", "--to", str(tmp_path / "out")]) == 1
    assert (
        "holds no moving average of the weights; train with teacher.ema=" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match=r"eval_ema is true, .* set ema"):
        settings("teacher={eval_ema: true}")
    with pytest.raises(
        ValueError, match=r"no term reads .* evaluate it with teacher.eval_ema=true"
    ):
        train(settings("teacher={ema: 0.9}", out="unread"))
