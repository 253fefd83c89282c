"""`vlp eval --blend`: the scores of the models between two."""

import json

import pytest

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


def test_a_wrong_sweep_is_answered_before_a_model_is_read(sweep, two, capsys):
    cases = {
        ("--gain", "zeroshod.acc1"): "no score of a task evaluated here",
        ("--alphas", "0,2"): "--alphas is '0,2'; expected numbers of 0 to 1",
        ("--ema",): "write RUN@ema",
        (str(two / "a"),): "found MODEL",
    }
    for options, message in cases.items():
        assert sweep(*options) == 1
        assert message in capsys.readouterr().err
    assert sweep("--alphas", "0", "--gain", "zeroshot.acc7") == 1
    assert "no score 'zeroshot.acc7'; the tasks give zeroshot.acc1" in capsys.readouterr().err
    stray = ["--task", "zeroshot", "--data", "nowhere", "--gain", "zeroshot.acc1"]
    assert main(["eval", str(two / "a"), *stray]) == 1
    assert "--gain belongs to --blend" in capsys.readouterr().err
