"""A checkpoint in one piece, called as its owner likes, in the commands that take a run."""

import pytest

from tests.models.tiny import tiny
from vlp import checkpoint
from vlp.cli import main


@pytest.fixture
def whole(tmp_path):
    """A run's checkpoint of step 30 in a folder of another name."""
    model = tiny()
    contents = checkpoint.Contents(
        model.state_dict(),
        {},
        state={"step": 30},
        config="out: run",
        description=model.description(),
    )
    checkpoint.save(tmp_path / "run", 30, contents, keep=1)
    to = tmp_path / "in one piece"
    assert main(["export", str(tmp_path / "run"), "--form", "checkpoint", "--to", str(to)]) == 0
    return to


def test_its_model_is_exported(whole, tmp_path):
    assert main(["export", str(whole), "--to", str(tmp_path / "model")]) == 0
    card = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    assert "trained with vlp, 30 steps:" in card


def test_it_is_not_published(whole, capsys):
    assert main(["push", str(whole), "someone/tiny"]) == 1
    assert "is a checkpoint, what a run goes on from; publish its model" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["checkpoint", "adapters"])
def test_a_taken_place_is_refused_before_a_run_is_read(form, tmp_path, capsys):
    """The run itself is absent: whoever looks for it first fails otherwise."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("precious")
    command = ["export", str(tmp_path / "absent"), "--form", form, "--to", str(tmp_path / "full")]
    assert main(command) == 1
    assert "is a folder that is not empty" in capsys.readouterr().err
