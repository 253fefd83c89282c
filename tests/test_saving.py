"""Checkpoints of several ranks, written in parts beside the steps."""

import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from tests import ranks
from tests.engines.test_engines import save
from tests.test_step import make_batch, make_training, own_rows
from tests.test_train import losses
from vlp import checkpoint, dist, resume, stages, staging
from vlp.export.checkpoints import write_checkpoint
from vlp.export.place import ExportError
from vlp.losses._table import Table
from vlp.pretrained import runs
from vlp.pretrained.parts import whole_tables
from vlp.resume import alone_in
from vlp.saving import Saver
from vlp.step import train_step
from vlp.train import train

OBJECTIVE = {"fastclip": {"version": "v2", "samples": 13}}


def save_and_compare(engine, run):
    """Train, save in parts, and read them on every rank; (what differs, bytes of this rank's
    files).
    """
    training = make_training(1, engine=engine, objective=OBJECTIVE, double=False)
    train_step(training, make_batch(own_rows()))
    save(training, run)
    model, moments = training.engine.state(everywhere=True)
    objective = training.objective.state_dict()

    path = checkpoint.newest(run)
    contents = checkpoint.load(path)
    different = [k for k, v in model.items() if not torch.equal(v, contents.model[k])]
    different += [k for k, v in moments.items() if not torch.equal(v, contents.optimizer[k])]
    if dist.is_main():
        read = checkpoint.nested(contents.objective, objective)
        for term, tensors in objective.items():
            different += [k for k, v in tensors.items() if not torch.equal(v, read[term][k][:])]
    assert len(contents.model) == len(model) and len(contents.optimizer) == len(moments) > 20
    own = path.glob(f"shard-{dist.rank() + 1:05d}-*")
    return different, sum(file.stat().st_size for file in own)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_parts_are_the_whole_and_each_rank_writes_its_share(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "DEALT_BYTES", 0)  # these tensors are small
    results = ranks.run(4, save_and_compare, engine, tmp_path)
    assert [different for different, _ in results] == [[]] * 4
    sizes = [size for _, size in results]
    # Headers have each rank's names: the tensors here are hardly larger.
    assert max(sizes) < 1.5 * min(sizes)


def statistics_written(run):
    """{name: this rank's statistics of a batch norm}, and the names of those that it writes."""
    norm = torch.nn.BatchNorm1d(5)
    norm(make_batch(own_rows()).text[:, :5].float())
    moved = norm.state_dict()

    copies = Saver(run, keep=1).staging
    written = [name for name, value in moved.items() if copies.held(name, value) is not None]
    return {name: value.tolist() for name, value in moved.items()}, written


def test_statistics_of_one_rank_are_written(tmp_path):
    """Each rank's are of its own rows; under DDP those of the first go to all."""
    (first, of_first), (other, of_other) = ranks.run(2, statistics_written, tmp_path)
    assert first["running_mean"] != other["running_mean"]
    assert (of_first, of_other) == (list(first), [])
    assert len(of_first) == 5


SAMPLES = [1, 3, 7, 9]


