"""The loss over held-out samples, the best checkpoint, and stopping early."""

import json
import os
import shutil
import signal
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

import pytest

from tests import ranks
from tests.data.test_embedded import write_embeddings
from vlp import checkpoint, config, watch
from vlp.config import Best
from vlp.data.embedded import Teacher
from vlp.eval import tasks
from vlp.eval.evaluation import in_training
from vlp.eval.tasks import few_shot
from vlp.lifetime import Stopped
from vlp.plugin import Plugin
from vlp.pretrained.references import resolve
from vlp.schema import ConfigError
from vlp.train import train
from vlp.validation import Validator, check_teachers

SMALL = ("data.workers=0", "train.duration=6", "checkpoint.keep=1", "log.every=6")


def held_out(scenes, more="every: 2"):
    source = f"{{name: shards, path: {scenes / 'val'}}}"
    return f"validation={{data: {{sources: [{source}]}}, batch: 4, {more}}}"


def scores(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def best_of(run):
    return json.loads((run / "checkpoints" / "best.json").read_text())


def saved(run):
    return [path.name for path in checkpoint.all_of(run)]


def test_the_loss_of_held_out_samples_is_measured_and_changes_nothing(settings, scenes):
    plain = train(settings(*SMALL, out="plain"))
    run = train(settings(*SMALL, held_out(scenes), out="watched"))
    assert sorted(scores(run, "val.loss")) == [2, 4, 6]
    assert scores(run, "val.infonce").keys() == scores(run, "val.fastclip").keys()

    # Numbers of each sample, moments and weights are those of a run without it.
    one, other = (checkpoint.load(checkpoint.newest(folder)) for folder in (plain, run))
    for kind in ("model", "optimizer", "objective"):
        tensors, same = getattr(one, kind), getattr(other, kind)
        assert tensors and all(tensors[name].equal(same[name]) for name in tensors), kind


def measured(path, overrides):
    """val.loss twice, by a model that was trained for two steps in between."""
    values = []
    original = Validator.measure

    def noted(self, training):
        values.append(original(self, training))
        values.append(original(self, training))
        return values[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "measure", noted)
        train(config.load(path, overrides))
    return values


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_ranks_measure_what_one_does(settings, scenes, tmp_path, micro_batches):
    settings()
    common = [
        "data.workers=0",
        "train.duration=4",
        "checkpoint.every=100%",
        "checkpoint.best=val.infonce",
        "stop={metric: val.loss, patience: 1, min_delta: 10}",  # after the second step
        "train.optimizer.lr=1e-9",  # dropped patches depend on the ranks, and so does training
        "train.device=cpu",
        "objective={infonce: {}, sogclr: {}, momentum_queue: {}}",
        "teacher={ema: .9, queue: 96}",
        f"train.micro_batches={micro_batches}",
        held_out(scenes, "every: 1"),
    ]
    one = measured(tmp_path / "run.yaml", [*common, f"out={tmp_path / 'one'}"])
    of_ranks = ranks.run(2, measured, tmp_path / "run.yaml", [*common, f"out={tmp_path / 'two'}"])
    assert of_ranks[0] == of_ranks[1] and len(one) == 4
    for alone, together in zip(one, of_ranks[0]):
        assert alone == pytest.approx(together, rel=1e-5)
    assert saved(tmp_path / "one") == saved(tmp_path / "two")
    assert best_of(tmp_path / "one")["step"] == best_of(tmp_path / "two")["step"]
    # Dropout is off: a second measurement gives the same bits.
    assert one[0] == one[1] and one[2] == one[3]


def test_a_signal_during_validation_saves_at_once(settings, scenes, monkeypatch):
    original = Validator._values

    def asked(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(Validator, "_values", asked)
    with pytest.raises(Stopped, match="stopped by SIGINT after step 2; saved"):
        train(settings(*SMALL, held_out(scenes)))


def test_a_fixed_scale_and_fewer_samples(settings, scenes):
    runs = {}
    for name, more in (("own", "every: 6"), ("fixed", "every: 6, scale: 1.0, samples: 7")):
        runs[name] = train(settings(*SMALL, held_out(scenes, more), out=name))
    own, fixed = (scores(run, "val.infonce")[6] for run in runs.values())
    assert own != fixed and abs(fixed - 1.386) < 0.7  # near log 4 at so small a scale


def test_held_out_samples_that_are_trained_on_are_warned_of(settings, scenes, tmp_path, capsys):
    quick = ("data.workers=0", "train.duration=1")
    train(settings(*quick, held_out(scenes), out="apart"))
    assert "trained on, too" not in capsys.readouterr().err

    # The same shards at another place.
    shutil.copytree(scenes / "train", tmp_path / "copied")
    source = f"[{{name: shards, path: {tmp_path / 'copied'}}}]"
    train(settings(*quick, f"validation={{data: {{sources: {source}}}, batch: 8}}", out="same"))
    assert "trained on, too" in capsys.readouterr().err


def scripted(values):
    """An evaluation whose score is the next of `values`."""
    left = iter(values)

    def evaluate(model, tasks, dtype):
        return [
            {"label": "retrieval", "metrics": {"image_retrieval_recall@1": next(left)}}
            for _ in tasks
        ]

    return evaluate


RECALL = "retrieval.image_retrieval_recall@1"


def watched(scenes):
    return f"eval={{retrieval: {{data: {scenes / 'retrieval'}, every: 1}}}}"


def test_the_best_checkpoint_stays_beside_the_newest_and_has_a_name(settings, scenes):
    options = (*SMALL, watched(scenes), f"checkpoint.best={RECALL}", "checkpoint.every=5")
    run = train(settings(*options), scripted([0.1, 0.4, 0.3, 0.4, 0.2, 0.1]))
    assert best_of(run) == {
        "checkpoint": "step_00000002",
        "step": 2,
        "metric": RECALL,
        "value": 0.4,
        "mode": "max",
    }
    assert saved(run) == ["step_00000002", "step_00000006"]
    assert resolve(f"{run}@best").path == run / "checkpoints" / "step_00000002"
    model = checkpoint.load_any(f"{run}@best")
    assert not model.logit_scale.equal(checkpoint.load_any(run).logit_scale)

    # A resumed run knows what there is to beat.
    longer = (*options, "train.duration=8", "resume=auto")
    train(settings(*longer), scripted([0.3, 0.5]))
    assert best_of(run)["step"] == 8 and saved(run) == ["step_00000008"]


def test_a_branch_that_is_left_takes_its_best_checkpoint_along(settings, scenes):
    options = (*SMALL, watched(scenes), f"checkpoint.best={RECALL}", "checkpoint.every=2")
    options = (*options, "checkpoint.keep=3")
    run = train(settings(*options), scripted([0.1, 0.2, 0.1, 0.1, 0.1, 0.9]))
    assert best_of(run)["step"] == 6
    place = run / "checkpoints" / "step_00000004"
    train(settings(*options, f"resume={place}"), scripted([0.1, 0.15]))
    assert best_of(run)["step"] == 2


def test_a_run_without_a_better_score_ends_in_good_order(settings, scenes, capsys):
    options = (*SMALL, "train.duration=40", watched(scenes))
    stop = f"stop={{metric: {RECALL}, patience: 3, min_delta: 0.05}}"
    values = [0.2, 0.22, 0.24]
    run = train(settings(*options, "train.duration=3", stop), scripted(values))
    assert saved(run) == ["step_00000003"]  # two without a better one, not three

    # The resumed run goes on counting: the third one is the next.
    train(settings(*options, stop, "resume=auto"), scripted([0.23]))
    assert (
        f"stopping early: {RECALL} has not become better than 0.2 in 3" in capsys.readouterr().out
    )
    assert saved(run) == ["step_00000004"]
    (record,) = json.loads((run / "results.json").read_text())
    assert record["metrics"] == {"image_retrieval_recall@1": 0.23}
    assert list(scores(run, RECALL)) == [1, 2, 3, 4]

    # And at once, where nothing has changed.
    train(settings(*options, stop, "resume=auto"), scripted([0.23]))
    assert saved(run) == ["step_00000004"]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["checkpoint.best=retrieval.image_recall@1"], "did you mean 'retrieval.image_retrieval_"),
        (["checkpoint.best=val.loss"], "nothing of this run measures 'val.loss'"),
        (["checkpoint.best=retrieval"], "nothing of this run measures 'retrieval'"),
        (["stop={metric: zeroshot.acc1, patience: 2}"], "nothing of this run measures"),
        (["stop={metric: retrieval.image_retrieval_recall@1, patience: 0}"], "patience is 0"),
        (["stop={metric: representation.modality_gap, patience: 1}"], "write {metric: rep"),
        (["checkpoint.best=representation.modality_gop"], "did you mean 'representation.modality"),
        (["checkpoint.best=val.infonce"], "nothing of .* 'val.infonce'; known: rep.*, retrieval"),
        (
            ["stop={metric: representation.linear_separability, patience: 1}"],
            "representation.every",
        ),
        (
            ["checkpoint.best={metric: val.infonc, mode: min}", "VALID"],
            "did you mean 'val.infonce'",
        ),
        (["VALID", "validation.every=0"], "every is 0; expected"),
        (
            ["VALID", "validation.batch=9"],
            r"validation: .*\(8 samples\); set validation.batch lower",
        ),
        (["VALID", "validation.samples=3"], "samples is 3; expected at least one batch"),
        (["VALID", "validation.data.sources.0.path=/nowhere"], "validation: .*/nowhere"),
        (["VALID", "validation.data.sources=[]"], "sources is empty"),
    ],
)
def test_what_is_mistyped_is_refused_before_anything_is_written(
    settings, scenes, tmp_path, overrides, complaint
):
    tasks = f"{{data: {scenes / 'retrieval'}}}"
    every = f"{{data: {scenes / 'retrieval'}, every: 1}}"
    eval_ = f"eval={{retrieval: {every}, representation: {tasks}}}"
    overrides = [held_out(scenes) if item == "VALID" else item for item in overrides]
    with pytest.raises((ValueError, ConfigError), match=complaint):
        train(settings("data.workers=0", eval_, *overrides), in_training)
    assert not (tmp_path / "run").exists()


