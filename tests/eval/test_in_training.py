"""Evaluation inside training: whatever is wrong with its data or tasks is said and counted, and
training goes on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from tests import ranks
from tests.eval import material
from vlp import cli, plugin
from vlp.eval import embed, evaluation, models
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError
from vlp.eval.report import records

CLASSES = ["cat", "dog"]


@pytest.fixture()
def photos(tmp_path):
    for i in range(12):
        path = tmp_path / "photos" / CLASSES[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(material.png(material.picture(i)))
    return tmp_path / "photos"


def tasks(**options):
    return plugin.keyed("vlp.eval.tasks", {"zeroshot": options})


def records_of_rank(photos: str, alone: bool) -> list:
    """On a rank: a task with a broken picture, one that raises, one whose data are on the first
    rank only, a good one."""
    from vlp import dist

    elsewhere = photos if dist.is_main() and not alone else f"{photos}/nowhere"
    every = [
        *tasks(data=photos),
        *plugin.keyed("tests.eval.failing", {"explode": {}}),
        *tasks(data=elsewhere),
        *tasks(data=photos, missing="skip"),
    ]
    # Outcomes do not pass the pipe of a rank that has ended.
    done = evaluation.attempt(material.matrix_encoder(), every)
    assert all(("items" in record) != ("error" in record) for record in done)
    return [{key: part for key, part in record.items() if key != "items"} for record in done]


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_training_outlives_every_failure_of_an_evaluation(photos, n_ranks, capsys):
    (photos / "dog" / "3.png").write_bytes(b"")
    (photos / "cat" / "4.png").write_bytes(b"\x89PNG no more")
    if n_ranks == 1:
        results = [records_of_rank(str(photos), True)]
    else:
        results = ranks.run(n_ranks, records_of_rank, str(photos), False)
    for first, exploded, absent, last in results:
        assert first["counts"] == {
            "images": 12,
            "classes": 2,
            "templates": 1,
            "skipped": 0,
            "unreadable": 2,
        }
        assert 0 <= first["metrics"]["acc1"] <= 1
        assert first["metrics"] == last["metrics"]
        assert (
            exploded["metrics"] == {"failed": 1.0}
            and "ZeroDivisionError: no sample is left" in exploded["error"]
        )
        assert absent["metrics"] == {"failed": 1.0} and "no evaluation data at" in absent["error"]
    if n_ranks == 2:
        return  # what other processes print goes where the fork server began
    said = capsys.readouterr().err
    assert said.count("2 images cannot be read and count as plain gray") == 2
    assert (
        said.count("the evaluation 'explode' failed and is left out at this step; training goes on")
        == 1
    )


def test_unreadable_pictures_are_refused_before_anything_long_starts(photos, tmp_path, capsys):
    (photos / "dog" / "3.png").write_bytes(b"")
    (photos / "cat" / "4.png").write_bytes(b"\x89PNG no more")
    message = (
        r"2 of 12 images cannot be read:\n  image .*cat/4\.png does not open(.|\n)*"
        r"dog/3\.png is empty(.|\n)*missing: skip"
    )
    with pytest.raises(DataError, match=message):
        evaluation.read_all(tasks(data=str(photos)))
    assert len(evaluation.read_all(tasks(data=str(photos), missing="skip"))) == 1
    shutil.rmtree(photos / "cat")
    command = [
        "eval",
        "ViT-B-32-quickgelu:openai",
        "--task",
        "zeroshot",
        "--data",
        str(photos),
        "--cache",
        "none",
    ]
    assert cli.main(command) == 1
    assert "dog/3.png is empty" in capsys.readouterr().err


def test_skipped_pictures_count_as_gray_and_are_counted_in_every_call(photos, tmp_path):
    (photos / "dog" / "3.png").write_bytes(b"\x89PNG no more")
    chosen = tasks(data=str(photos), missing="skip")
    context = Context(cache=tmp_path / "cache", contents=Contents())
    for _ in range(2):
        encoder = replace(material.matrix_encoder(), fingerprint="one")
        results, _ = evaluation.evaluate(encoder, chosen, context)
        assert results[0]["counts"]["unreadable"] == 1
        assert "NOT COMPARABLE, 1 images count as plain gray" in records.table(results)
    with pytest.raises(DataError, match=r"dog/3\.png does not open"):
        evaluation.evaluate(material.matrix_encoder(), tasks(data=str(photos)), context)


def test_empty_pictures_are_found_however_many_there_are(tmp_path):
    """A picture is decoded of every so many; an empty one is found wherever it stands."""
    for i in range(300):
        picture = material.png(material.picture(i))
        (tmp_path / f"{i}.png").write_bytes(picture if i != 257 else b"")
        (tmp_path / f"{i}.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"1 of 300 images cannot be read:\n  image .*257\.png is empty"
    ):
        evaluation.read_all(plugin.keyed("vlp.eval.tasks", {"retrieval": {"data": str(tmp_path)}}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_towers_compute_in_the_precision_of_the_run(dtype, photos):
    model = material.our_model()
    linear = model.text.transformer.resblocks[0].mlp.c_fc
    computed = set()
    linear.register_forward_hook(lambda _, args, output: computed.add(output.dtype))

    (record,) = evaluation.in_training(model, tasks(data=str(photos)), dtype)
    assert computed == {dtype} and 0 <= record["metrics"]["acc1"] <= 1
    assert evaluation.in_training(model, tasks(data=str(photos)))  # float32 where nothing is said
    assert computed == {dtype, torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_loop_names_its_precision(precision, scenes, tmp_path):
    from vlp import config
    from vlp.train import train

    settings = {
        **material.OUR_CONFIG,
        "out": str(tmp_path / "run"),
        "train": {"duration": 1, "batch": 8, "precision": precision, "device": "cpu"},
        "data": {"sources": [{"name": "shards", "path": str(scenes / "train")}], "workers": 0},
        "eval": {"zeroshot": {"data": str(scenes / "zeroshot")}},
    }
    named = []

    def evaluate(model, tasks, dtype):
        named.append(dtype)
        return []

    train(config.parse(settings), evaluate)
    assert named == [torch.bfloat16 if precision == "bf16" else torch.float32]


def test_texts_pass_the_tower_cut_and_score_the_same():
    model = material.our_model()
    words = ["a red circle", "two blue squares and a dog " * 3]
    captions = [f"{words[i % 7 == 0]} {i}" for i in range(70)]
    shapes = []
    model.text.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))

    rows = []
    for model.cut_captions in (True, False):
        rows.append(embed.texts(models.from_model(model), captions, Context()))
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-5)
    length = model.text_spec.context_length
    assert shapes[-2:] == [(64, length), (6, length)]
    assert sum(n * n_tokens for n, n_tokens in shapes[:-2]) < 0.8 * len(captions) * length


def test_more_at_once_on_a_gpu():
    assert embed.usual_batch("cuda:1") == 256 and embed.usual_batch("cpu") == 64


def test_a_run_whose_evaluation_fails_ends_with_its_weights(photos, scenes, tmp_path):
    """The loop itself: a picture damaged after the start, and a task that fails at the end."""
    from vlp import checkpoint, config
    from vlp.train import train

    settings = {
        **material.OUR_CONFIG,
        "out": str(tmp_path / "run"),
        "train": {"duration": 2, "batch": 8},
    }
    settings["data"] = {
        "sources": [{"name": "shards", "path": str(scenes / "train")}],
        "workers": 0,
    }
    settings["eval"] = {"zeroshot": {"data": str(photos), "every": 1}}
    parsed = config.parse(settings)
    evaluation.read_all(parsed.eval)
    (photos / "dog" / "3.png").write_bytes(b"")
    parsed.eval.extend(plugin.keyed("tests.eval.failing", {"explode": {}}))
    train(parsed, evaluation.in_training)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    evaluated = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluated] == [1, 2]
    assert (
        all(0 <= line["zeroshot.acc1"] <= 1 for line in evaluated)
        and evaluated[1]["explode.failed"] == 1
    )
    (record,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (record["label"], record["counts"]["unreadable"]) == ("zeroshot", 1)
    assert checkpoint.all_of(tmp_path / "run")