def save_tables(run):
    """A checkpoint with a table of each number of samples, whose rows are their numbers."""
    saver = Saver(run, keep=1)
    contents = checkpoint.Contents({"w": torch.ones(2)}, {}, objective={})
    for n_samples in SAMPLES:
        table = Table([0.0, 0.0], n_samples)
        table.place(dist.world())
        samples = torch.arange(n_samples)[dist.rank() :: dist.world_size()]
        table.own[: len(samples)] = samples.float().unsqueeze(1)
        name = f"t{n_samples}/samples"
        contents.objective[name] = saver.staging.held_table(name, table)
    contents.state = {"tables": saver.staging.tables}
    saver.write(1, contents, 0.0)
    saver.wait()


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_of_a_table_in_parts_a_rank_reads_its_own_rows(n_ranks, tmp_path):
    """By any number of ranks, whatever number wrote it and whether that divides the samples."""
    ranks.run(n_ranks, save_tables, tmp_path)
    objective = checkpoint.load(checkpoint.newest(tmp_path)).objective
    n_compared = 0
    for n_samples in SAMPLES:
        table = objective[f"t{n_samples}/samples"]
        assert len(table) == n_samples
        for n_readers in range(1, 9):
            for reader in range(n_readers):
                expected = torch.arange(n_samples)[reader::n_readers].float()
                rows = table[reader::n_readers]
                assert torch.equal(rows, expected.unsqueeze(1).expand(-1, 2))
                n_compared += 1
    assert n_compared == 4 * 36
    whole = whole_tables(objective)["t9/samples"]
    assert whole[:, 0].tolist() == list(range(9))


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_what_lies_on_a_gpu_is_copied_to_locked_memory_that_is_kept(monkeypatch):
    """As far as a CPU shows it: what is asked of torch, and in which order."""
    asked = []
    real_empty, real_copy = torch.empty, torch.Tensor.copy_

    def empty(shape, *, dtype, pin_memory):
        asked.append(("room", pin_memory))
        return real_empty(shape, dtype=dtype)

    def copy(target, source, non_blocking=False):
        asked.append(("copy", non_blocking))
        return real_copy(target, source.as_subclass(torch.Tensor))

    class Event:
        def record(self):
            asked.append(("mark",))

        def synchronize(self):
            asked.append(("wait",))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)

    kept = staging.Staging()
    value, on_cpu = torch.arange(6.0), torch.ones(2)
    places = []
    for _ in range(2):
        held = [kept.held("w", value.as_subclass(OnGpu)), kept.held("c", on_cpu)]
        kept.mark()
        kept.settle()
        assert held[0].tolist() == value.tolist() and type(held[0]) is torch.Tensor
        places.append([tensor.data_ptr() for tensor in held])
        value = value + 1
    copies = [("copy", True), ("copy", False), ("mark",), ("wait",)]
    rooms = [("room", True), copies[0], ("room", False), *copies[1:]]
    assert asked == rooms + copies
    assert places[0] == places[1]


def test_steps_go_on_while_a_checkpoint_is_written(settings, monkeypatch):
    """The writer waits until two more steps are done, and writes what was there before them."""
    real, done, waited = checkpoint.save, [], []
    go_on = threading.Event()

    def slow(run, step, *args):
        if step == 3:
            waited.append(go_on.wait(20))
        return real(run, step, *args)

    def counted(*args, **options):
        done.append(1)
        if len(done) == 5:
            go_on.set()
        return train_step(*args, **options)

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr("vlp.train.train_step", counted)
    run = train(settings("checkpoint.every=3", "checkpoint.keep=9"))
    assert waited == [True] and list(losses(run)) == list(range(1, 10))
    assert [p.name for p in checkpoint.all_of(run)] == [f"step_{n:08d}" for n in (3, 6, 9)]
    monkeypatch.undo()
    other = train(settings("checkpoint.every=3", "checkpoint.keep=9", out="other"))
    for path, expected in zip(checkpoint.all_of(run), checkpoint.all_of(other), strict=True):
        one, two = checkpoint.load(path), checkpoint.load(expected)
        assert all(torch.equal(value, two.model[name]) for name, value in one.model.items())
        assert all(torch.equal(value, two.optimizer[name]) for name, value in one.optimizer.items())


def test_checkpoints_that_stay(settings):
    run = train(settings("checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=4"))
    kept = [int(path.name[5:]) for path in checkpoint.all_of(run)]
    assert kept == [4, 8, 9]


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    """A run whose two checkpoints two ranks wrote."""
    run = tmp_path_factory.mktemp("in parts")
    ranks.run(2, save_twice, run)
    return run