def test_tasks_give_the_scores_that_they_list(settings, scenes):
    tasks = [f"{name}: {{data: {scenes / name}}}" for name in ("retrieval", "zeroshot")]
    made = settings("train.duration=1", "data.workers=0", f"eval={{{', '.join(tasks)}}}")
    records = json.loads((train(made, in_training) / "results.json").read_text())
    assert len(records) == 2
    for task, record in zip(made.eval, records):
        assert set(record["metrics"]) <= set(watch.scores(task)), task.label


def test_every_task_says_which_scores_can_be_watched(tmp_path, monkeypatch):
    n_listed = 0
    for path in sorted(Path(tasks.__file__).parent.glob("[a-z]*.py")):
        module = import_module(f"vlp.eval.tasks.{path.stem}")
        listed = getattr(module, "SCORES", None)
        assert (listed is None) == hasattr(module, "scores"), path.stem
        if listed is not None:
            assert any(fnmatchcase(module.MAIN, one) for one in listed), path.stem
            assert listed and len(set(listed)) == len(listed) and "*" not in listed
        n_listed += 1
    assert n_listed == 32

    few = Plugin("vlp.eval.tasks", "few_shot", few_shot.Options(data="x", shots=[1, 16]))
    assert watch.scores(few)[:3] == ["acc1_0_shots", "acc1_1_shots", "acc1_16_shots"]

    # A file of one's own need not list any.
    (tmp_path / "own_tasks").mkdir()
    (tmp_path / "own_tasks" / "share.py").write_text('MAIN = "of_all"\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert watch.scores(Plugin("own_tasks", "share", None)) == ["of_all"]


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("grouped.group_gap_acc1", "min"),
        ("grouped.worst_group_acc1", "max"),
        ("representation.score_overlap", "min"),
        ("graded.image_retrieval_ndcg@10", "max"),
        ("choices.low_rank", None),
        ("representation.effective_rank_image", None),
        ("ema.retrieval.image_retrieval_recall@1", "max"),
        ("val.loss", "min"),
    ],
)
def test_which_way_a_score_is_better(metric, mode):
    assert watch.mode_of(Best(metric)) == mode


