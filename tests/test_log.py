"""metrics.jsonl after a resume, trackers by name, the progress line."""

import json
from pathlib import Path

import pytest

from vlp import config, log
from vlp.reporter import Reporter


def test_metrics_of_a_resumed_run_read_like_an_uninterrupted_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = log.Metrics(path)
    for step in (1, 2, 3, 4):
        metrics.write(step, "train", {"loss": step / 2})
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    metrics = log.Metrics(path, resumed_step=2)
    metrics.write(3, "train", {"loss": 9.0})
    metrics.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.5, 1.0, 9.0]


@pytest.mark.parametrize(
    "line",
    [b"[1]", b"3", b"null", b'{"step": "1"}', b'{"step": [1]}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_damaged_line_of_metrics_does_not_end_a_resumed_run(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "kind": "train", "loss": 2.0}\n'
    path.write_bytes(whole + line + b"\n" + whole)
    log.Metrics(path, resumed_step=2).close()
    assert path.read_bytes() == whole + whole


def test_a_tracker_by_name_and_one_that_is_not_installed(tmp_path):
    trackers = log.Trackers(["tensorboard"], tmp_path / "run", {"seed": 1})
    trackers.write(1, {"loss": 2.0})
    trackers.close()
    events = list(tmp_path.rglob("events.out.tfevents.*"))
    assert events and all(
        path.relative_to(tmp_path).parts[:2] == ("run", "tensorboard") for path in events
    )
    assert not (tmp_path / "run" / "run").exists()
    with pytest.raises(
        ValueError, match="'trackio', whose package is not installed: pip install trackio"
    ):
        log.check_trackers(["tensorboard", "trackio"])


def test_progress_line_is_short_and_says_what_remains():
    line = log.progress(7, 100, {"loss": 1.23456, "samples_s": 900.123}, 3725)
    assert line == "step   7/100  loss 1.235  samples_s 900.1  eta 1:02:05"


def test_a_term_that_ignores_much_of_the_batch_is_warned_of_once(tmp_path, capsys):
    recipe = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
    settings = config.load(recipe, [f"out={tmp_path}"])
    reporter = Reporter(settings, config.Plan(batch=8, steps_per_epoch=4, total=4), 0)

    passed = {"loss": 1.0, "pictures": 8, "text_tokens": 80}
    few, many = passed | {"infonce.ignored": 0.1}, passed | {"infonce.ignored": 0.3}
    for step, scalars in enumerate((few, many, many), 1):
        reporter.training(step, scalars, {})
        warnings = capsys.readouterr().err.count("infonce.ignored: 30% of the pairs")
        assert warnings == int(step == 2)
    reporter.close()
