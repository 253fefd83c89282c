"""What goes wrong while a checkpoint is saved: said on all ranks, and nothing half stays behind."""

import resource
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests import ranks
from tests.engines.test_engines import save
from tests.test_step import make_training
from vlp import checkpoint, dist, saving
from vlp.saving import Saver
from vlp.train import train


def fail_on_one(run, place):
    """Save twice, the second time with an error on rank 1; what each rank raises."""
    training = make_training(1, double=False)
    save(training, run)
    training.step = 1
    if dist.rank() == 1 and place == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    elif dist.rank() == 1:
        owner = saving.Staging if place == "settle" else saving
        real = getattr(owner, place)

        def failing(*args):
            real(*args)
            raise OSError(28, "No space left on device", str(run))

        setattr(owner, place, failing)
    try:
        save(training, run)
    except OSError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("place", ["disk", "settle", "_save_tensors", "_manifest_of_own"])
def test_an_error_of_one_rank_is_raised_on_all_and_leaves_nothing(place, tmp_path):
    expected = "File too large" if place == "disk" else "No space left"
    for said in ranks.run(2, fail_on_one, tmp_path, place):
        assert expected in said and str(tmp_path) in said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000000"]
    assert checkpoint.newest(tmp_path) is not None


class HoldsLock(Exception):
    """Cannot be packed."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class TakesTwo(Exception):
    """Is packed, and cannot be unpacked: it would be made of its one argument."""

    def __init__(self, text, number):
        super().__init__(f"{text} {number}")


def fail_oddly():
    """What each rank raises for errors of the second one that do not travel."""
    errors = [HoldsLock("disk gone"), TakesTwo("quota", 3)]
    raised = []
    for error in errors:

        def doing(error=error):
            if dist.rank() == 1:
                raise error

        try:
            saving.agree(dist.world(), doing)
        except RuntimeError as arrived:
            raised.append(str(arrived))
    return raised, saving.agree(dist.world(), dist.rank)


def test_an_error_that_cannot_travel_arrives_in_words():
    for raised, ranks_after in ranks.run(2, fail_oddly):
        assert raised == ["HoldsLock: disk gone", "TakesTwo: quota 3"]
        assert ranks_after == [0, 1]


class Panic(BaseException):
    """As safetensors' own: no Exception, and not to be packed."""

    def __reduce__(self):
        raise TypeError("cannot pickle Panic")


def interrupt_one(run, endings):
    """Saves whose writing thread is ended on one rank at one place after another, then a whole one:
    what each rank raises.
    """
    training = make_training(1, double=False)
    raised = []
    for rank, owner_name, place, ending in endings:
        owner = getattr(saving, owner_name)
        real = getattr(owner, place)

        def ended(*args, real=real, ending=ending):
            real(*args)
            raise ending[0](ending[1])

        if dist.rank() == rank:
            setattr(owner, place, ended)
        try:
            save(training, run)
        # What ends pytest or a rank, too.
        except BaseException as error:
            raised.append((type(error), str(error)))
        setattr(owner, place, real)
        if dist.is_main():  # which makes the folder and removes it
            assert not list((run / "checkpoints").glob("*"))
    save(training, run)
    return raised


def test_what_is_no_error_of_one_rank_ends_the_save_of_all(tmp_path):
    endings = [
        (1, "Staging", "settle", (SystemExit, "enough")),
        (1, "HuggingFaceStorageWriter", "write_data", (KeyboardInterrupt, "now")),
        (0, "HuggingFaceStorageWriter", "write_data", (Panic, "index out of bounds")),
        (0, "checkpoint", "described", (Panic, "too long")),
        (1, "checkpoint", "described", (KeyboardInterrupt, "again")),
    ]
    of_ranks = ranks.run(2, interrupt_one, tmp_path, endings, timeout_s=30)
    for number, (rank, _, _, (kind, text)) in enumerate(endings):
        assert of_ranks[rank][number] == (kind, text)
        assert of_ranks[1 - rank][number] == (RuntimeError, f"{kind.__name__}: {text}")
    assert [len(raised) for raised in of_ranks] == [len(endings)] * 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000000"]


def spoil_and_save(run):
    training = make_training(1, engine="fsdp2", double=False)
    if dist.rank() == 1:
        matrices = [value for value in training.engine.module.parameters() if value.ndim == 2]
        matrices[0].to_local().data.fill_(torch.nan)
    try:
        save(training, run)
    except checkpoint.CheckpointError as error:
        return str(error)


def test_a_shard_that_is_not_finite_is_refused_on_all_ranks(tmp_path):
    for said in ranks.run(2, spoil_and_save, tmp_path):
        assert "step 0 is not saved: NaN or infinity in" in said
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_last_save_is_said_beside_another(tmp_path, capsys):
    (tmp_path / "checkpoints").write_text("no folder")
    saver = Saver(tmp_path, keep=1)
    with pytest.raises(ZeroDivisionError), closing(saver):
        saver.write(3, checkpoint.Contents(model={}, optimizer={}), 0.0)
        raise ZeroDivisionError
    assert "warning: the checkpoint of step 3 could not be written: " in capsys.readouterr().err


def test_a_run_that_ends_by_a_failed_save_has_saved_the_steps_since(settings, monkeypatch, capsys):
    real = checkpoint.save

    def failing_once(run, step, *args):
        if step == 1:
            raise OSError(28, "No space left on device", str(run))
        return real(run, step, *args)

    monkeypatch.setattr(checkpoint, "save", failing_once)
    config = settings("checkpoint.every=1", "train.duration=4")
    with pytest.raises(OSError, match="No space left"):
        train(config)
    assert "step 1 could not be written: " in capsys.readouterr().err
    assert [path.name for path in checkpoint.all_of(Path(config.out))] == ["step_00000002"]
