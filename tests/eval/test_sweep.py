"""`vlp eval --blend`: the scores of the models between two."""

import json

import pytest

from tests.eval.suite_material import write_wds
from tests.test_averaging import two
from vlp.cli import main

__all__ = ["two"]  # a fixture of the weights' tests


@pytest.fixture
def sweep(two, scenes, tmp_path):
    """`vlp eval --blend` over two tasks, with a cache."""
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"zeroshot: {{data: {scenes / 'zeroshot'}}}\nretrieval: {{data: {scenes / 'retrieval'}}}\n"
    )

    def run(*options):
        blend = ["--blend", str(two / "a"), str(two / "b"), "--suite", str(suite)]
        cache = ["--cache", str(tmp_path / "cache"), "--quiet", "--device", "cpu"]
        return main(["eval", *blend, *cache, *options])

    return run


def test_a_sweep_shows_gain_against_guard_for_every_alpha(sweep, two, tmp_path, capsys):
    out = tmp_path / "sweep.json"
    assert sweep("--alphas", "0,.5,1", "--out", str(out)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["alpha", "gain:", "zeroshot.acc1"]
    assert [line.split()[0] for line in printed[1:4]] == ["0", "0.5", "1"]
    result = json.loads(out.read_text())
    assert result["gain"] == "zeroshot.acc1" and result["guard"].startswith("retrieval.")

    # Every row is that of its own weights, also with the embeddings kept from the first time.
    again = tmp_path / "again.json"
    assert sweep("--alphas", "1,.5,0", "--out", str(again)) == 0
    assert json.loads(again.read_text()) == result
    hashes = [row["records"][0]["model_sha256"] for row in result["rows"]]
    assert len(set(hashes)) == 3
    for row, name in ((result["rows"][0], "a"), (result["rows"][2], "b")):
        alone = tmp_path / f"{name}.json"
        single = ["eval", str(two / name), "--suite", str(tmp_path / "suite.yaml")]
        options = ["--cache", "none", "--quiet", "--device", "cpu", "--out", str(alone)]
        assert main([*single, *options]) == 0
        records = json.loads(alone.read_text())["results"]
        assert [r["metrics"] for r in records] == [r["metrics"] for r in row["records"]]


def test_a_sweep_over_a_suite_shows_its_average(two, tmp_path, capsys):
    for name in ("pets", "cifar10"):
        write_wds(tmp_path / "sets" / f"wds_{name}")
    file, out = tmp_path / "suite.yaml", tmp_path / "sweep.json"
    file.write_text(
        "title: Mine\nat: ['wds_{name}']\nget: 'https://x.org/{name}'\n"
        "main: mean_per_class_recall\n"
        "sets: {pets: {}, cifar10: {main: acc1}, mnist: {}}\n"
    )
    models = ["--blend", str(two / "a"), str(two / "b"), "--alphas", "0,1", "--device", "cpu"]
    data = ["--suite", str(file), "--data", str(tmp_path / "sets"), "--quiet", "--cache", "none"]
    assert main(["eval", *models, *data]) == 1
    assert "1 of the 3 sets" in capsys.readouterr().err
    arguments = [*models, *data, "--missing", "skip", "--guard", "pets.acc1", "--out", str(out)]
    assert main(["eval", *arguments]) == 0
    printed = capsys.readouterr().out

    result = json.loads(out.read_text())
    assert (result["gain"], result["guard"]) == ("average", "pets.acc1")
    for row in result["rows"]:
        pets, cifar = (record["metrics"] for record in row["records"])
        expected = (pets["mean_per_class_recall"] + cifar["acc1"]) / 2
        assert row["gain"] == row["suite"]["average"] == pytest.approx(expected)
        assert row["suite"]["average_over"] == 2 and row["suite"]["n_sets"] == 3
    assert len(result["rows"]) == 2 and "gain: average" in printed
    assert "Mine: average over 2 of 3 sets, NOT COMPARABLE" in printed
    assert "mnist: no wds_mnist; get it from https://x.org/mnist" in printed


def test_a_wrong_sweep_is_answered_before_a_model_is_read(sweep, two, capsys, monkeypatch):
    monkeypatch.setattr("vlp.averaging.loaded", lambda references: pytest.fail("models are read"))
    cases = {
        ("--gain", "zeroshod.acc1"): "no score of a task evaluated here",
        ("--gain", "average"): "no score of a task evaluated here",
        ("--gain", "zeroshot.acc7"): "no score 'zeroshot.acc7'; the tasks give zeroshot.acc1",
        ("--guard", "retrieval."): "no score 'retrieval.'; the tasks give retrieval.image_",
        ("--alphas", "0,2"): "--alphas is '0,2'; expected numbers of 0 to 1",
        ("--ema",): "write RUN@ema",
        (str(two / "a"),): "found MODEL",
    }
    for options, message in cases.items():
        assert sweep(*options) == 1
        assert message in capsys.readouterr().err
    stray = ["--task", "zeroshot", "--data", "nowhere", "--gain", "zeroshot.acc1"]
    assert main(["eval", str(two / "a"), *stray]) == 1
    assert "--gain belongs to --blend" in capsys.readouterr().err