def test_weights_that_move_do_not_move_the_loss_of_held_out_samples(settings, scenes):
    moving = "objective={infonce: {weight: {start: 0.0, end: 2.0, steps: 3}}, siglip: {weight: .5}}"
    options = (*SMALL, "model.bias=-10", moving, held_out(scenes))
    run = train(settings(*options))
    total = [scores(run, f"val.{name}") for name in ("loss", "infonce", "siglip")]
    for step in (2, 4, 6):
        loss, infonce, siglip = (by_step[step] for by_step in total)
        assert loss == pytest.approx(2 * infonce + 0.5 * siglip, rel=1e-5)


A = Teacher("a", 50.0, 6, "a")
TEACHERS = {  # of the held-out samples, beside A; None: taken
    "another scale": ([A._replace(scale=20.0)], r"held-out samples have the scale 20\.0, .* 50\.0"),
    "another width": ([A._replace(width=8)], "have the width 8, .* 6"),
    "other weights": ([A._replace(weights="b")], "have the hash of weights b, .* a"),
    "another place of it": ([A._replace(model="moved")], None),
    "weights that nobody noted": ([A._replace(weights="")], None),
    "none": ([], "have the number of teachers 0, .* 1"),
    "one more": ([A, A], "have the number of teachers 2, .* 1"),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_held_out_embeddings_are_of_the_teacher_of_the_others(case):
    held_out, message = TEACHERS[case]
    if message is None:
        check_teachers(held_out, [A])
    else:
        with pytest.raises(ValueError, match=message):
            check_teachers(held_out, [A])


def test_teachers_of_held_out_samples_are_compared_before_anything_is_written(
    settings, scenes, tmp_path
):
    def source(split, **about):
        folder = write_embeddings(tmp_path / split, scenes / split, **about)
        return f"[{{name: shards, path: {scenes / split}, embeddings: {folder}}}]"

    trained, other = source("train"), source("val", width=8)
    validation = f"validation={{data: {{sources: {other}}}, batch: 4}}"
    with pytest.raises(ValueError, match=r"have the width 8, .* 6"):
        train(settings("data.workers=0", f"data.sources={trained}", validation))
    assert not (tmp_path / "run").exists()
