"""`vlp train --dry-run`: what a run would take, with nothing written."""

import re
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from torch import nn

from tests import ranks
from vlp import config
from vlp.cli import main
from vlp.dry_run import KeptForBackward, dry_run
from vlp.train import train


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_says_what_the_run_takes_and_writes_nothing(settings, tmp_path, capsys):
    settings("data.workers=0")
    path = tmp_path / "run.yaml"
    before = files_of(tmp_path)
    assert main(["train", str(path), "data.workers=0", "--dry-run"]) == 0
    assert files_of(tmp_path) == before

    printed = capsys.readouterr().out
    for line in (
        r"image +\[48, 3, 16, 16\] uint8",
        r"text +\[48, 24\] int64",
        r"embeddings +\[48, 16\]",
        r"scores +\[48, 48\]: 48 candidates",
        r"image tower +[\d,]+ trained, 0 locked",
        r"moments +0\.0\d+ \(from their sizes\)",
        r"activations +0\.\d+ \(measured: kept for backward, 24 rows at once\)",
        r"s a step, .* with real rows\); 9 steps, 432 samples, 2.25 epochs",
        r"disk: a checkpoint takes 0.0\d+ GB, at most 3 stand at once",
        r"nothing was written",
    ):
        assert re.search(line, printed), line


def test_a_run_that_goes_on_is_measured_and_stays_as_it_is(settings, tmp_path, capsys):
    quick = ("data.workers=0", "train.duration=3")
    train(settings(*quick))
    before = files_of(tmp_path / "run")
    dry_run(settings("data.workers=0", "resume=auto"))
    assert files_of(tmp_path / "run") == before
    assert "6 steps, 288 samples, 1.50 epochs" in capsys.readouterr().out

    # As in training.
    with pytest.raises(FileExistsError, match="already holds a run"):
        dry_run(settings(*quick))
    with pytest.raises(ValueError, match=r"needs 'bias'"):
        dry_run(settings("objective={siglip: {}}", out="other"))
    assert not (tmp_path / "other").exists()


def on_rank(path, overrides):
    # Theirs is not the stream that this process captures.
    with redirect_stdout(StringIO()) as printed:
        dry_run(config.load(path, overrides))
    return printed.getvalue()


def test_two_ranks_measure_their_shares(settings, tmp_path):
    settings()
    overrides = ["data.workers=0", "train.micro_batches=1", "train.device=cpu"]
    printed, of_second = ranks.run(2, on_rank, tmp_path / "run.yaml", overrides)
    assert of_second == ""  # the first rank speaks for both
    assert re.search(r"image +\[24, 3, 16, 16\]", printed)
    assert "scores           [24, 48]: 48 candidates a row" in printed


def test_what_is_kept_for_backward_counts_once_and_while_it_is_kept():
    model = nn.Linear(10, 10)
    x = torch.randn(100, 10, requires_grad=True)
    meter = KeptForBackward(model)
    with meter:
        for _ in range(3):
            y = model(x)  # keeps x, and the weights, which are no activations
            (y * y.view(100, 10)).sum().backward()  # keeps y, twice
            del y
    assert meter.peak_bytes == 2 * 100 * 10 * 4
    assert meter._bytes == 0
