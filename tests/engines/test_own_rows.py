"""What a rank reads of a checkpoint that it goes on from."""

import pytest

from tests import ranks
from tests.engines.test_engines import save
from tests.test_step import make_batch, make_training, own_rows
from vlp import checkpoint, staging
from vlp.engines.replicated import Replicated, local_part
from vlp.pretrained.parts import Joined
from vlp.staging import named_tensors
from vlp.step import train_step


def save_parts(run):
    staging.DEALT_BYTES = 0  # these tensors are small
    training = make_training(double=False)
    train_step(training, make_batch(own_rows()))
    save(training, run)


def moments_of(training):
    own = {}
    for name, value in named_tensors(training):
        if name.startswith("optimizer/"):
            own[name] = local_part(value.detach()).flatten().tolist()
    return own


def resumed(path):
    """Whether moments that are read in part are those of whole ones; bytes of them that this rank
    read; bytes of all; bytes of what is no row of a parameter.
    """
    contents = checkpoint.load(path)
    part, n_read = Joined.part, []

    def counted(*args):
        result = part(*args)
        n_read.append(result.nbytes)
        return result

    training = make_training(engine="fsdp2", double=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Joined, "part", counted)
        training.engine.load_moments(contents.optimizer)

    # As an engine that holds all of them, which are divided then.
    expected = make_training(engine="fsdp2", double=False)
    Replicated.load_moments(expected.engine, contents.optimizer)
    sizes = {name: value.nbytes for name, value in contents.optimizer.items()}
    n_bytes_of_steps = sum(size for name, size in sizes.items() if name.startswith("step."))
    is_same = moments_of(training) == moments_of(expected)
    return is_same, sum(n_read), sum(sizes.values()), n_bytes_of_steps


@pytest.mark.parametrize(
    ("n_writers", "n_readers"),
    [
        (2, 2),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(4, 3, marks=pytest.mark.slow),
        pytest.param(3, 4, marks=pytest.mark.slow),
    ],
)
def test_a_rank_reads_its_own_rows_of_the_moments(n_writers, n_readers, tmp_path):
    ranks.run(n_writers, save_parts, tmp_path)
    results = ranks.run(n_readers, resumed, checkpoint.newest(tmp_path))
    assert [is_same for is_same, *_ in results] == [True] * n_readers
    if n_writers == 1:  # one file, which is mapped: nothing counts what is read
        return

    _, _, n_bytes, n_bytes_of_steps = results[0]
    shares = [n_read for _, n_read, _, _ in results]
    # Each row once, but for the numbers that every rank keeps.
    assert sum(shares) == n_bytes + (n_readers - 1) * n_bytes_of_steps
    assert max(shares) < 1.1 * n_bytes / n_readers
