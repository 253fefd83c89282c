"""Each byte of a checkpoint is read by one rank, and all ranks hold what it says."""

import math
import os
import sys
from collections import Counter

import pytest
import torch

from tests import ranks
from tests.engines.test_own_rows import save_parts
from tests.mapped_bytes import n_bytes_read
from tests.test_step import make_training
from vlp import checkpoint, config, dist, resume, teacher
from vlp.pretrained import read_once as reading
from vlp.pretrained.parts import CheckpointError
from vlp.pretrained.read_once import ReadOnce, read_once

SHAPES = [(), (1,), (2,), (3,), (4,), (5,), (17,), (0,), (0, 3), (3, 0), (2, 3), (9, 2, 3), (64, 8)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]


def of_every_form():
    """Tensors of all shapes and dtypes, the same on every rank."""
    torch.manual_seed(0)
    return {
        f"{dtype}.{shape}": (100 * torch.randn(shape)).to(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }


def read_in(order, piece):
    """How many tensors are those that are stored, asked for in an order of names."""
    reading.PIECE = piece
    stored = of_every_form()
    names = {"stored": list(stored), "turned": list(stored)[::-1]}
    # As an optimiser's: one of each kind for a parameter, then for the next one.
    names["in turns"] = [f"{dtype}.{shape}" for shape in SHAPES for dtype in DTYPES]
    names["twice"] = [name for name in stored for _ in range(2)]

    shared = ReadOnce(stored)
    assert list(shared) == list(stored)
    n_alike = 0
    for name in names[order]:
        value = shared[name]
        assert value.shape == stored[name].shape and value.dtype == stored[name].dtype
        n_alike += torch.equal(value, stored[name])
    return n_alike


def read_in_all_orders():
    n_alike = 0
    for piece in (1, 200, 2**25):
        for order in ("stored", "turned", "in turns", "twice"):
            n_alike += read_in(order, piece)
    return n_alike


@pytest.mark.parametrize("n_ranks", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_tensors_of_any_form_are_what_is_stored(n_ranks):
    n_asked = 3 * (3 + 2) * len(of_every_form())  # three pieces, three orders and one of two
    assert n_asked == 1170
    assert ranks.run(n_ranks, read_in_all_orders) == [n_asked] * n_ranks


def bytes_read(run, engine):
    """Bytes that this rank reads of weights, to see whether they are finite and to take them over,
    and of moments; bytes of all.
    """
    # DeepSpeed looks for ninja.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    reading.PIECE = 2**14  # else all of this model is one
    contents = checkpoint.load(checkpoint.newest(run))
    sizes = [
        sum(value.nbytes for value in of_kind.values())
        for of_kind in (contents.model, contents.optimizer)
    ]

    training = make_training(engine=engine, double=False)
    model = training.engine.evaluation_model()
    problems = []
    n_read = (
        n_bytes_read(lambda: problems.append(resume._spoilt(run, contents.model))),
        n_bytes_read(lambda: checkpoint.restore(model, read_once(contents.model), run)),
        n_bytes_read(lambda: training.engine.load_moments(contents.optimizer)),
    )
    assert problems == [None]

    same = [torch.equal(value, contents.model[name]) for name, value in model.state_dict().items()]
    _, moments = training.engine.state(everywhere=True)
    same += [torch.equal(value, contents.optimizer[name]) for name, value in moments.items()]
    return same, n_read, [sizes[0], *sizes]


def saved_and_read(run, engine):
    save_parts(run)
    return bytes_read(run, engine)


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "zero2"))]
)
def test_ranks_read_each_byte_of_weights_and_moments_once(engine, tmp_path):
    if engine == "zero2":  # a process cannot be DDP's before it is DeepSpeed's
        ranks.run(4, save_parts, tmp_path)
        results = ranks.run(4, bytes_read, tmp_path, engine)
    else:
        results = ranks.run(4, saved_and_read, tmp_path, engine)
    sizes = results[0][2]
    n_compared = 0
    for kind, n_bytes in enumerate(sizes):
        shares = [of_rank[1][kind] for of_rank in results]
        # FSDP2 leaves each rank the counts of steps, of 4 bytes a parameter.
        assert n_bytes <= sum(shares) <= 1.01 * n_bytes
        assert max(shares) < 1.1 * n_bytes / 4
    for same, _, _ in results:
        assert all(same)
        n_compared += len(same)
    assert n_compared > 4 * 100


def read_what_one_lacks():
    stored = of_every_form()
    if dist.rank() == 2:
        stored = Lost(stored)
    try:
        read_once(stored)["torch.float32.(64, 8)"]
    except CheckpointError as error:
        of_share = str(error)

    # And what each rank does by itself; rows of NaN, which one of them reads.
    def opened():
        if dist.rank() == 1:
            raise OSError("Permission denied")

    try:
        resume.on_all(opened)
    except OSError as error:
        alone = str(error)
    weights = {"good": torch.ones(8), "bad": torch.tensor([1.0] * 7 + [math.nan])}
    return of_share, alone, resume._spoilt("checkpoint", weights)


class Lost(dict):
    """Tensors of a disk that is gone: their forms are known."""

    def __getitem__(self, name):
        value = super().__getitem__(name)
        return Unreadable(value.shape, value.dtype)


class Unreadable:
    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, rows):
        raise OSError("Stale file handle")


def test_what_one_rank_cannot_read_is_an_error_on_all():
    messages = ranks.run(3, read_what_one_lacks)
    assert len({of_share for of_share, _, _ in messages}) == 1
    assert "rank 2: OSError: Stale file handle" in messages[0][0]
    assert [alone for _, alone, _ in messages] == ["Permission denied"] * 3
    spoilt = [text for _, _, text in messages]
    assert spoilt == [None, None, "checkpoint holds NaN or infinity in bad"]


class Counted(dict):
    """Tensors that note how often each is asked for."""

    def __init__(self, stored):
        super().__init__(stored)
        self.asked = Counter()

    def __getitem__(self, name):
        self.asked[name] += 1
        return super().__getitem__(name)

    def items(self):
        return ((name, self[name]) for name in self)

    def shape(self, name):
        return tuple(super().__getitem__(name).shape)

    def dtype(self, name):
        return super().__getitem__(name).dtype


@pytest.mark.parametrize("loses", [False, True])
def test_a_teacher_asks_for_each_tensor_once(loses):
    """Which of a checkpoint in parts is one reading of it; also that nothing of it is lost."""
    training = make_training()
    model = training.engine.evaluation_model()
    average = {f"ema_{name}": value + 1 for name, value in model.state_dict().items()}
    queue = {f"queue_{side}": torch.randn(4, model.embed_dim) for side in ("image", "text")}
    saved = Counted(average | queue)
    if loses:
        del saved[next(name for name in saved if name.startswith("ema_"))]
    options = config.Teacher(ema=0.9, queue=4)

    def build():
        return teacher.Teacher(options, training.engine, model, frozenset(), saved)

    if loses:
        with pytest.raises(CheckpointError, match="not in the checkpoint"):
            build()
        return
    held = dict(build().tensors())
    assert saved.asked == dict.fromkeys(saved, 1) and len(saved) > 20
    for name, value in (average | queue).items():
        assert torch.equal(held[name], value.to(held[name].dtype))


def test_one_process_reads_as_before():
    stored = {"w": torch.ones(math.factorial(3))}
    assert read_once(stored) is stored
