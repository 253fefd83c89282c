"""What a rank reads of a checkpoint that it goes on from."""

import math
import os

import pytest
import torch

from tests import ranks
from tests.engines.test_engines import save
from tests.mapped_bytes import n_bytes_read
from tests.test_step import make_batch, make_training, own_rows
from vlp import checkpoint, staging
from vlp.engines.own_rows import elements_of
from vlp.step import train_step


def save_parts(run):
    staging.DEALT_BYTES = 0  # these tensors are small
    training = make_training(double=False)
    train_step(training, make_batch(own_rows()))
    save(training, run)


def whole_moments(training):
    _, moments = training.engine.state(everywhere=True)
    return {name: value.tolist() for name, value in moments.items()}


def resumed(run, engine):
    """Whether moments that are read in part are those of whole ones; bytes of them that this rank
    read; bytes of all; bytes of what is no row of a parameter.
    """
    contents = checkpoint.load(checkpoint.newest(run))

    # DeepSpeed looks for ninja.
    os.environ["PATH"] = os.path.dirname(os.sys.executable) + os.pathsep + os.environ["PATH"]
    training = make_training(engine=engine, double=False)
    n_read = n_bytes_read(lambda: training.engine.load_moments(contents.optimizer))

    is_same = whole_moments(training) == {
        name: value.tolist() for name, value in contents.optimizer.items()
    }
    sizes = {name: value.nbytes for name, value in contents.optimizer.items()}
    n_bytes_of_steps = sum(size for name, size in sizes.items() if name.startswith("step."))
    return is_same, n_read, sum(sizes.values()), n_bytes_of_steps


def saved_and_resumed(run, engine):
    save_parts(run)
    return resumed(run, engine)


@pytest.mark.parametrize(
    ("engine", "n_writers", "n_readers"),
    [
        ("fsdp2", 2, 2),
        pytest.param("fsdp2", 1, 2, marks=pytest.mark.slow),
        pytest.param("fsdp2", 4, 3, marks=pytest.mark.slow),
        pytest.param("fsdp2", 3, 4, marks=pytest.mark.slow),
        pytest.param("zero3", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_a_rank_reads_its_own_rows_of_the_moments(engine, n_writers, n_readers, tmp_path):
    if n_writers == n_readers:
        results = ranks.run(n_writers, saved_and_resumed, tmp_path, engine)
    else:
        ranks.run(n_writers, save_parts, tmp_path)
        results = ranks.run(n_readers, resumed, tmp_path, engine)
    assert [is_same for is_same, *_ in results] == [True] * n_readers
    if n_writers == 1:  # one file, which is mapped: nothing counts what is read
        return

    _, _, n_bytes, n_bytes_of_steps = results[0]
    shares = [n_read for _, n_read, _, _ in results]
    if engine == "fsdp2":
        # Each row once, but for the numbers that every rank keeps.
        assert sum(shares) == n_bytes + (n_readers - 1) * n_bytes_of_steps
    # ZeRO divides elements: two ranks may read one row.
    assert n_bytes <= sum(shares) < 1.1 * n_bytes
    assert max(shares) < 1.15 * n_bytes / n_readers


SHAPES = [(), (1,), (7,), (3, 5), (4, 2, 3), (0, 3), (2, 0)]


def test_elements_are_those_of_the_flat_tensor():
    """However they are divided, as far as there are so many."""
    n_compared = 0
    for shape in SHAPES:
        value = torch.arange(math.prod(shape)).view(shape)
        for n_ranks in range(1, 6):
            n_local = max(1, -(-value.numel() // n_ranks))
            parts = [
                elements_of({"w": value}, "w", rank * n_local, (rank + 1) * n_local)
                for rank in range(n_ranks)
            ]
            assert torch.equal(torch.cat(parts), value.flatten())
            n_compared += 1
    assert n_compared == 35