def test_parts_are_checked_as_files_are(in_parts, tmp_path):
    """A part that is missing, shorter or changed: the checkpoint before it is taken."""
    shutil.copytree(in_parts, tmp_path, dirs_exist_ok=True)
    newest = checkpoint.newest(tmp_path)
    assert newest.name == "step_00000001" and checkpoint.in_parts(newest)
    part = sorted(newest.glob("shard-00002-*"))[0]
    good = part.read_bytes()
    n_cases = 0
    for damage in (None, good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        part.unlink()
        if damage is not None:
            part.write_bytes(damage)
        assert checkpoint.newest(tmp_path).name == "step_00000000"
        n_cases += 1
        part.write_bytes(good)
    assert n_cases == 3 and checkpoint.newest(tmp_path) == newest
    assert runs.looks_complete(newest)


def copied_by_hand(source, folder, case):
    """A checkpoint of which something stayed behind, or came from another one."""
    shutil.copytree(source, folder)
    parts = sorted(folder.glob("shard-00002-*"))
    if case == "a part stayed behind":
        parts[0].unlink()
    elif case == "the manifest stayed behind":
        (folder / "manifest.json").unlink()
    elif case == "a part of another step":
        shutil.copy(source.with_name("step_00000000") / parts[0].name, parts[0])
    else:
        # A manifest was made for what is there: the first rank's part under both names.
        shutil.copy(folder / parts[0].name.replace("00002", "00001", 1), parts[0])
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= checkpoint.described([parts[0]])
        (folder / "manifest.json").write_text(json.dumps(manifest))


COPIES = {
    "a part stayed behind": "found None bytes",
    "the manifest stayed behind": "manifest.json cannot be read",
    "a part of another step": "shard-00002-model-00001-of-00004.safetensors is damaged",
    "parts of one rank twice": "the parts leave gaps, or lie over one another",
}


def problems_of(folders):
    return [resume._problem_of(folder, weights_too=True) for folder in folders]


def test_of_a_checkpoint_that_was_copied_in_part_all_ranks_say_the_same(in_parts, tmp_path):
    source = checkpoint.newest(in_parts)
    folders = [tmp_path / str(number) for number in range(len(COPIES))]
    for folder, case in zip(folders, COPIES, strict=True):
        copied_by_hand(source, folder, case)
    first, second = ranks.run(2, problems_of, [*folders, source])
    assert first == second and first[-1] is None
    n_cases = 0
    for problem, expected in zip(first, COPIES.values(), strict=False):
        assert expected in problem
        n_cases += 1
    assert n_cases == 4


def save_twice(run):
    training = make_training(1, double=False)
    save(training, run)
    train_step(training, make_batch(own_rows()))
    save(training, run)


def test_a_checkpoint_in_parts_is_exported_in_one_piece(in_parts, tmp_path):
    """Its tensors are those of the parts, and it needs nothing of them."""
    write_checkpoint(in_parts, tmp_path / "whole")
    whole = checkpoint.load(tmp_path / "whole")
    parts = checkpoint.load(checkpoint.newest(in_parts))
    n_compared = 0
    for kind in runs.KINDS:
        one, other = getattr(whole, kind), whole_tables(getattr(parts, kind))
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name])
            n_compared += 1
    assert n_compared > 60 and not checkpoint.in_parts(tmp_path / "whole")
    with pytest.raises(ExportError, match="is no run"):
        write_checkpoint("ViT-B-32:openai", tmp_path / "other")


def test_a_joint_between_stages_takes_from_parts_what_it_takes_from_files(in_parts, tmp_path):
    """Only positions are another size's; an optimiser's state of any other shape stays."""
    model = make_training(double=False).engine.module
    write_checkpoint(in_parts, tmp_path / "whole")
    n_compared = 0
    for path in (checkpoint.newest(in_parts), tmp_path / "whole"):
        contents = replace(checkpoint.load(path), description=model.description())
        assert stages.in_form_of(model, contents) is contents

        larger = make_training(double=False, towers={"image": {"image_size": 24}}).engine.module
        resized = stages.in_form_of(larger, contents)
        for kind in ("model", "optimizer"):
            before, after = getattr(contents, kind), getattr(resized, kind)
            assert after.keys() == before.keys()
            changed = [name for name, value in after.items() if not value.equal(before[name])]
            assert changed and all("positional_embedding" in name for name in changed)
            n_compared += 1
    assert n_compared == 4


def test_what_a_killed_run_left_of_a_checkpoint_goes_when_it_goes_on(tmp_path):
    """It need not come to save that step again."""
    unfinished = checkpoint.temporary(tmp_path, 137)
    checkpoint.make_empty(unfinished)
    (unfinished / "shard-00001-model-00001-of-00004.safetensors").write_bytes(b"half")
    stands = tmp_path / "checkpoints/step_00000100"
    stands.mkdir()
    with alone_in(tmp_path):
        assert list(stands.parent.iterdir()) == [stands]
