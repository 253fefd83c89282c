"""The moving average, the queue of its keys and the frozen teacher: exact under every engine, and
carried by checkpoints.
"""

import dataclasses
import json
import shutil

import pytest
import torch

from tests import ranks
from tests.data_tools.tools import call
from tests.models.tiny import TEXT, VIT, tiny
from tests.test_step import make_batch, make_training, own_rows
from tests.test_train import losses
from vlp import checkpoint, config
from vlp.data_tools import embed
from vlp.step import train_step
from vlp.teacher import Teacher
from vlp.train import train

OBJECTIVE = {"infonce": {}, "self_distillation": {"weight": 3.0}}
DECAY, STEPS, QUEUE = 0.7, 3, 32


def averaged(engine="ddp", micro_batches=1, queue=0):
    """Losses, weights after every step, and the teacher's state, of STEPS steps."""
    training = make_training(micro_batches, engine=engine, objective=OBJECTIVE, double=False)
    model = training.engine.evaluation_model()
    options = config.Teacher(ema=DECAY, queue=queue)
    training.teacher = Teacher(options, training.engine, model, training.objective.needs, {})
    weights = [as_lists(training.engine.state(everywhere=True)[0])]
    terms = []
    for _ in range(STEPS):
        terms.append(train_step(training, make_batch(own_rows()))["self_distillation"].item())
        weights.append(as_lists(training.engine.state(everywhere=True)[0]))
    return terms, weights, as_lists(training.teacher.state())


def as_lists(tensors):
    return {name: value.double().flatten().tolist() for name, value in tensors.items()}


def distance(one, other):
    return max((torch.tensor(one[k]) - torch.tensor(other[k])).abs().max().item() for k in one)


def check_recursion(terms, weights, state):
    expected = weights[0]
    for now in weights[1:]:
        expected = {
            k: (DECAY * torch.tensor(v) + (1 - DECAY) * torch.tensor(now[k])).tolist()
            for k, v in expected.items()
        }
    average = {k.removeprefix("ema_"): v for k, v in state.items()}
    assert average.keys() == expected.keys() and len(average) > 20
    assert distance(average, expected) < 1e-6
    assert distance(average, weights[-1]) > 1e-4  # the weights themselves would not do
    # Before any update the average is the model.
    assert terms[0] == pytest.approx(0, abs=1e-9) and terms[1] > 1e-6


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("fsdp2", "zero1", "zero2", "zero3")
        ),
    ],
)
def test_the_average_is_the_recursion_over_the_weights(engine):
    """Of one process, and of two ranks with three micro-batches under every engine, with the same
    values of the term.
    """
    expected = averaged()
    check_recursion(*expected)
    results = ranks.run(2, averaged, engine, 3)
    check_recursion(*results[0])
    assert not results[1][2]  # the first rank alone writes it
    mean = [sum(values) / 2 for values in zip(*(terms for terms, _, _ in results))]
    assert mean == pytest.approx(expected[0], rel=1e-4, abs=1e-9)


def taught(micro_batches=1, engine="ddp"):
    """Terms of STEPS steps with two frozen teachers of different widths, a map to both and a queue
    of their rows.
    """
    forms = [{}, {"form": "features"}, {"form": "interactive", "queue": True}, {"form": "cross"}]
    training = make_training(
        micro_batches,
        engine=engine,
        objective={"infonce": {}, "distill": forms},
        double=False,
        heads={"teacher": {"width": [12, 20]}},
    )
    needs, model = training.objective.needs, training.engine.evaluation_model()
    teacher = Teacher(config.Teacher(queue=QUEUE), training.engine, model, needs, {}, (2, 20))
    sizes = {"image_tower": VIT | {"image_size": 16}, "text_tower": TEXT | {"context_length": 77}}
    teacher.frozen = [tiny(seed=width, embed_dim=width, **sizes) for width in (12, 20)]
    training.teacher = teacher

    terms = []
    for _ in range(STEPS):
        scalars = train_step(training, make_batch(own_rows()))
        names = ("loss", "distill", "distill.features", "distill.interactive", "distill.cross")
        terms.append([scalars[name].item() for name in names])
    maps = training.engine.evaluation_model().heads.teacher.state_dict()
    return terms, as_lists(maps), as_lists(teacher.state())


@pytest.mark.parametrize("world, micro_batches", [(1, 3), (2, 3)])
def test_ranks_and_micro_batches_change_nothing_of_what_teachers_teach(world, micro_batches):
    terms, maps, state = taught()
    by_rank = [taught(micro_batches)] if world == 1 else ranks.run(world, taught, micro_batches)
    mean = torch.tensor([each for each, _, _ in by_rank]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(terms), rtol=2e-4, atol=1e-5)
    assert distance(by_rank[0][1], maps) < 1e-4
    assert distance(by_rank[0][2], state) < 1e-5 and len(state) == 2
    assert terms[0][2] > terms[-1][2] > 0  # the map learns


