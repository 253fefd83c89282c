"""Suites: their files, sets in their published layouts, absent sets, averages."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.eval import material, suite_material
from tests.eval.suite_material import write_wds, write_winogavil
from vlp import watch
from vlp.cli import main
from vlp.eval import suites
from vlp.eval.pictures import DataError
from vlp.eval.suites import command, page, places, summary
from vlp.pretrained.hub import http_error

N_SETS = {
    "compositional": 10,
    "datacomp": 38,
    "faces": 4,
    "long": 5,
    "multilingual": 5,
    "retrieval": 3,
    "vtab+": 35,
}


# --- the files ------------------------------------------------------------------------------------


def test_every_suite_names_tasks_options_and_scores_that_exist():
    n_seen = {}
    for name in suites.names()[:-1]:
        suite = suites.read(name)
        for entry in suite.entries:
            for layout in entry.layouts:
                known = dict.fromkeys(layout.files, "y")
                task = entry.plugin({"data": "x", **known, **layout.options})
            assert task.label == entry.name and entry.at and entry.get, entry
            # What the data decide is known with them only.
            known = [] if hasattr(task.module, "scores") else watch.scores(task)
            for score in entry.scores:
                assert not known or any(fnmatchcase(score, one) for one in known), entry
        n_seen[name] = len(suite.entries)

    assert n_seen == N_SETS
    assert len(suites.read("all-local").entries) == 70


def test_datacomp_has_its_published_main_metrics():
    entries = suites.read("datacomp").sets
    by_class = [name for name, e in entries.items() if e.main == "mean_per_class_recall"]
    others = {name: e.main for name, e in entries.items() if e.main and name not in by_class}

    assert by_class == ["caltech101", "fgvc_aircraft", "flowers", "pets"]
    both = ["image_retrieval_recall@1", "text_retrieval_recall@1"]
    assert others == {
        "flickr30k": both,
        "mscoco_captions": both,
        "winogavil": "jaccard_10-12",
        "iwildcam": "f1_macro",
        "fmow": "worst_group_acc1",
        "dollar_street": "worst_group_acc5",
        "geode": "worst_group_acc1",
    }
    assert entries["pets"].at == ["wds_vtab-pets_test", "wds_vtab-pets"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sets: {a: {at: [a], tsk: knn}}\ntitle: A", "did you mean 'task'"),
        ("sets: {a: {at: [a]}}", "title"),
        ("sets: {a: {at: [a], task: zeroshoot}}\ntitle: A", "did you mean 'zeroshot'"),
        ("sets: {a: {at: [a], options: {spilt: x}}}\ntitle: A", "did you mean 'split'"),
        ("sets: {a: {at: [a], main: acc7}}\ntitle: A", "is 'acc7', and zeroshot gives acc1,"),
        (
            "sets: {a: {at: [a], task: few_shot, options: {shots: [1]}}}\ntitle: A",
            "is 'acc1_16_shots', and few_shot gives acc1_0_shots, acc1_1_shots",
        ),
    ],
)
def test_a_mistake_in_a_suite_is_named_before_a_model_is_read(tmp_path, capsys, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("")

    assert main(["eval", "no/model", "--suite", str(file), "--data", str(tmp_path)]) != 0
    assert message in capsys.readouterr().err


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path_factory) -> str:
    return f"local-dir:{material.tiny_open_clip(tmp_path_factory.mktemp('model'))}"


@pytest.fixture
def root(tmp_path) -> Path:
    """Some sets of several suites under one folder, its name with a space."""
    folder = tmp_path / "my sets"
    write_wds(folder / "wds_vtab-pets")
    write_wds(folder / "wds_cifar10_test")
    write_wds(folder / "wds_wilds-fmow_test", with_vector=True)
    captions = [(material.png(material.picture(i)), [f"p {i}", f"q {i}"]) for i in range(4)]
    material.clip_benchmark_set(folder / "wds_flickr30k", captions, kind="retrieval")
    write_winogavil(folder / "winogavil")
    (folder / "wds_mnist").mkdir()
    return folder


def test_absent_sets_are_refused_with_where_to_get_them(root, capsys):
    # The model does not exist: nothing is loaded before.
    status = main(["eval", "no/model", "--suite", "datacomp", "--data", str(root)])
    error = capsys.readouterr().err

    assert status != 0 and "33 of the 38 sets of datacomp are not under" in error
    assert "mnist: no wds_mnist_test or wds_mnist; get it from https://" in error
    assert "datasets/djghosh/wds_mnist_test" in error and "--missing skip" in error


def test_a_suite_goes_on_with_the_rest_and_its_average_says_so(root, tiny, tmp_path, capsys):
    out, html = tmp_path / "a.json", tmp_path / "a.html"
    arguments = ["--data", str(root), "--missing", "skip", "--cache", "none", "--quiet"]
    arguments += ["--out", str(out), "--html", str(html)]
    assert main(["eval", tiny, "--suite", "datacomp", *arguments]) == 0
    text = capsys.readouterr().out

    written = json.loads(out.read_text())
    told = written["suite"]
    rows = {row["set"]: row for row in told["main_scores"]}
    assert list(rows) == ["cifar10", "pets", "flickr30k", "winogavil", "fmow"]
    assert told["average_over"] == 5 and told["n_sets"] == 38 and len(told["absent"]) == 33
    assert told["average"] == pytest.approx(sum(row["value"] for row in rows.values()) / 5)
    assert f"average {told['average']:.4f} over 5 of 38 sets, NOT COMPARABLE" in text

    # Each set's main score is the one published, with interval and chance.
    by_label = {record["label"]: record["metrics"] for record in written["results"]}
    assert rows["pets"]["value"] == by_label["pets"]["mean_per_class_recall"]
    assert rows["fmow"]["value"] == by_label["fmow"]["worst_group_acc1"]
    recalls = [by_label["flickr30k"][f"{way}_retrieval_recall@1"] for way in ("image", "text")]
    assert rows["flickr30k"]["value"] == pytest.approx(sum(recalls) / 2)
    assert all(row["chance"] is not None and row["interval_95"] for row in rows.values())

    shown = html.read_text()
    assert "my sets" not in shown and tiny.removeprefix("local-dir:") not in shown
    assert "djghosh/wds_mnist_test" in shown and "NOT COMPARABLE" in shown and "fmow" in shown
    assert main(["eval", "--compare", str(out), str(out)]) == 0


def test_all_local_takes_what_lies_there(root, tiny, capsys):
    arguments = ["--data", str(root), "--cache", "none", "--quiet"]
    assert main(["eval", tiny, "--suite", "all-local", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()

    names = {"cifar10", "pets", "flickr30k", "winogavil", "fmow"}
    assert {line.split()[0] for line in lines[1:6]} == names
    assert not any("get it from" in line for line in lines)


def test_suites_run_whole_on_the_published_layouts(tiny, tmp_path, capsys):
    writers = {
        "compositional": suite_material.write_compositional,
        "datacomp": suite_material.write_datacomp,
        "faces": suite_material.write_faces,
        "long": suite_material.write_long,
        "multilingual": suite_material.write_multilingual,
        "retrieval": suite_material.write_retrieval,
        "vtab+": suite_material.write_vtab,
    }
    for name, write in writers.items():
        root, out = tmp_path / name, tmp_path / f"{name}.json"
        write(root)
        arguments = ["--data", str(root), "--cache", "none", "--quiet", "--out", str(out)]
        assert main(["eval", tiny, "--suite", name, *arguments]) == 0, capsys.readouterr().err

        told = json.loads(out.read_text())["suite"]
        assert told["average_over"] == told["n_sets"] == N_SETS[name]
        assert all(row["value"] is not None for row in told["main_scores"]), told
        assert "NOT COMPARABLE" not in capsys.readouterr().out
    assert writers.keys() == N_SETS.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "datacmp", "--data", "."], "did you mean 'datacomp'"),
        (["--suite", "datacomp"], "needs --data ROOT"),
        (["--suite", "datacomp", "--data", "/nowhere"], "is no folder"),
        (["--suite", "datacomp", "--data", ".", "split=val"], "expected folders or hf://USER"),
        (["--suite", "datacomp", "--data", ".", "--task", "knn"], "leave out --task"),
        (["--suite", "datacomp", "--data", "hf://a/b"], "names no user of the Hub"),
        (["--task", "knn", "--data", ".", "--missing", "skip"], "belongs to --suite"),
        (["--task", "knn", "--data", ".", "--html", "x.html"], "belongs to --suite"),
        (["--suite", "datacomp", "--data", ".", "--html", "."], "is a folder"),
        (["--suite", "long", "--data", "."], "none of the 5 sets"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "no/model", *arguments]) != 0
    assert message in capsys.readouterr().err


def test_a_score_that_a_result_lacks_leaves_the_average():
    entry = suites.Entry("geode", task="grouped", main="worst_group_acc1", at=["x"], get="y")
    task = entry.plugin({"data": "x"})
    record = {"label": "geode", "metrics": {"acc1": 1.0}, "chance": {}, "intervals_95": {}}
    located = places.Located([entry], [task], [])
    short = summary.summarise("Short", "", located, [record], {})

    assert short.average is None and "no average" in summary.table(short)
    assert "not scored" in summary.table(short)
    assert "not scored" in page.page(short, "m", [{**record, "counts": {"skipped": 0}}])
    assert command.Asked(suites.Suite("Short", {}), located).located.absent == []


def test_sets_are_found_on_the_hub_and_in_several_places(root, monkeypatch):
    import huggingface_hub

    asked = []

    def exists(self, repository: str, repo_type: str) -> bool:
        asked.append(repository)
        return repository == "djghosh/wds_mnist_test" and repo_type == "dataset"

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_exists", exists)
    entries = [
        suites.read("datacomp").sets[name] for name in ("pets", "mnist", "winogavil", "geode")
    ]
    located = places.locate(entries, [str(root), "hf://djghosh"])

    data = {task.label: task.options.data for task in located.tasks}
    assert data["mnist"] == "hf:djghosh/wds_mnist_test"
    assert data["pets"] == str(root / "wds_vtab-pets")
    assert [entry.name for entry in located.absent] == ["geode"]
    assert "djghosh/winogavil" not in asked

    def fails(self, repository: str, repo_type: str) -> bool:
        raise http_error()("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_exists", fails)
    with pytest.raises(DataError, match="does not say whether djghosh/wds_geode_test"):
        places.locate(entries[3:], ["hf://djghosh"])


def test_prompts_of_a_suite_come_from_files(root, tiny, tmp_path, capsys):
    folder = tmp_path / "cupl"
    folder.mkdir()
    sentences = {
        "Cat": ["A cat purrs.", "It is a {}."],
        "dog": ["A dog barks."],
        "hot_dog": ["Mustard."],
    }
    (folder / "pets.json").write_text(json.dumps(sentences))
    (folder / "cifar10.txt").write_text("the {c}\n")
    arguments = ["eval", tiny, "--suite", "datacomp", "--data", str(root), "--missing", "skip"]
    arguments += ["--cache", "none", "--quiet"]

    out = tmp_path / "a.json"
    assert main([*arguments, "--prompts", str(folder), "--out", str(out)]) == 0
    by_label = {r["label"]: r for r in json.loads(out.read_text())["results"]}
    assert by_label["pets"]["protocol"]["options"]["templates"] == sentences
    assert by_label["cifar10"]["protocol"]["options"]["templates"] == ["the {}"]
    assert by_label["fmow"]["protocol"]["options"]["templates"] is None
    capsys.readouterr()

    # What is wrong with them is told before the model is read.
    arguments[1] = "no/model"
    several = tmp_path / "several.json"
    for content, message in (
        ({"petz": sentences}, "did you mean 'pets'"),
        ({"pets": {"cat": "A cat."}}, "expected a list of sentences"),
        ({"pets": {"cat": ["A cat."]}}, "2 of 3 classes have no prompts, e.g. 'dog'"),
        ({"pets": ["no place"]}, "exactly one {}"),
        ({"cat": "A cat."}, "expected {set: templates}"),
    ):
        several.write_text(json.dumps(content))
        assert main([*arguments, "--prompts", str(several)]) != 0
        assert message in capsys.readouterr().err
    assert main([*arguments, "--prompts", str(tmp_path / "none")]) != 0
    assert "no prompts at" in capsys.readouterr().err


def test_authors_archives_stand_in_for_shards(tmp_path):
    images = tmp_path / "coco" / "val2014"
    images.mkdir(parents=True)
    material.picture(1).save(images / "a.png")
    sentences = [{"raw": "p 1"}]
    table = {"images": [{"filename": "a.png", "split": "test", "sentences": sentences}]}
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps(table))

    entry = suites.read("retrieval").sets["mscoco_captions"]
    (task,) = places.locate([entry], [str(tmp_path)]).tasks
    assert task.options.images == str(images)
    assert [r.captions for r in task.module.read(task.options).records] == [("p 1",)]
