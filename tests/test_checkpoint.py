"""Checkpoints: what is kept, what is refused, and which one a run goes on from."""

import json
import os
from dataclasses import replace

import pytest
import torch

from tests.models.tiny import tiny
from tests.test_train import losses
from vlp import checkpoint, retention
from vlp.pretrained import runs
from vlp.train import train


def contents(value=1.0):
    weights = {"w": torch.full((4, 4), value), "n": torch.arange(3)}
    return checkpoint.Contents(
        weights,
        {"exp_avg.w": torch.ones(4, 4)},
        state={"step": 1},
        config="x: 1",
        description={"a": 1},
    )


def steps(run):
    return [int(path.name[5:]) for path in checkpoint.all_of(run)]


def damage(run, step, name="model.safetensors"):
    path = run / "checkpoints" / f"step_{step:08d}" / name
    path.write_bytes(path.read_bytes()[:-5])


def test_pruning_never_removes_the_last_good_one(tmp_path):
    """With keep 1 and 2, a damaged newest, a damaged middle one, and a save below the newest."""
    n_cases = 0
    for keep, damaged, later, expected in (
        (1, [30], 40, [40]),
        (1, [10, 20, 30], 40, [40]),
        (2, [30], 40, [20, 40]),
        (2, [20, 30], 40, [10, 40]),
        (2, [], 40, [30, 40]),
        (3, [20], 40, [10, 30, 40]),
        (1, [30], 25, [25]),
        (2, [30], 25, [20, 25]),
    ):
        run = tmp_path / str(n_cases)
        for step in (10, 20, 30):
            checkpoint.save(run, step, contents(step), keep=9)
        for step in damaged:
            damage(run, step)
        checkpoint.save(run, later, contents(later), keep)
        assert steps(run) == expected
        assert checkpoint.newest(run).name == f"step_{later:08d}"
        n_cases += 1
    assert n_cases == 8


def test_which_checkpoints_stay_does_not_depend_on_clocks(tmp_path):
    """Those of machines whose clocks are a year ahead or behind: steps count."""
    n_cases = 0
    for number, times in enumerate(((4e9, 2e9, 1e9), (0, 4e9, 1), (4e9, 4e9, 4e9))):
        run = tmp_path / str(number)
        for step, time_s in zip((10, 20, 30), times, strict=True):
            folder = checkpoint.save(run, step, contents(step), keep=9)
            for path in (*folder.iterdir(), folder):
                os.utime(path, (time_s, time_s))
        assert checkpoint.newest(run).name == "step_00000030"
        checkpoint.save(run, 40, contents(40), keep=2)
        assert steps(run) == [30, 40]
        assert [path.name for path in retention.abandon(run, 30)] == ["step_00000040.abandoned"]
        n_cases += 1
    assert n_cases == 3