def test_a_map_of_another_width_and_one_that_no_term_reads_are_refused(settings):
    first = train(settings("train.duration=1", out="first"))
    teacher = (f"teacher.model=[{first}, {first}]", "train.duration=2")
    features = "objective={infonce: {}, distill: {form: features}}"
    wrong = r"teacher\.width is 4, .* are \[\d+, \d+\] wide; set it to"
    with pytest.raises(ValueError, match=wrong):
        train(settings(*teacher, features, "model.heads={teacher: {width: 4}}", out="narrow"))
    with pytest.raises(
        ValueError, match=r"gives \['projected_image', 'projected_text'\], which no"
    ):
        train(settings(*teacher, "model.heads={teacher: {width: 4}}", out="idle"))


def labelled(batch):
    return dataclasses.replace(batch, label=batch.sample_id + 2**40)


def keys():
    """The queue after one step and after STEPS, and the average's embeddings before each update."""
    objective = {"momentum_queue": {"positives": "label"}}
    training = make_training(objective=objective, double=False)
    options = config.Teacher(ema=DECAY, queue=QUEUE)
    model = training.engine.evaluation_model()
    training.teacher = Teacher(options, training.engine, model, training.objective.needs, {})
    first, seen = None, []
    for _ in range(STEPS):
        with torch.no_grad():
            every = make_batch()
            seen.append(training.teacher.average(every.image, every.text).text)
        train_step(training, labelled(make_batch(own_rows())))
        first = training.teacher.queue["queue_text"].clone() if first is None else first
    queue = training.teacher.queue
    label = labelled(make_batch()).label
    return [
        t.tolist()
        for t in (queue["queue_text"], first, torch.cat(seen), queue["queue_label"], label)
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_the_queue_holds_the_latest_keys_of_all_ranks(world):
    queue, first, seen, labels, label = (
        torch.tensor(v) for v in (keys() if world == 1 else ranks.run(2, keys)[1])
    )
    # Zeros: still empty.
    assert (first[:12] - seen[:12]).abs().max() < 1e-5 and not first[12:].any()
    # The last four of 36 keys stand where the first four stood.
    assert len(seen) == 36 and len(queue) == QUEUE
    expected = torch.cat([seen[QUEUE:], seen[4:QUEUE]])
    assert (queue - expected).abs().max() < 1e-5
    assert (
        queue - torch.cat([seen[:4], seen[4:QUEUE]])
    ).abs().max() > 1e-3  # the first keys would be other ones

    # A label stands where its key does.
    every = label.repeat(STEPS)
    assert torch.equal(labels, torch.cat([every[QUEUE:], every[4:QUEUE]]))


def test_keys_that_are_not_finite_do_not_enter_the_queue():
    training = make_training(objective=OBJECTIVE, double=False)
    options = config.Teacher(ema=DECAY, queue=QUEUE)
    teacher = Teacher(
        options, training.engine, training.engine.evaluation_model(), training.objective.needs, {}
    )
    width = teacher.queue["queue_text"].shape[1]
    rows = torch.nn.functional.normalize(torch.randn(3, width), dim=1)
    broken = rows.clone()
    broken[1, 0] = torch.nan
    teacher.follow({"ema_image": rows, "ema_text": broken}, 0, torch.tensor(True))

    # The other half of the pair stays out, too.
    expected = torch.stack([rows[0], torch.zeros(width), rows[2]])
    assert torch.equal(teacher.queue["queue_image"][:3], expected)
    assert torch.equal(teacher.queue["queue_text"][:3], expected)


def test_a_resume_continues_average_margins_and_sample_states_bit_for_bit(settings, scenes):
    """Also a negative control: without the saved average the losses differ."""
    options = (
        f"data.sources=[{{name: shards, path: {scenes / 'binding'}}}]",
        "train.batch=6",
        "teacher.ema=0.9",
        "log.every=1",
        "objective={infonce: {}, self_distillation: {negatives: true, weight: 5}, "
        "hard_negatives: [{form: rank}, {form: text}, {form: own}]}",
    )
    whole = train(settings(*options, out="whole"))
    for name in ("cut", "lost"):
        shutil.copytree(whole, whole.parent / name)
        shutil.rmtree(whole.parent / name / "checkpoints" / "step_00000009")
    again = train(settings(*options, "resume=auto", out="cut"))
    assert losses(again) == losses(whole)
    one, other = (checkpoint.load(checkpoint.newest(run)) for run in (whole, again))
    assert (
        all(one.teacher[k].equal(other.teacher[k]) for k in one.teacher) and len(one.teacher) > 20
    )
    assert all(one.objective[k].equal(other.objective[k]) for k in one.objective) and one.objective
    contents = checkpoint.load(checkpoint.newest(whole.parent / "lost"))
    contents.teacher = {}
    checkpoint.save(whole.parent / "lost", 6, contents, keep=2)
    lost = losses(train(settings(*options, "resume=auto", out="lost")))
    assert lost[6] == losses(whole)[6] and lost[7] != losses(whole)[7]


def test_a_frozen_teacher_is_distilled_and_one_of_another_size_refused(settings, tmp_path):
    first = train(settings("train.duration=3", out="first"))
    distill = ("objective={infonce: {}, distill: {}}", "train.duration=3")
    run = train(settings(*distill, f"teacher.model={first}", out="student"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["distill"] > 0 for line in lines if line["kind"] == "train")
    with pytest.raises(ValueError, match=r"reads \(16, 16\) pixels .*, but the model \(24, 24\)"):
        train(
            settings(
                *distill, f"teacher.model={first}", "model.image_tower.image_size=24", out="large"
            )
        )
    with pytest.raises(
        ValueError, match=r"'distill' needs 'teacher_image'.*teacher\.model.*vlp data embed"
    ):
        train(settings(*distill, out="none"))


def test_what_no_term_reads_is_refused_and_so_is_another_queue(settings):
    other = train(settings("train.duration=1", out="other"))
    for changes, message in (
        (("teacher.ema=0.9",), r"teacher\.ema is set, but no term reads"),
        ((f"teacher.model={other}",), r"teacher\.model is set, but no term reads"),
        (("teacher.model=nowhere",), "no model 'nowhere': no such file or folder"),
        (("data.views={n: 1}",), r"data\.views is set, but no term reads"),
        (
            ("data.views={n: 1}", "objective={mv_infonce: {}}"),
            r"add the head that they pass, model\.heads=\{views: \{\}\}",
        ),
        (
            (
                "data.views={n: 1}",
                "model.heads={views: {text: false, width: 8}}",
                "objective={slip: {}}",
            ),
            r"set data\.views\.n to 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(settings(*changes, out="refused"))
    queued = ("objective={momentum_queue: {}}", "teacher.ema=0.9", "train.duration=3")
    train(settings(*queued, "teacher.queue=64", out="queued"))
    with pytest.raises(ValueError, match="queue holds 64 pairs, not 96"):
        train(settings(*queued, "teacher.queue=96", "resume=auto", out="queued"))


def test_a_start_from_other_heads_keeps_the_towers(settings, capsys):
    views = (
        "data.views={n: 2}",
        "model.heads={views: {width: 8}}",
        "objective={multi_view: {}}",
        "train.duration=1",
    )
    bare = train(settings("train.duration=1", "log.every=1", out="bare"))
    with_heads = train(settings(*views, f"init_from={bare}", out="views"))
    assert "heads.views start at random" in capsys.readouterr().out
    train(settings("train.duration=1", f"init_from={with_heads}", out="back"))
    assert "heads.views are left out" in capsys.readouterr().out


@pytest.mark.slow
def test_stored_teachers_teach_as_running_ones_do(settings, scenes, tmp_path):
    """Two of different widths; and a run on their stored crops goes on where it stopped."""
    plain = ("data.augment={scale: [1, 1], ratio: [1, 1]}", "data.captions.choose=first")
    short = ("train.duration=3", "data.workers=0", "eval={}", *plain)
    first = train(settings("train.duration=1", out="first"))
    second = train(settings("train.duration=1", "model.embed_dim=24", out="second"))
    for name, model in (("one", first), ("two", second)):
        call(embed, scenes / "train", "--model", model, "--to", tmp_path / name)
        cut = ("--views", 2, "--augment", "{scale: [0.3, 1]}", "--lines", "each")
        call(embed, scenes / "train", "--model", model, *cut, "--to", tmp_path / f"{name} cut")

    objective = "objective={infonce: {}, distill: [{}, {form: features}, {form: interactive}]}"
    taught = (*short, objective, "model.heads={teacher: {width: [16, 24]}}")
    running = train(settings(*taught, f"teacher.model=[{first}, {second}]", out="running"))
    folders = f"[{tmp_path / 'one'}, {tmp_path / 'two'}]"
    stored = train(settings(*taught, f"data.sources.0.embeddings={folders}", out="stored"))
    assert losses(stored) == pytest.approx(losses(running), rel=2e-3)

    crops = f"data.sources.0.embeddings=[{tmp_path / 'one cut'}, {tmp_path / 'two cut'}]"
    reinforced = [option for option in taught if not option.startswith("data.augment")]
    reinforced += [crops, "data.augment={}", "checkpoint.every=1", "checkpoint.keep=5"]
    source = f"{{name: shards, path: {scenes / 'train'}, {crops.removeprefix('data.sources.0.')}}}"
    held_out = f"data: {{sources: [{source.replace('embeddings=', 'embeddings: ')}]}}"
    reinforced.append(f"validation={{{held_out}, every: 3, samples: 96}}")
    whole = train(settings(*reinforced, out="whole"))
    assert losses(whole) != pytest.approx(losses(stored), rel=1e-3)
    assert '"val.distill"' in (whole / "metrics.jsonl").read_text()
    resumed = settings(*reinforced, f"resume={whole}/checkpoints/step_00000001", out="resumed")
    assert losses(train(resumed)) == {step: losses(whole)[step] for step in (2, 3)}

    with pytest.raises(ValueError, match=r"precomputed reads.*found width 2 x 24, expected 16"):
        locked = ("model.image_tower.precomputed=true", "model.image_tower.locked=true")
        train(settings(*short, *locked, f"data.sources.0.embeddings={folders}", out="locked"))