def test_every_flipped_bit_of_the_manifest_falls_back(tmp_path, capsys):
    """All bits of the names, keys and values: the checkpoint before it, never an exception."""
    checkpoint.save(tmp_path, 1, contents(), keep=2)
    newest = checkpoint.save(tmp_path, 2, contents(), keep=2)
    path = newest / "manifest.json"
    good = path.read_bytes()
    n_accepted, n_cases = 0, 0
    for position in range(len(good)):
        for bit in range(0, 8, 3):
            path.write_bytes(
                good[:position] + bytes([good[position] ^ (1 << bit)]) + good[position + 1 :]
            )
            found = checkpoint.newest(tmp_path)
            if found == newest:
                n_accepted += 1
                # White space, or an equal escape.
                assert json.loads(path.read_bytes()) == json.loads(good)
            else:
                assert found.name == "step_00000001"
            n_cases += 1
    assert n_cases > 1500 and n_accepted < n_cases / 3
    assert "trying the checkpoint before it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "null", '{"model.safetensors": 3}', "[" * 100_000, '{"../x": {"bytes": 0}}'],
)
def test_a_manifest_of_another_form_falls_back(tmp_path, text):
    checkpoint.save(tmp_path, 1, contents(), keep=2)
    newest = checkpoint.save(tmp_path, 2, contents(), keep=2)
    (newest / "manifest.json").write_text(text)
    assert checkpoint.newest(tmp_path).name == "step_00000001"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_written_nor_chosen(tmp_path, value, monkeypatch):
    first = checkpoint.save(tmp_path, 1, contents(), keep=2)
    with pytest.raises(
        checkpoint.CheckpointError, match="step 2 is not saved: NaN or infinity in w"
    ):
        checkpoint.save(tmp_path, 2, contents(value), keep=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [first.name]
    # As an older version would have written it.
    monkeypatch.setattr(checkpoint, "not_finite", lambda tensors: [])
    checkpoint.save(tmp_path, 2, contents(value), keep=2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path) == first


def test_going_back_leaves_the_other_branch(settings, capsys, monkeypatch):
    """Saves at 3, 6, 9; back to 3 with another rate, stopped at 6: `auto` goes on from there, not
    from 9. Files are hashed once, by the first rank: others would read everything once more.
    """
    hashed = []
    real = runs.sha256
    monkeypatch.setattr(runs, "sha256", lambda path: hashed.append(path) or real(path))

    run = train(settings("checkpoint.keep=5"))
    one_branch = losses(run)
    (run / "results.json").write_text("[]")  # of step 9
    slower = ("checkpoint.keep=5", "train.optimizer.lr=1e-4")
    train(settings(f"resume={run / 'checkpoints/step_00000003'}", "train.duration=6", *slower))
    assert steps(run) == [3, 6] and not (run / "results.json").exists()
    assert "step_00000009.abandoned is of the branch that is left" in capsys.readouterr().out
    assert (run / "checkpoints/step_00000009.abandoned").exists()

    hashed.clear()
    train(settings("resume=auto", *slower))
    of_source = [path.name for path in hashed if path.parent.name == "step_00000006"]
    assert len(of_source) == len(set(of_source)) >= 7

    other_branch = losses(run)
    assert steps(run) == [3, 6, 9] and list(other_branch) == list(range(1, 10))
    assert [step for step in other_branch if other_branch[step] == one_branch[step]] == [1, 2, 3, 4]
    assert not list((run / "checkpoints").glob("*.abandoned"))  # the run has passed them


def test_a_checkpoint_does_not_overwrite_another_run(settings):
    one, other = (
        train(settings("train.duration=3", out="one")),
        train(settings("train.duration=3", "seed=5", out="other")),
    )
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(
        FileExistsError, match=r"other holds another run than .*one.*new folder with out="
    ):
        train(settings(f"resume={one}", "train.duration=6", out="other"))
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    # A new folder is a new branch.
    train(settings(f"resume={one}", "train.duration=6", out="third"))
    assert steps(one) == [3] and steps(one.parent / "third") == [6]


def test_weights_for_other_pixels_are_refused_by_what_differs():
    model, other = tiny(), tiny()
    checkpoint.check_alike(other, model, "the other")
    other.image_spec = replace(
        other.image_spec, size=(16, 16), mean=(0.5, 0.5, 0.5), resize="squash"
    )
    with pytest.raises(ValueError) as caught:
        checkpoint.check_alike(other, model, "the other")
    text = str(caught.value)
    assert "mean (0.5, 0.5, 0.5), not (0.48145466, 0.4578275, 0.40821073); " in text
    assert "0.40821073); resize squash, not shortest." in text
    assert (
        "std" not in text
        and "size" not in text.replace("resize", "")
        and "model.pretrained" in text
    )


def test_a_checkpoint_that_another_rank_verified_must_look_the_same_here(tmp_path):
    path = checkpoint.save(tmp_path, 1, contents(), keep=1)
    assert checkpoint.load(path, verified=True).state == {"step": 1}
    damage(tmp_path, 1)
    with pytest.raises(checkpoint.CheckpointError, match="not what the first rank saw"):
        checkpoint.load(path, verified=True)


@pytest.mark.parametrize("keep", [1, 2, 4, 5])
def test_as_many_checkpoints_stay_as_are_asked_for(tmp_path, keep):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, contents(step), keep)
        names = sorted(path.name for path in checkpoint.all_of(tmp_path))
        assert names == [f"step_{kept:08d}" for kept in range(max(1, step - keep + 1), step + 1)]
